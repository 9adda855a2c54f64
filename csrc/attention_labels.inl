// Scores of labels: products with a few channels of every key, stored as floats or in few bits.

namespace aerogel::AEROGEL_ISA {
namespace {

constexpr int64_t kAhead = 2048;  // bytes: what memory brings while some 30 labels are scored

// Sixteen codes of 8, 4 or 2 bits as floats.
#if defined(AEROGEL_USE_AVX512) || defined(AEROGEL_USE_AVX2)
AEROGEL_INLINE void store_bytes(__m128i bytes, float* out) {
#if defined(AEROGEL_USE_AVX512)
  store(out, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)));
#else
  store(out, _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)));
  store(out + 8, _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_unpackhi_epi64(bytes, bytes))));
#endif
}
template <int kBits>
AEROGEL_INLINE void unpack_sixteen(const uint8_t* from, float* out) {
  if constexpr (kBits == 8) {
    store_bytes(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)), out);
  } else if constexpr (kBits == 4) {
    const __m128i mask = _mm_set1_epi8(15);
    const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    const __m128i low = _mm_and_si128(b, mask);
    store_bytes(_mm_unpacklo_epi8(low, _mm_and_si128(_mm_srli_epi16(b, 4), mask)), out);
  } else {
    const __m128i mask = _mm_set1_epi8(3), b = load_u32(from);
    const __m128i p0 = _mm_and_si128(b, mask), p1 = _mm_and_si128(_mm_srli_epi16(b, 2), mask);
    const __m128i p2 = _mm_and_si128(_mm_srli_epi16(b, 4), mask);
    const __m128i p3 = _mm_and_si128(_mm_srli_epi16(b, 6), mask);
    store_bytes(_mm_unpacklo_epi16(_mm_unpacklo_epi8(p0, p1), _mm_unpacklo_epi8(p2, p3)), out);
  }
}
#else
template <int kBits>
AEROGEL_INLINE void unpack_sixteen(const uint8_t* from, float* out) {
  constexpr int kEach = 8 / kBits, kMask = (1 << kBits) - 1;
  for (int i = 0; i < 16 / kEach; ++i) {
    for (int j = 0; j < kEach; ++j) {
      out[i * kEach + j] = static_cast<float>(from[i] >> (j * kBits) & kMask);
    }
  }
}
#endif

template <int kBits>
AEROGEL_NOINLINE void unpack_codes(const uint8_t* from, int64_t bytes, float* out) {
  constexpr int kEach = 8 / kBits, kBytes = 16 / kEach, kMask = (1 << kBits) - 1;
  int64_t i = 0;
  for (; i + kBytes <= bytes; i += kBytes) unpack_sixteen<kBits>(from + i, out + i * kEach);
  for (; i < bytes; ++i) {
    for (int j = 0; j < kEach; ++j) {
      out[i * kEach + j] = static_cast<float>(from[i] >> (j * kBits) & kMask);
    }
  }
}

// C queries x 8 / C labels: total[c * 8 / C + i], of the labels from `rows` on, the first `count` of
// which are there. Vectors are whole but for the last of a row.
template <class Values, int C>
AEROGEL_INLINE void score_step(const typename Values::Stored* labels, int64_t width,
                               const float* query, int64_t query_stride, int64_t count,
                               float* total) {
  constexpr int kKeys = kProducts / C;
  const int64_t whole = width / kLanes * kLanes;
  Vec sums[kProducts];
#pragma GCC unroll 8
  for (int i = 0; i < kProducts; ++i) sums[i] = zero();
  const auto add_products = [&](int64_t d, auto load_label) {
    Vec q[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) q[c] = load(query + c * query_stride + d);
#pragma GCC unroll 8
    for (int i = 0; i < kKeys; ++i) {
      const Vec x = load_label(labels + (i < count ? i : 0) * width + d);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sums[c * kKeys + i] = fma(x, q[c], sums[c * kKeys + i]);
    }
  };
  for (int64_t d = 0; d < whole; d += kLanes) {
    add_products(d, [](const auto* p) { return Values::load(p); });
  }
  if (whole < width) {
    add_products(whole, [&](const auto* p) { return load_row<Values>(p, width - whole); });
  }
  sum_lanes(sums, total);
}

// scores[c * stride + j] of C queries. Labels kAhead bytes on are asked for.
template <class Values, int C>
AEROGEL_NOINLINE void score_labels(const typename Values::Stored* labels, int64_t width,
                                   const float* query, int64_t query_stride, int64_t count,
                                   float* scores, int64_t stride) {
  constexpr int kKeys = kProducts / C;
  const int64_t bytes = kKeys * width * static_cast<int64_t>(sizeof *labels);
  float total[kProducts];
  int64_t j = 0;
  for (; j + kKeys <= count; j += kKeys) {
    const auto* const rows = labels + j * width;
    for (int64_t at = 0; at < bytes; at += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(rows) + kAhead + at, 0, 3);
    }
    score_step<Values, C>(rows, width, query, query_stride, kKeys, total);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      __builtin_memcpy(scores + c * stride + j, total + c * kKeys, kKeys * sizeof(float));
    }
  }
  if (j == count) return;
  score_step<Values, C>(labels + j * width, width, query, query_stride, count - j, total);
  for (int c = 0; c < C; ++c) {
    for (int64_t i = 0; j + i < count; ++i) scores[c * stride + j + i] = total[c * kKeys + i];
  }
}

