// Forward for many queries: panels of columns that keep their maxima, totals and sums of values
// while the steps of their query tile go by (Milakov and Gimelshein, arXiv 1805.02867).
//
// Reading order: scores of a step -> probabilities -> sums of values -> one task.

namespace aerogel::AEROGEL_ISA {
namespace {

// Rows of `width` vectors, one float per column. Queries are scaled so that scores are exponents
// of 2.
struct AttendPanel {
  float *queries, *sums, *maximum, *total, *position, *lower, *hash;  // hash: uint32_t
  int64_t first, count;  // columns
  int width;
  float reach[kWide];  // the last position in each vector and those before it
};

// Which vectors the causal rule leaves a key: the keys of a step before bounds[l] need those from
// vector l on, and those from the last bound on none.
struct Leads {
  int64_t bounds[kWide];

  AEROGEL_INLINE int64_t live(int width) const { return bounds[width - 1]; }
};

// Calls f(Size<l>, first, end) for the keys that need the vectors from l on.
template <int W, int L = 0, class F>
AEROGEL_INLINE void for_leads(const Leads& leads, const F& f, int64_t begin = 0) {
  if constexpr (L < W) {
    if (leads.bounds[L] > begin) f(Size<L>{}, begin, leads.bounds[L]);
    for_leads<W, L + 1>(leads, f, leads.bounds[L] > begin ? leads.bounds[L] : begin);
  }
}

// Cuts columns into panels; the last may be narrower.
AEROGEL_INLINE int64_t panels_of(int64_t columns) {
  return (columns + kWide * kLanes - 1) / (kWide * kLanes);
}
AEROGEL_INLINE void cut_panel(int64_t columns, int64_t index, AttendPanel& p) {
  p.first = index * kWide * kLanes;
  p.count = least(columns - p.first, kWide * kLanes);
  p.width = static_cast<int>((p.count + kLanes - 1) / kLanes);
}

// Calls f(Size<width>) for the width of a panel.
template <class F>
AEROGEL_INLINE void for_width(int width, const F& f) {
  if constexpr (kWide >= 4) {
    if (width == 4) return f(Size<4>{});
    if (width == 3) return f(Size<3>{});
  }
  if (width == 2) return f(Size<2>{});
  return f(Size<1>{});
}

// Where a panel's columns lie in x, x.row floats apart, if they fill its lanes and are float32 rows of
// one head; else null.
AEROGEL_INLINE float* panel_rows(const AttendTask& t, const Columns& columns, const AttendPanel& p,
                                 const AttendTensor& x) {
  const AttendArgs& a = *t.args;
  const int64_t last = p.first + p.count - 1;
  const bool whole = p.count == p.width * kLanes && a.type == AttendType::kFloat32;
  if (!whole || p.first / columns.rows != last / columns.rows) return nullptr;
  return static_cast<float*>(
      row_of(a, x, t.batch, columns.head(t, p.first), columns.query(p.first)));
}

// x [columns of the panel][dim] of a tensor with a row per query becomes to[dim][width], times
// `factor`; columns beyond the last are zero. `rows` keeps them as they were, if it is not null.
AEROGEL_NOINLINE void take_columns(const AttendTask& t, const Columns& columns,
                                   const AttendPanel& p, const AttendTensor& x, int64_t dim,
                                   float factor, float* to, float* rows, float* scratch) {
  const AttendArgs& a = *t.args;
  const int64_t width = p.width * kLanes, stride = padded_dim(dim);
  float* const wide = rows ? rows : scratch;
  const float* const straight = rows ? nullptr : panel_rows(t, columns, p, x);
  for (int64_t c = 0; !straight && c < width; ++c) {
    float* row = wide + c * stride;
    int64_t filled = 0;
    if (c < p.count) {
      const int64_t column = p.first + c;
      widen_row(a.type,
                row_of(a, x, t.batch, columns.head(t, column), columns.query(column)), row, dim);
      filled = dim;
    }
    for (int64_t d = filled; d < stride; ++d) row[d] = 0.0f;
  }
  transpose(straight ? straight : wide, straight ? x.row : stride, to, width, width, dim);
  if (factor == 1.0f) return;
  const Vec by = broadcast(factor);
  for (int64_t i = 0; i < dim * width; i += kLanes) store(to + i, mul(load(to + i), by));
}

// The inverse: from[dim][width], times each column's factor, goes to the rows of x.
AEROGEL_NOINLINE void put_columns(const AttendTask& t, const Columns& columns,
                                  const AttendPanel& p, float* from, const float* factors,
                                  int64_t dim, const AttendTensor& x, float* scratch) {
  const AttendArgs& a = *t.args;
  const int64_t width = p.width * kLanes;
  for (int64_t d = 0; d < dim; ++d) {
    float* row = from + d * width;
    for (int64_t c = 0; c < width; c += kLanes) {
      store(row + c, mul(load(row + c), load(factors + c)));
    }
  }
  if (float* const straight = panel_rows(t, columns, p, x)) {
    return transpose(from, width, straight, x.row, dim, width);
  }
  const int64_t stride = padded_dim(dim);
  transpose(from, width, scratch, stride, dim, width);
  for (int64_t c = 0; c < p.count; ++c) {
    const int64_t column = p.first + c;
    narrow_row(a.type, scratch + c * stride,
               row_of(a, x, t.batch, columns.head(t, column), columns.query(column)), dim);
  }
}

// Of queries: exponents are of 2.
AEROGEL_INLINE float score_factor(const AttendArgs& a) {
  return a.linear ? a.scale : a.scale * kLog2e;
}

// What happens to a score between product and maximum.
struct ScoreRule {
  const AttendArgs* a;
  const Step* step;
  const float* bias;  // of the query tile's tiles, or null
  int64_t base;       // position of the query tile's first row
  float cap;          // softcap in base 2, or 0

