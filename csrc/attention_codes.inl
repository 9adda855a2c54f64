// Attention over codes: scores of a part, their exponentials, then the sums of values. A part is at
// most kCodedTiles tiles, so that its weights stay in the first cache; its values are prefetched
// while its scores are computed, and the next part's keys while its values are added up.

#include "attention_codes.h"

namespace aerogel::AEROGEL_ISA {
namespace {

// Columns that are computed together, and vectors of tokens: a code leaves its byte once for all of
// the columns, and enough sums are under way to hide the latency of a multiply-add.
constexpr int kCodedColumns = kRegisters >= 32 ? 4 : 2;
constexpr int kTileVectors = static_cast<int>(kCodedTokens) / kLanes;

#if defined(AEROGEL_USE_AVX512)
using Bytes = __m512i;
AEROGEL_INLINE Bytes load_bytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// Code I of every lane's byte. Tables take their index from the lowest four bits of a lane, so that
// no bit has to be cleared.
template <int Bits, int I>
AEROGEL_INLINE Vec code(Bytes x) {
  if constexpr (I > 0) x = _mm512_srli_epi32(x, I * Bits);
  if constexpr (Bits == 8) return _mm512_cvtepi32_ps(x);
  const Vec table = Bits == 2 ? _mm512_setr_ps(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3)
                              : _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_permutexvar_ps(x, table);
}
#elif defined(AEROGEL_USE_AVX2)
using Bytes = __m256i;
AEROGEL_INLINE Bytes load_bytes(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
// The table of two bits takes its index from the lowest three bits of a lane.
template <int Bits, int I>
AEROGEL_INLINE Vec code(Bytes x) {
  if constexpr (I > 0) x = _mm256_srli_epi32(x, I * Bits);
  if constexpr (Bits == 2) {
    return _mm256_permutevar8x32_ps(_mm256_setr_ps(0, 1, 2, 3, 0, 1, 2, 3), x);
  }
  if constexpr (Bits == 4 && I == 0) x = _mm256_and_si256(x, _mm256_set1_epi32(15));
  return _mm256_cvtepi32_ps(x);
}
#elif defined(AEROGEL_USE_NEON)
using Bytes = uint32x4_t;
AEROGEL_INLINE Bytes load_bytes(const uint8_t* p) {
  uint32_t four;
  __builtin_memcpy(&four, p, sizeof four);
  return vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four))));
}
template <int Bits, int I>
AEROGEL_INLINE Vec code(Bytes x) {
  if constexpr (I > 0) x = vshrq_n_u32(x, I * Bits);
  if constexpr (I + 1 < 8 / Bits) x = vandq_u32(x, vdupq_n_u32((1u << Bits) - 1u));
  return vcvtq_f32_u32(x);
}
#else
struct Bytes {
  uint8_t lane[kLanes];
};
AEROGEL_INLINE Bytes load_bytes(const uint8_t* p) {
  Bytes x;
  for (int i = 0; i < kLanes; ++i) x.lane[i] = p[i];
  return x;
}
template <int Bits, int I>
AEROGEL_INLINE Vec code(Bytes x) {
  constexpr int kMask = (1 << Bits) - 1;
  return lanewise([&](int i) { return static_cast<float>(x.lane[i] >> (I * Bits) & kMask); });
}
#endif

// Calls f(code, number) for the codes of a byte.
template <int Bits, int I = 0, class F>
AEROGEL_INLINE void for_codes(Bytes x, const F& f) {
  if constexpr (I < 8 / Bits) {
    f(code<Bits, I>(x), I);
    for_codes<Bits, I + 1>(x, f);
  }
}

// One part at work; `stride` is of scores, whose columns become weights.
struct CodedState {
  int64_t columns, vectors, bytes, value_bytes, dim, value_dim, stride;
  const uint8_t *keys, *values;
  float *queries, *scores, *offset;
};

AEROGEL_INLINE int64_t byte_of(int64_t vector, int64_t bytes) {
  return vector / kTileVectors * bytes * kCodedTokens + vector % kTileVectors * kLanes;
}