// Calls f(Size<C>, column) for groups of 4, 2 and 1 columns.
template <class F>
AEROGEL_INLINE void for_columns_of(int64_t count, const F& f) {
  int64_t c = 0;
  for (; c + 4 <= count; c += 4) f(Size<4>{}, c);
  for (; c + 2 <= count; c += 2) f(Size<2>{}, c);
  if (c < count) f(Size<1>{}, c);
}

template <class Values>
AEROGEL_INLINE void score_columns(const LabelTask& t, const typename Values::Stored* labels,
                                  const float* queries, int64_t padded, int64_t count,
                                  float* scores) {
  const int64_t width = t.args->width;
  for_columns_of(t.columns, [&](auto size, int64_t c) {
    score_labels<Values, decltype(size)::value>(labels, width, queries + c * padded, padded, count,
                                                scores + c * t.stride, t.stride);
  });
}

// Codes are scored as they are: low and step of a label join the sum at its end.
AEROGEL_NOINLINE void finish_codes(const float* span, float query_sum, int64_t count,
                                   float* scores) {
  for (int64_t j = 0; j < count; ++j) {
    scores[j] = scores[j] * span[2 * j + 1] + query_sum * span[2 * j];
  }
}

// Codes of 4 and 2 bits as they lie: a code picks its product with a channel of the query from a
// table of sixteen, which only AVX-512 looks up in one step. `tables` is [column][channel][16].
#if defined(AEROGEL_USE_AVX512)
template <int kBits>
AEROGEL_INLINE bool has_tables(int64_t width) {
  return width * kBits % 32 == 0;
}
template <int kBits>
AEROGEL_NOINLINE void fill_tables(const float* query, int64_t width, float* table) {
  for (int64_t i = 0; i < 16 * width; ++i) {
    table[i] = query[i / 16] * static_cast<float>(i & ((1 << kBits) - 1));
  }
}
// Word `at` of sixteen labels of `words` words.
AEROGEL_INLINE __m512i words_of(const uint8_t* labels, int64_t words, int64_t at) {
  const __m512i sixteen = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  if (words == 1) return _mm512_loadu_si512(labels);
  const __m512i index = _mm512_add_epi32(
      _mm512_mullo_epi32(sixteen, _mm512_set1_epi32(static_cast<int>(words))),
      _mm512_set1_epi32(static_cast<int>(at)));
  if (words > 2) return _mm512_i32gather_epi32(index, labels, 4);
  return _mm512_permutex2var_epi32(_mm512_loadu_si512(labels), index,
                                   _mm512_loadu_si512(labels + 64));
}
// scores[c * stride + i] of C queries and V times sixteen labels.
template <int kBits, int C, int V>
AEROGEL_INLINE void look_up_step(const uint8_t* labels, int64_t width, const float* tables,
                                 const float* sums, const float* span, float* scores,
                                 int64_t stride) {
  const int64_t words = width * kBits / 32;
  Vec total[V][C];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) total[v][c] = zero();
  }
  const float* table = tables;
  for (int64_t w = 0; w < words; ++w) {
    __m512i codes[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) codes[v] = words_of(labels + v * 64 * words, words, w);
    for (int i = 0; i < 32 / kBits; ++i, table += 16) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        const Vec products = load(table + c * 16 * width);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          total[v][c] = add(total[v][c], _mm512_permutexvar_ps(codes[v], products));
        }
      }
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) codes[v] = _mm512_srli_epi32(codes[v], kBits);
    }
  }
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const Vec first = load(span + 32 * v), second = load(span + 32 * v + 16);
    const Vec low = _mm512_permutex2var_ps(first, even, second);
    const Vec step = _mm512_permutex2var_ps(first, odd, second);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      store(scores + c * stride + 16 * v, fma(total[v][c], step, mul(broadcast(sums[c]), low)));
    }
  }
}
template <int kBits, int C>
AEROGEL_NOINLINE void look_up_labels(const uint8_t* labels, int64_t width, const float* tables,
                                     const float* sums, const float* span, int64_t count,
                                     float* scores, int64_t stride) {
  constexpr int V = C == 4 ? 2 : 4;
  const int64_t bytes = width * kBits / 8;
  int64_t j = 0;
  for (; j + 16 * V <= count; j += 16 * V) {
    const uint8_t* const rows = labels + j * bytes;
    for (int64_t at = 0; at < 16 * V * bytes; at += 64) {
      __builtin_prefetch(rows + kAhead + at, 0, 3);
    }
    for (int64_t at = 0; at < 32 * V; at += 16) {
      __builtin_prefetch(span + 2 * j + kAhead / 4 + at, 0, 3);
    }
    look_up_step<kBits, C, V>(rows, width, tables, sums, span + 2 * j, scores + j, stride);
  }
  for (; j < count; j += 16) {
    look_up_step<kBits, C, 1>(labels + j * bytes, width, tables, sums, span + 2 * j, scores + j,
                              stride);
  }
}
#else
template <int kBits>
AEROGEL_INLINE bool has_tables(int64_t) {
  return false;
}
template <int kBits>
AEROGEL_INLINE void fill_tables(const float*, int64_t, float*) {}
template <int kBits, int C>
AEROGEL_INLINE void look_up_labels(const uint8_t*, int64_t, const float*, const float*,
                                   const float*, int64_t, float*, int64_t) {}
