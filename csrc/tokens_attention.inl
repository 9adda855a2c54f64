// Softmax attention of one head on planes. Both products are the register tile of the dense layers,
// with queries in the lanes: a score is a broadcast key times a vector of queries, and an output a
// broadcast value times a vector of probabilities. Softmax then runs down the rows of the scores,
// lane by lane. Keys come in blocks; sums so far are rescaled when a block raises a maximum (Milakov
// and Gimelshein, arXiv 1805.02867), so that scores never outgrow the cache.

namespace aerogel::AEROGEL_ISA {
namespace {

// 12 accumulators, 3 columns and 1 broadcast fill 16 registers; with 32 the tile is twice as tall.
constexpr int kScoreRows = kRegisters >= 32 ? 8 : 4;
constexpr int kScoreVectors = 3;
constexpr AttentionTile kAttentionTile = {kScoreVectors, kLanes};

// One panel's share of the scratch, in rows of one float per query. `total` becomes its reciprocal
// at the end; `factor` is what a new maximum makes of the sums so far.
struct AttentionPanel {
  float *queries, *scores, *sums, *maximum, *total, *factor;
  int64_t column, count;  // queries
};

// e^x for x <= 0, and exactly 0 where e^x is no normal number: a masked key takes no part.
AEROGEL_INLINE Vec exp_or_zero(Vec x) {
  return select_nonnegative(sub(broadcast(-87.0f), x), zero(), exp_nonpositive(x));
}

template <int W>
AEROGEL_INLINE void take_queries(const AttentionArgs& a, const AttentionPanel& p) {
  const Vec scale = broadcast(a.scale);
  const float* q = a.q + p.column;
  float* to = p.queries;
  for (int64_t d = 0; d < a.head_dim; ++d, q += a.ldq, to += W * kLanes) {
    for (int v = 0; v < W; ++v) store(to + v * kLanes, mul(load(q + v * kLanes), scale));
  }
  for (int v = 0; v < W; ++v) {
    store(p.maximum + v * kLanes, broadcast(-__builtin_inff()));
    store(p.total + v * kLanes, zero());
  }
}

// sums[r][v] += left(k, r) * right[k][v] for kScoreRows rows.
template <int W, class Left>
AEROGEL_INLINE void multiply_tile(Vec (&sums)[kScoreRows][W], const Left& left, const float* right,
                                  int64_t depth) {
  for (int64_t k = 0; k < depth; ++k, right += W * kLanes) {
    Vec x[W];
    for (int v = 0; v < W; ++v) x[v] = load(right + v * kLanes);
    for (int r = 0; r < kScoreRows; ++r) {
      const Vec w = broadcast(left(k, r));
      for (int v = 0; v < W; ++v) sums[r][v] = fma(w, x[v], sums[r][v]);
    }
  }
}

// What a score is shifted by: its maximum, or 0 for a query that sees no key, since -inf - -inf is NaN.
AEROGEL_INLINE Vec shift_of(Vec maximum) {
  return select_nonnegative(sub(maximum, broadcast(-__FLT_MAX__)), maximum, zero());
}

// Scores of keys [first, last) and their maxima, including what came before. Nothing but the tile is
// in registers while it is multiplied.
template <int W>
AEROGEL_NOINLINE void score_keys(const AttentionArgs& a, const AttentionPanel& p, int64_t first,
                                 int64_t last) {
  for (int v = 0; v < W; ++v) store(p.factor + v * kLanes, load(p.maximum + v * kLanes));
  for (int64_t s = first; s < last; s += kScoreRows) {
    Vec sums[kScoreRows][W];
    for (int r = 0; r < kScoreRows; ++r) {
      for (int v = 0; v < W; ++v) sums[r][v] = zero();
    }
    // Rows of whole cache lines: the last tile reads a few keys too many and drops them.
    const float* k = a.k + s;
    const int64_t ldk = a.ldk;
    multiply_tile<W>(sums, [k, ldk](int64_t d, int r) { return k[d * ldk + r]; }, p.queries,
                     a.head_dim);
    float* to = p.scores + (s - first) * W * kLanes;
    Vec maximum[W];
    for (int v = 0; v < W; ++v) maximum[v] = load(p.maximum + v * kLanes);
    for (int r = 0; r < kScoreRows; ++r, to += W * kLanes) {
      if (s + r >= last) break;
      for (int v = 0; v < W; ++v) {
        Vec score = sums[r][v];
        if (a.mask) {
          const float* mask = a.mask + (s + r) * a.ldm;
          const int64_t at = p.column + v * kLanes;
          score = add(score, a.mask_per_query ? load_upto(mask + at, a.queries - at)
                                              : broadcast(*mask));
        }
        maximum[v] = max(score, maximum[v]);
        store(to + v * kLanes, score);
      }
    }
    for (int v = 0; v < W; ++v) store(p.maximum + v * kLanes, maximum[v]);
  }
  for (int v = 0; v < W; ++v) {
    const Vec before = load(p.factor + v * kLanes), maximum = load(p.maximum + v * kLanes);
    store(p.factor + v * kLanes, exp_or_zero(sub(before, shift_of(maximum))));
  }
}

// Scores become probabilities, not yet divided by their total.
template <int W>
AEROGEL_NOINLINE void exponentiate(const AttentionPanel& p, int64_t keys) {
  Vec shift[W], total[W];
  for (int v = 0; v < W; ++v) {
    shift[v] = shift_of(load(p.maximum + v * kLanes));
    total[v] = mul(load(p.total + v * kLanes), load(p.factor + v * kLanes));
  }
  float* row = p.scores;
  for (int64_t s = 0; s < keys; ++s, row += W * kLanes) {
    for (int v = 0; v < W; ++v) {
      const Vec e = exp_or_zero(sub(load(row + v * kLanes), shift[v]));
      total[v] = add(total[v], e);
      store(row + v * kLanes, e);
    }
  }
  for (int v = 0; v < W; ++v) store(p.total + v * kLanes, total[v]);
}

// Adds the values of keys [first, last) under the probabilities; the last block finishes the rows.
template <int W>
AEROGEL_NOINLINE void sum_values(const AttentionArgs& a, const AttentionPanel& p, int64_t first,
                                 int64_t last) {
  const bool begins = first == 0, ends = last == a.keys;
  for (int v = 0; ends && v < W; ++v) {
    const Vec total = load(p.total + v * kLanes);
    const Vec share = div(broadcast(1.0f), total);
    const Vec empty = sub(zero(), total);  // a total is positive, 0 or NaN
    store(p.total + v * kLanes,
          a.empty_is_zero ? select_nonnegative(empty, zero(), share) : share);
  }
  for (int64_t d = 0; d < a.value_dim; d += kScoreRows) {
    const int64_t rows = smaller(kScoreRows, a.value_dim - d);
    const float* v_rows[kScoreRows];
    for (int r = 0; r < kScoreRows; ++r) v_rows[r] = a.v + (d + (r < rows ? r : 0)) * a.ldv + first;
    float* kept = p.sums + d * W * kLanes;
    Vec sums[kScoreRows][W];
    for (int r = 0; r < kScoreRows; ++r) {
      for (int v = 0; v < W; ++v) {
        sums[r][v] = begins || r >= rows ? zero()
                                         : mul(load(kept + (r * W + v) * kLanes),
                                               load(p.factor + v * kLanes));
      }
    }
    multiply_tile<W>(sums, [&v_rows](int64_t s, int r) { return v_rows[r][s]; }, p.scores,
                     last - first);
    for (int r = 0; r < kScoreRows; ++r) {
      if (r >= rows) break;
      for (int v = 0; v < W; ++v) {
        if (!ends) {
          store(kept + (r * W + v) * kLanes, sums[r][v]);
          continue;
        }
        const Vec y = mul(sums[r][v], load(p.total + v * kLanes));
        store_upto(a.y + (d + r) * a.ldy + p.column + v * kLanes, y, p.count - v * kLanes);
      }
    }
  }
}

template <int W>
AEROGEL_NOINLINE void attend_panel(const AttentionArgs& a, AttentionPanel p, float* scratch) {
  constexpr int64_t kRow = W * kLanes;
  p.queries = scratch;
  p.sums = p.queries + a.head_dim * kRow;
  p.maximum = p.sums + a.value_dim * kRow;
  p.total = p.maximum + kRow;
  p.factor = p.total + kRow;
  p.scores = p.factor + kRow;
  take_queries<W>(a, p);
  const int64_t blocks = (a.keys + kKeyBlock - 1) / kKeyBlock;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = a.keys * block / blocks, last = a.keys * (block + 1) / blocks;
    score_keys<W>(a, p, first, last);
    exponentiate<W>(p, last - first);
    sum_values<W>(a, p, first, last);
  }
}

// Panels of whole vectors and nearly equal width.
void attention(const AttentionArgs& a, int64_t first, int64_t last, float* scratch) {
  const int64_t vectors = (a.queries + kLanes - 1) / kLanes;
  const int64_t panels = attention_panels(a.queries, kAttentionTile);
  for (int64_t i = first; i < last; ++i) {
    const int64_t begin = vectors * i / panels, end = vectors * (i + 1) / panels;
    AttentionPanel p{};
    p.column = begin * kLanes;
    p.count = smaller(end * kLanes, a.queries) - p.column;
    const auto attend = end - begin == 3   ? &attend_panel<3>
                        : end - begin == 2 ? &attend_panel<2>
                                           : &attend_panel<1>;
    attend(a, p, scratch);
  }
}

}  // namespace
}  // namespace aerogel::AEROGEL_ISA