  AEROGEL_INLINE ScoreRule(const AttendTask& t, const Step& s, const Columns& columns)
      : a(t.args),
        step(&s),
        bias(t.args->tile_bias ? t.args->tile_bias + t.tile_begin : nullptr),
        base(columns.base),
        cap(t.args->softcap * kLog2e) {}
  AEROGEL_INLINE bool plain() const { return !bias && cap == 0.0f && !step->edge; }
};

struct StepRows {
  const float* keys[kStepKeys];
  const float* values[kStepKeys];
};

// Scores of R keys into rows of `to`, as they come out of the product.
template <int R, int W>
AEROGEL_NOINLINE void score_tile(const float* queries, const float* const* keys, int64_t first,
                                 int64_t dim, int64_t width, float* to) {
  const float* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = keys[first + r];
  Vec sums[R][W];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < W; ++v) sums[r][v] = zero();
  }
  multiply<R, W>(sums, [&rows](int64_t d, int r) { return rows[r][d]; }, queries, width, dim);
  to += first * width;
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < W; ++v) store(to + r * width + v * kLanes, sums[r][v]);
  }
}

template <int W>
AEROGEL_NOINLINE void score_step(const AttendPanel& p, const StepRows& rows, const Leads& leads,
                                 int64_t dim, const Ahead& ahead, float* scores) {
  for_leads<W>(leads, [&](auto lead, int64_t begin, int64_t end) {
    constexpr int L = decltype(lead)::value;
    for_rows(end - begin, [&](auto size, int64_t first) {
      constexpr int R = decltype(size)::value;
      ahead.fetch(begin + first, R, end);
      score_tile<R, W - L>(p.queries + L * kLanes, rows.keys, begin + first, dim, W * kLanes,
                           scores + L * kLanes);
    });
  });
}

// What the rule makes of a step's scores. `slopes` gets that of the cap, if it is not null.
template <int W>
AEROGEL_NOINLINE void rule_step(const AttendPanel& p, const ScoreRule& rule, int64_t count,
                                float* scores, float* slopes) {
  const Step& s = *rule.step;
  const Vec none = broadcast(-kInfinity);
  if (rule.bias) {
    for (int64_t j = 0; j < count; ++j) {
      const Vec bias = broadcast(rule.bias[s.tiles[j]] * kLog2e);
      float* const row = scores + j * W * kLanes;
      for (int v = 0; v < W; ++v) store(row + v * kLanes, add(load(row + v * kLanes), bias));
    }
  }
  if (rule.cap != 0.0f) {
    const Vec cap = broadcast(rule.cap);
    for (int64_t i = 0; i < count * W * kLanes; i += kLanes) {
      const Vec bent = tanh(div(load(scores + i), cap));
      store(scores + i, mul(cap, bent));
      if (slopes) store(slopes + i, sub(broadcast(1.0f), mul(bent, bent)));
    }
  }
  if (s.edge && rule.a->causal) {
    Vec position[W];
    for (int v = 0; v < W; ++v) position[v] = load(p.position + v * kLanes);
    for (int64_t j = 0; j < count; ++j) {
      const Vec key = broadcast(static_cast<float>(s.keys[j] - rule.base));
      float* const row = scores + j * W * kLanes;
#pragma GCC unroll 4
      for (int v = 0; v < W; ++v) {
        float* const at = row + v * kLanes;
        store(at, select_nonnegative(sub(position[v], key), load(at), none));
      }
    }
  }
  if (s.window) {
    Vec lower[W];
    for (int v = 0; v < W; ++v) lower[v] = load(p.lower + v * kLanes);
    for (int64_t j = 0; j < count; ++j) {
      const Vec key = broadcast(static_cast<float>(s.keys[j] - rule.base));
      float* const row = scores + j * W * kLanes;
#pragma GCC unroll 4
      for (int v = 0; v < W; ++v) {
        float* const at = row + v * kLanes;
        store(at, select_nonnegative(sub(key, lower[v]), load(at), none));
      }
    }
  }
}