#endif

// Scores of the first labels, as many as tables can give of `count`; returns how many.
template <int kBits>
AEROGEL_INLINE int64_t look_up_columns(const LabelTask& t, const uint8_t* labels,
                                       const float* tables, const float* sums, const float* span,
                                       int64_t count, float* scores) {
  const int64_t width = t.args->width;
  if (!has_tables<kBits>(width)) return 0;
  count -= count % 16;
  for_columns_of(t.columns, [&](auto size, int64_t c) {
    look_up_labels<kBits, decltype(size)::value>(labels, width, tables + c * 16 * width, sums + c,
                                                 span, count, scores + c * t.stride, t.stride);
  });
  return count;
}

void score_task(const LabelTask& t) {
  const LabelArgs& a = *t.args;
  const int64_t width = a.width, padded = (width + kLanes - 1) / kLanes * kLanes;
  float* const codes = t.scratch;
  float* const tables = codes + kLabelChunk / 2 * width;  // codes are few where there are tables
  float* const queries = codes + kLabelChunk * width;
  float sums[kLabelColumns];
  const int64_t group = a.q_heads / a.label_heads;
  for (int64_t c = 0; c < t.columns; ++c) {
    const int64_t head = t.label_head * group + (t.column + c) / a.q_len;
    const float* const from =
        a.query + ((t.batch * a.q_heads + head) * a.q_len + (t.column + c) % a.q_len) * width;
    sums[c] = 0.0f;
    float* const query = queries + c * padded;
    for (int64_t d = 0; d < padded; ++d) query[d] = d < width ? from[d] * a.scale : 0.0f;
    for (int64_t d = 0; d < width; ++d) sums[c] += query[d];
    if (a.type == LabelType::kBits4) fill_tables<4>(query, width, tables + c * 16 * width);
    if (a.type == LabelType::kBits2) fill_tables<2>(query, width, tables + c * 16 * width);
  }
  const char* const base = static_cast<const char*>(a.labels) + t.batch * a.label_batch +
                           t.label_head * a.label_head;
  const float* const span =
      a.span ? a.span + t.batch * a.span_batch + t.label_head * a.span_head : nullptr;
  const int64_t bytes = label_bytes(a.type, width);
  for (int64_t begin = t.begin; begin < t.end; begin += kLabelChunk) {
    const int64_t count = t.end - begin < kLabelChunk ? t.end - begin : kLabelChunk;
    const char* const from = base + begin * bytes;
    const auto* const raw = reinterpret_cast<const uint8_t*>(from);
    float* const scores = t.scores + begin - t.begin;
    const float* const own = a.span ? span + 2 * begin : nullptr;
    int64_t done = 0;
    switch (a.type) {
      case LabelType::kFloat32:
        score_columns<Float32Values>(t, reinterpret_cast<const float*>(from), queries, padded,
                                     count, scores);
        continue;
      case LabelType::kBfloat16:
        score_columns<Bfloat16Values>(t, reinterpret_cast<const uint16_t*>(from), queries, padded,
                                      count, scores);
        continue;
      case LabelType::kFloat16:
        score_columns<Float16Values>(t, reinterpret_cast<const uint16_t*>(from), queries, padded,
                                     count, scores);
        continue;
      case LabelType::kBits8: unpack_codes<8>(raw, count * bytes, codes); break;
      case LabelType::kBits4:
        done = look_up_columns<4>(t, raw, tables, sums, own, count, scores);
        unpack_codes<4>(raw + done * bytes, (count - done) * bytes, codes);
        break;
      case LabelType::kBits2:
        done = look_up_columns<2>(t, raw, tables, sums, own, count, scores);
        unpack_codes<2>(raw + done * bytes, (count - done) * bytes, codes);
        break;
    }
    if (done == count) continue;
    score_columns<Float32Values>(t, codes, queries, padded, count - done, scores + done);
    for (int64_t c = 0; c < t.columns; ++c) {
      finish_codes(own + 2 * done, sums[c], count - done, scores + c * t.stride + done);
    }
  }
}

}  // namespace
}  // namespace aerogel::AEROGEL_ISA