// Scores of V vectors of tokens for C columns.
template <int Bits, int C, int V>
AEROGEL_INLINE void score_codes(const CodedState& s, int64_t column, int64_t vector) {
  constexpr int kPer = 8 / Bits;
  const uint8_t* from[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) from[v] = s.keys + byte_of(vector + v, s.bytes);
  Vec sums[V][C];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sums[v][c] = broadcast(s.offset[column + c]);
  }
  const float* q = s.queries + column * s.dim;
  for (int64_t b = 0; b < s.bytes; ++b, q += kPer) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      for_codes<Bits>(load_bytes(from[v] + b * kCodedTokens), [&](Vec x, int i) {
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
          sums[v][c] = fma(broadcast(q[c * s.dim + i]), x, sums[v][c]);
        }
      });
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      store(s.scores + (column + c) * s.stride + (vector + v) * kLanes, sums[v][c]);
    }
  }
}

// Lines [done, wanted) of what is needed next; into the second cache, as prefetch_row does.
struct CodesAhead {
  const uint8_t* from;
  int64_t bytes, done;
  AEROGEL_INLINE void fetch(int64_t share, int64_t all) {
    const int64_t wanted = from ? bytes * share / all : 0;
    for (; done < wanted; done += 64) __builtin_prefetch(from + done, 0, 2);
  }
};

template <int Bits, int C>
AEROGEL_NOINLINE void score_part(const CodedState& s, int64_t column, CodesAhead ahead) {
  constexpr int V = 4;
  int64_t u = 0;
  for (; u + V <= s.vectors; u += V) {
    score_codes<Bits, C, V>(s, column, u);
    ahead.fetch(u + V, s.vectors);
  }
  for (; u < s.vectors; ++u) score_codes<Bits, C, 1>(s, column, u);
  ahead.fetch(1, 1);
}

// sums[c][channel] of B bytes of channels for C columns.
template <int Bits, int C, int B>
AEROGEL_INLINE void sum_codes(const CodedState& s, int64_t column, int64_t byte, float* sums,
                              int64_t stride) {
  constexpr int kPer = 8 / Bits;
  constexpr int kSums = (B * kPer * C + kProducts - 1) / kProducts * kProducts;
  Vec tile[kSums];
#pragma GCC unroll 16
  for (int i = 0; i < kSums; ++i) tile[i] = zero();
  const float* const weights = s.scores + column * s.stride;
  const uint8_t* row = s.values + byte * kCodedTokens;
  for (int64_t u = 0; u < s.vectors; u += kTileVectors, row += s.value_bytes * kCodedTokens) {
#pragma GCC unroll 4
    for (int part = 0; part < kTileVectors; ++part) {
      Vec w[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) w[c] = load(weights + c * s.stride + (u + part) * kLanes);
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b) {
        for_codes<Bits>(load_bytes(row + b * kCodedTokens + part * kLanes), [&](Vec x, int i) {
#pragma GCC unroll 4
          for (int c = 0; c < C; ++c) {
            Vec& sum = tile[c * B * kPer + b * kPer + i];
            sum = fma(w[c], x, sum);
          }
        });
      }
    }
  }
  float total[kSums];
#pragma GCC unroll 2
  for (int i = 0; i < kSums; i += kProducts) {
    sum_lanes(reinterpret_cast<const Vec(&)[kProducts]>(tile[i]), total + i);
  }
  for (int c = 0; c < C; ++c) {
    for (int i = 0; i < B * kPer; ++i) {
      sums[(column + c) * stride + byte * kPer + i] = total[c * B * kPer + i];
    }
  }
}