// Scores become probabilities, not yet divided by their total; `factor` is what the new maxima make
// of what was summed before.
template <int W>
AEROGEL_NOINLINE void exponentiate(const AttendPanel& p, float* factor, float* scores,
                                   int64_t count) {
  Vec shift[W], total[W];
#pragma GCC unroll 4
  for (int v = 0; v < W; ++v) shift[v] = load(p.maximum + v * kLanes);
  for (int64_t j = 0; j < count; ++j) {
#pragma GCC unroll 4
    for (int v = 0; v < W; ++v) shift[v] = max(load(scores + (j * W + v) * kLanes), shift[v]);
  }
#pragma GCC unroll 4
  for (int v = 0; v < W; ++v) {
    const Vec before = load(p.maximum + v * kLanes);
    store(p.maximum + v * kLanes, shift[v]);
    shift[v] = shift_of(shift[v]);
    const Vec f = exp2_or_zero(sub(before, shift[v]));
    store(factor + v * kLanes, f);
    total[v] = mul(load(p.total + v * kLanes), f);
  }
  for (int64_t j = 0; j < count; ++j, scores += W * kLanes) {
#pragma GCC unroll 4
    for (int v = 0; v < W; ++v) {
      const Vec e = exp2_or_zero(sub(load(scores + v * kLanes), shift[v]));
      total[v] = add(total[v], e);
      store(scores + v * kLanes, e);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < W; ++v) store(p.total + v * kLanes, total[v]);
}

// Scores are the weights themselves, 0 where the rule let none; they are added up.
template <int W>
AEROGEL_NOINLINE void weigh_linearly(float* total, float* scores, int64_t count) {
  for (int64_t j = 0; j < count; ++j, scores += W * kLanes) {
    for (int v = 0; v < W; ++v) {
      const Vec score = load(scores + v * kLanes);
      const Vec weight = select_nonnegative(add(score, broadcast(__FLT_MAX__)), score, zero());
      store(scores + v * kLanes, weight);
      if (total) store(total + v * kLanes, add(load(total + v * kLanes), weight));
    }
  }
}

AEROGEL_INLINE void begin_hashes(const AttendTask& t, const Columns& columns, const AttendPanel& p) {
  const AttendArgs& a = *t.args;
  const uint32_t batch = mixed(a.seed, static_cast<uint32_t>(t.batch));
  auto* const hash = reinterpret_cast<uint32_t*>(p.hash);
  for (int64_t c = 0; c < p.width * kLanes; ++c) {
    const int64_t column = p.first + least(c, p.count - 1);
    hash[c] = mixed(mixed(batch, static_cast<uint32_t>(columns.head(t, column))),
                    static_cast<uint32_t>(columns.query(column)));
  }
}

// Factors of the weights: 0 for pairs that are dropped.
AEROGEL_NOINLINE void drop_factors(const AttendArgs& a, const AttendPanel& p, const Step& s,
                                   int64_t count, float* factors) {
  const int64_t width = p.width * kLanes;
  const auto* const hash = reinterpret_cast<const uint32_t*>(p.hash);
  const uint32_t below = a.drop_below;
  const float kept = a.kept_factor;
  for (int64_t j = 0; j < count; ++j, factors += width) {
    const uint32_t key = static_cast<uint32_t>(s.keys[j]);
    for (int64_t c = 0; c < width; ++c) factors[c] = mixed(hash[c], key) < below ? 0.0f : kept;
  }
}

AEROGEL_INLINE void multiply_by(float* x, const float* factors, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) store(x + i, mul(load(x + i), load(factors + i)));
}