template <int Bits, int C>
AEROGEL_NOINLINE void sum_part(const CodedState& s, int64_t column, float* sums, int64_t stride,
                               CodesAhead ahead) {
  constexpr int kPer = 8 / Bits;
  constexpr int B = kPer * C >= kProducts ? 1 : kProducts / (kPer * C);
  int64_t b = 0;
  for (; b + B <= s.value_bytes; b += B) {
    ahead.fetch(b + B, s.value_bytes);
    sum_codes<Bits, C, B>(s, column, b, sums, stride);
  }
  for (; b < s.value_bytes; ++b) sum_codes<Bits, C, 1>(s, column, b, sums, stride);
}

// Calls f(Size<C>, column) for groups of at most kCodedColumns columns.
template <class F>
AEROGEL_INLINE void for_coded_columns(int64_t count, const F& f) {
  int64_t c = 0;
  if constexpr (kCodedColumns >= 4) {
    for (; c + 4 <= count; c += 4) f(Size<4>{}, c);
  }
  for (; c + 2 <= count; c += 2) f(Size<2>{}, c);
  if (c < count) f(Size<1>{}, c);
}

AEROGEL_INLINE const void* scales_at(const Scales& s, int64_t first) {
  return static_cast<const char*>(s.data) + first * bytes_of(s.type);
}

// Queries times the steps of their channels, and what the lows give; logarithms to base 2.
AEROGEL_NOINLINE void fold_queries(const CodedTask& t, const Columns& columns, const CodedState& s,
                                   float* low, float* step) {
  const AttendArgs& a = *t.task.args;
  const int64_t row = (t.task.batch * a.kv_heads + t.task.head / group_of(a)) * a.dim;
  widen_row(t.segment->k_low.type, scales_at(t.segment->k_low, row), low, a.dim);
  widen_row(t.segment->k_step.type, scales_at(t.segment->k_step, row), step, a.dim);
  for (int64_t c = 0; c < columns.count; ++c) {
    float* const q = s.queries + c * s.dim;
    widen_row(a.type, row_of(a, a.q, t.task.batch, columns.head(t.task, c), columns.query(c)), q,
              a.dim);
    float offset = 0.0f;
    for (int64_t d = 0; d < a.dim; ++d) {
      const float scaled = q[d] * (a.scale * kLog2e);
      offset += scaled * low[d];
      q[d] = scaled * step[d];
    }
    s.offset[c] = offset;
  }
}

// Scores become weights, each times the step of its token; what the lows of the tokens give.
AEROGEL_NOINLINE float weigh_column(const AttendArgs& a, float* scores, int64_t real,
                                    int64_t tokens, const float* low, const float* step,
                                    float* maximum, float* total) {
  if (a.softcap != 0.0f) {
    const Vec cap = broadcast(a.softcap * kLog2e);
    for (int64_t j = 0; j < tokens; j += kLanes) {
      store(scores + j, mul(cap, tanh(div(load(scores + j), cap))));
    }
  }
  for (int64_t j = real; j < tokens; ++j) scores[j] = -kInfinity;
  *maximum = largest(scores, tokens);
  const Vec shift = shift_of(broadcast(*maximum));
  Vec sum = zero(), lows = zero();
  for (int64_t j = 0; j < tokens; j += kLanes) {
    const Vec e = exp2_or_zero(sub(load(scores + j), shift));
    sum = add(sum, e);
    lows = fma(e, load(low + j), lows);
    store(scores + j, mul(e, load(step + j)));
  }
  Vec both[kProducts];
  for (int i = 0; i < kProducts; ++i) both[i] = zero();
  both[0] = sum;
  both[1] = lows;
  float sums[kProducts];
  sum_lanes(both, sums);
  *total = sums[0];
  return sums[1];
}