// sums[d] = sums[d] * factor + the sum over keys of rows[key][d] * right[key], for R dimensions.
template <int R, int W>
AEROGEL_NOINLINE void sum_tile(float* sums, const float* factor, const float* const* rows,
                               int64_t first, const float* right, int64_t width, int64_t count) {
  float* const kept = sums + first * width;
  Vec tile[R][W];
  for (int v = 0; v < W; ++v) {
    const Vec f = factor ? load(factor + v * kLanes) : broadcast(1.0f);
    for (int r = 0; r < R; ++r) tile[r][v] = mul(f, load(kept + r * width + v * kLanes));
  }
  for (int64_t j = 0; j < count; ++j, right += width) {
    const float* const row = rows[j] + first;
    Vec x[W];
#pragma GCC unroll 4
    for (int v = 0; v < W; ++v) x[v] = load(right + v * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const Vec w = broadcast(row[r]);
#pragma GCC unroll 4
      for (int v = 0; v < W; ++v) tile[r][v] = fma(w, x[v], tile[r][v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < W; ++v) store(kept + r * width + v * kLanes, tile[r][v]);
  }
}

// sums = sums * factor + rows^T right, for all dimensions; vectors that no key needs stay.
template <int W>
AEROGEL_NOINLINE void sum_step(float* sums, const float* factor, const float* const* rows,
                               const Leads& leads, int64_t dim, const Ahead& ahead,
                               const float* right) {
  for_leads<W>(leads, [&](auto lead, int64_t begin, int64_t end) {
    constexpr int L = decltype(lead)::value;
    for_rows(dim, [&](auto size, int64_t first) {
      constexpr int R = decltype(size)::value;
      if (end == leads.live(W)) ahead.fetch(first, R, dim);
      sum_tile<R, W - L>(sums + L * kLanes, factor ? factor + L * kLanes : nullptr, rows + begin,
                         first, right + begin * W * kLanes + L * kLanes, W * kLanes, end - begin);
    });
    factor = nullptr;  // the vectors that are left have had theirs
  });
}

// Scratch of one step: scores [key][width], and the panel's factors.
struct StepScratch {
  float *scores, *factor, *kept;
};

// Keys in ascending order are cut for each vector; anything else needs all vectors.
AEROGEL_INLINE Leads leads_of(const AttendPanel& p, const ScoreRule& rule) {
  const Step& s = *rule.step;
  Leads leads{};
  bool cut = s.edge && rule.a->causal && !rule.bias && rule.cap == 0.0f;
  for (int64_t j = 1; cut && j < s.count; ++j) cut = s.keys[j] > s.keys[j - 1];
  int64_t end = 0;
  for (int v = 0; v < p.width; ++v) {
    if (!cut) end = s.count;
    while (end < s.count && static_cast<float>(s.keys[end] - rule.base) <= p.reach[v]) ++end;
    leads.bounds[v] = end;
  }
  return leads;
}

template <int W>
AEROGEL_INLINE void attend_step(const AttendArgs& a, const AttendPanel& p, const ScoreRule& rule,
                                const StepRows& rows, const Ahead& keys, const Ahead& values,
                                const StepScratch& scratch) {
  const Leads leads = leads_of(p, rule);
  const int64_t count = leads.live(W);
  score_step<W>(p, rows, leads, a.dim, keys, scratch.scores);
  if (!rule.plain()) rule_step<W>(p, rule, count, scratch.scores, nullptr);
  if (a.linear) {
    weigh_linearly<W>(p.total, scratch.scores, count);
  } else {
    exponentiate<W>(p, scratch.factor, scratch.scores, count);
  }
  if (a.drop_below) {
    drop_factors(a, p, *rule.step, count, scratch.kept);
    multiply_by(scratch.scores, scratch.kept, count * W * kLanes);
  }
  sum_step<W>(p.sums, a.linear ? nullptr : scratch.factor, rows.values, leads, a.value_dim, values, scratch.scores);
}

AEROGEL_INLINE void set_limits(const AttendTask& t, const Columns& columns, AttendPanel& p) {
  float last = 0.0f;
  for (int v = 0; v < p.width; ++v) {
    for (int64_t c = v * kLanes; c < (v + 1) * kLanes; ++c) {
      columns.limits(t, p.first + least(c, p.count - 1), p.position + c, p.lower + c);
      last = p.position[c] > last ? p.position[c] : last;
    }
    p.reach[v] = last;
  }
}

AEROGEL_INLINE void begin_panel(const AttendTask& t, const Columns& columns, AttendPanel& p) {
  const int64_t width = p.width * kLanes;
  set_limits(t, columns, p);
  for (int64_t c = 0; c < width; ++c) {
    p.maximum[c] = -kInfinity;
    p.total[c] = 0.0f;
  }
  for (int64_t i = 0; i < t.args->value_dim * width; ++i) p.sums[i] = 0.0f;
  if (t.args->drop_below) begin_hashes(t, columns, p);
}

// What one part of a list leaves: maxima, totals and sums of this panel's columns.
AEROGEL_NOINLINE void put_part(const AttendTask& t, const AttendPanel& p, float* scratch) {
  const int64_t dim = t.args->value_dim, width = p.width * kLanes, stride = padded_dim(dim);
  transpose(p.sums, width, scratch, stride, dim, width);
  for (int64_t c = 0; c < p.count; ++c) {
    t.part[p.first + c] = p.maximum[c];
    t.part[t.part_columns + p.first + c] = p.total[c];
    float* const sums = t.part + 2 * t.part_columns + (p.first + c) * stride;
    for (int64_t d = 0; d < dim; ++d) sums[d] = scratch[c * stride + d];
  }
}

AEROGEL_INLINE void end_panel(const AttendTask& t, const Columns& columns, const AttendPanel& p,
                              float* factor, float* scratch) {
  const AttendArgs& a = *t.args;
  if (t.part) return put_part(t, p, scratch);
  for (int64_t c = 0; c < p.width * kLanes; ++c) {
    factor[c] = 0.0f;
    if (c >= p.count) continue;
    const int64_t head = columns.head(t, p.first + c);
    float* const lse = lse_of(a, t.batch, head, columns.query(p.first + c));
    if (a.linear) {
      factor[c] = 1.0f;
      *lse = p.total[c];
    } else {
      factor[c] = finish_total(a, head, p.maximum[c], p.total[c], lse);
    }
  }
  put_columns(t, columns, p, p.sums, factor, a.value_dim, a.o, scratch);
}

constexpr int64_t kMostPanels = 64;  // of a task: attention.cpp gives no more columns

void attend_tile(const AttendTask& t) {
  const AttendArgs& a = *t.args;
  const Columns columns(t);
  const int64_t kv_head = t.head / group_of(a);
  StepReader reader(t);
  Step steps[2];
  const HeadRows keys(a, a.k, t.batch, kv_head, a.dim);
  const HeadRows values(a, a.v, t.batch, kv_head, a.value_dim);
  bool more = reader.next(steps[0]);
  if (more) Ahead{keys, &steps[0]}.fetch(0, 1, 1);  // while queries are laid out
  if (more) Ahead{values, &steps[0]}.fetch(0, 1, 1);
  Carver carver{t.scratch};
  const int64_t widest = kWide * kLanes;
  const StepScratch scratch{carver.take(kStepKeys * widest), carver.take(widest),
                            carver.take(kStepKeys * widest)};
  float* const key_copy = carver.take(kStepKeys * padded_dim(a.dim));
  float* const value_copy = carver.take(kStepKeys * padded_dim(a.value_dim));
  float* const row_copy = carver.take(widest * (padded_dim(a.dim) + padded_dim(a.value_dim)));
  AttendPanel panels[kMostPanels];
  const int64_t panel_count = panels_of(columns.count);
  for (int64_t i = 0; i < panel_count; ++i) {
    AttendPanel& p = panels[i];
    cut_panel(columns.count, i, p);
    p.queries = carver.take(p.width * kLanes * a.dim);
    p.sums = carver.take(p.width * kLanes * a.value_dim);
    float** const own[] = {&p.maximum, &p.total, &p.position, &p.lower, &p.hash};
    for (float** row : own) *row = carver.take(p.width * kLanes);
    take_columns(t, columns, p, a.q, a.dim, score_factor(a), p.queries, nullptr, row_copy);
    begin_panel(t, columns, p);
  }
  StepRows rows;
  int now = 0;
  for (; more; now ^= 1) {
    const Step& step = steps[now];
    more = reader.next(steps[now ^ 1]);
    const Step* const after = more ? &steps[now ^ 1] : nullptr;
    find_rows(a.type, a.k, t.batch, kv_head, a.dim, step, key_copy, rows.keys);
    find_rows(a.type, a.v, t.batch, kv_head, a.value_dim, step, value_copy, rows.values);
    const ScoreRule rule(t, step, columns);
    for (int64_t i = 0; i < panel_count; ++i) {
      const Step* const wanted = i == 0 ? after : nullptr;
      for_width(panels[i].width, [&](auto width) {
        attend_step<decltype(width)::value>(a, panels[i], rule, rows, {keys, wanted},
                                            {values, wanted}, scratch);
      });
    }
  }
  for (int64_t i = 0; i < panel_count; ++i) {
    end_panel(t, columns, panels[i], scratch.factor, row_copy);
  }
}

}  // namespace
}  // namespace aerogel::AEROGEL_ISA