template <int Bits>
AEROGEL_NOINLINE void attend_codes(const CodedTask& t, const Columns& columns, CodedState& s,
                                   Carver& carver) {
  const AttendArgs& a = *t.task.args;
  const CodedSegment& segment = *t.segment;
  const int64_t tiles = t.tile_end - t.tile_begin, tokens = tiles * kCodedTokens;
  const int64_t plane = t.task.batch * a.kv_heads + t.task.head / group_of(a);
  s.bytes = a.dim * Bits / 8;
  s.value_bytes = a.value_dim * Bits / 8;
  s.vectors = tiles * kTileVectors;
  s.keys = segment.k + (plane * segment.tiles + t.tile_begin) * s.bytes * kCodedTokens;
  s.values = segment.v + (plane * segment.tiles + t.tile_begin) * s.value_bytes * kCodedTokens;
  const int64_t key_bytes = tokens * s.bytes, value_bytes = tokens * s.value_bytes;
  for_coded_columns(columns.count, [&](auto size, int64_t c) {
    const uint8_t* const ahead = c == 0 ? s.values : nullptr;
    score_part<Bits, decltype(size)::value>(s, c, {ahead, value_bytes, 0});
  });
  float* const low = carver.take(tokens);
  float* const step = carver.take(tokens);
  float* const channel = carver.take(a.value_dim);
  const int64_t first = (t.task.batch * segment.tiles + t.tile_begin) * kCodedTokens;
  widen_row(segment.v_low.type, scales_at(segment.v_low, first), low, tokens);
  widen_row(segment.v_step.type, scales_at(segment.v_step, first), step, tokens);
  const int64_t real = segment.counts[t.task.batch] - t.tile_begin * kCodedTokens;
  float* const sums = t.task.part + 2 * kDecodeColumns;
  for (int64_t c = 0; c < columns.count; ++c) {
    s.offset[c] = weigh_column(a, s.scores + c * s.stride, real, tokens, low, step,
                               t.task.part + c, t.task.part + kDecodeColumns + c);
  }
  for_coded_columns(columns.count, [&](auto size, int64_t c) {
    const uint8_t* const ahead = c == 0 ? s.keys + key_bytes : nullptr;
    sum_part<Bits, decltype(size)::value>(s, c, sums, s.value_dim, {ahead, key_bytes, 0});
  });
  widen_row(segment.v_channel.type, scales_at(segment.v_channel, plane * a.value_dim), channel,
            a.value_dim);
  for (int64_t c = 0; c < columns.count; ++c) {
    float* const row = sums + c * s.value_dim;
    for (int64_t d = 0; d < a.value_dim; ++d) row[d] = (row[d] + s.offset[c]) * channel[d];
  }
}

void coded_part(const CodedTask& t) {
  const AttendArgs& a = *t.task.args;
  const Columns columns(t.task);
  Carver carver{t.task.scratch};
  CodedState s{};
  s.columns = columns.count;
  s.dim = padded_dim(a.dim);
  s.value_dim = padded_dim(a.value_dim);
  s.stride = kCodedTiles * kCodedTokens;
  s.queries = carver.take(kDecodeColumns * s.dim);
  s.scores = carver.take(kDecodeColumns * s.stride);
  s.offset = carver.take(kDecodeColumns);
  float* const low = carver.take(a.dim);
  fold_queries(t, columns, s, low, carver.take(a.dim));
  switch (t.segment->bits) {
    case 2: return attend_codes<2>(t, columns, s, carver);
    case 4: return attend_codes<4>(t, columns, s, carver);
    default: return attend_codes<8>(t, columns, s, carver);
  }
}

// An output is a part whose total is 1.
void coded_prior(const CodedPrior& p) {
  const AttendTask& t = p.task;
  const AttendArgs& a = *t.args;
  const Columns columns(t);
  const int64_t stride = padded_dim(a.value_dim);
  for (int64_t c = 0; c < columns.count; ++c) {
    const int64_t head = columns.head(t, c), query = columns.query(c);
    const float lse = p.lse[(t.batch * a.q_heads + head) * a.q_len + query];
    t.part[c] = lse * kLog2e;
    t.part[kDecodeColumns + c] = lse > -kInfinity ? 1.0f : 0.0f;
    widen_row(a.type, row_of(a, p.o, t.batch, head, query),
              t.part + 2 * kDecodeColumns + c * stride, a.value_dim);
  }
}

}  // namespace
}  // namespace aerogel::AEROGEL_ISA
