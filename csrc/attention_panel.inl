// Forward for many queries: panels of columns that keep their maxima, totals and sums of values
// while the steps of their query tile go by (Milakov and Gimelshein, arXiv 1805.02867).
//
// Reading order: scores of a step -> probabilities -> sums of values -> one task.

namespace aerogel::AEROGEL_ISA {
namespace {

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
                                 int64_t dim, const PanelAhead& ahead, float* scores) {
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
AEROGEL_NOINLINE void exponentiate(const AttendPanel& p, const Leads& leads, float* factor,
                                   float* scores) {
  Vec shift[W], total[W];
#pragma GCC unroll 4
  for (int v = 0; v < W; ++v) shift[v] = load(p.maximum + v * kLanes);
  for_leads<W>(leads, [&](auto lead, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
#pragma GCC unroll 4
      for (int v = decltype(lead)::value; v < W; ++v) {
        shift[v] = max(load(scores + (j * W + v) * kLanes), shift[v]);
      }
    }
  });
#pragma GCC unroll 4
  for (int v = 0; v < W; ++v) {
    const Vec before = load(p.maximum + v * kLanes);
    store(p.maximum + v * kLanes, shift[v]);
    shift[v] = shift_of(shift[v]);
    const Vec f = exp2_or_zero(sub(before, shift[v]));
    store(factor + v * kLanes, f);
    total[v] = mul(load(p.total + v * kLanes), f);
  }
  for_leads<W>(leads, [&](auto lead, int64_t begin, int64_t end) {
    constexpr int L = decltype(lead)::value;
    for (int64_t j = begin; j < end; ++j) {
      float* const row = scores + j * W * kLanes;
#pragma GCC unroll 4
      for (int v = 0; v < L; ++v) store(row + v * kLanes, zero());
#pragma GCC unroll 4
      for (int v = L; v < W; ++v) {
        const Vec e = exp2_or_zero(sub(load(row + v * kLanes), shift[v]));
        total[v] = add(total[v], e);
        store(row + v * kLanes, e);
      }
    }
  });
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

// sums[r] = sums[r] * factor[r] + the sum over keys of weights[key][r] * rows[key], for R columns and
// W vectors, of which the last may be cut; no factor counts as 1.
template <int R, int W, bool kCut>
AEROGEL_NOINLINE void sum_tile(float* sums, int64_t stride, const float* factor, bool fresh,
                               const float* const* rows, int64_t first, int64_t dim,
                               const float* weights, int64_t width, int64_t count) {
  Vec tile[R][W];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    const Vec f = broadcast(factor ? factor[r] : 1.0f);
#pragma GCC unroll 4
    for (int v = 0; v < W; ++v) {
      tile[r][v] = fresh ? zero() : mul(f, load(sums + r * stride + first + v * kLanes));
    }
  }
  const int64_t rest = dim - first - (W - 1) * kLanes;
  for (int64_t j = 0; j < count; ++j, weights += width) {
    const float* const row = rows[j] + first;
    Vec x[W];
#pragma GCC unroll 4
    for (int v = 0; v < W; ++v) {
      x[v] = kCut && v == W - 1 ? load_n(row + v * kLanes, rest) : load(row + v * kLanes);
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const Vec w = broadcast(weights[r]);
#pragma GCC unroll 4
      for (int v = 0; v < W; ++v) tile[r][v] = fma(w, x[v], tile[r][v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < W; ++v) store(sums + r * stride + first + v * kLanes, tile[r][v]);
  }
}

// sums = sums * factor + weights^T rows for all columns of a panel. Dimensions are cut into tiles of
// about equal width.
AEROGEL_NOINLINE void sum_step(const AttendPanel& p, const float* factor, const float* const* rows,
                               const Leads& leads, int64_t dim, const PanelAhead& ahead,
                               const float* weights) {
  const int64_t stride = padded_dim(dim), width = p.width * kLanes;
  const int64_t vectors = (dim + kLanes - 1) / kLanes, tiles = (vectors + kWide - 1) / kWide;
  for_rows(p.count, [&](auto size, int64_t column) {
    constexpr int R = decltype(size)::value;
    const int64_t count = leads.needed(p.position, column, column + R);
    ahead.fetch(column, R, p.count);
    float* const sums = p.sums + column * stride;
    const float* const own = factor ? factor + column : nullptr;
    int64_t first = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int wide = static_cast<int>((vectors + tile) / tiles);
      for_width(wide, [&](auto vectors_wide) {
        constexpr int W = decltype(vectors_wide)::value;
        if (first + W * kLanes <= dim) {
          sum_tile<R, W, false>(sums, stride, own, p.fresh, rows, first, dim, weights + column, width,
                                count);
        } else {
          sum_tile<R, W, true>(sums, stride, own, p.fresh, rows, first, dim, weights + column, width,
                               count);
        }
      });
      first += wide * kLanes;
    }
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
  if (s.count > 0) {
    leads.run = cut && s.keys[s.count - 1] - s.keys[0] == s.count - 1;
    leads.first_key = static_cast<float>(s.keys[0] - rule.base);
  }
  return leads;
}

template <int W>
AEROGEL_INLINE void attend_step(const AttendArgs& a, AttendPanel& p, const ScoreRule& rule,
                                const StepRows& rows, const PanelAhead& keys, const PanelAhead& values,
                                const StepScratch& scratch) {
  const Leads leads = leads_of(p, rule);
  const int64_t count = leads.live(W);
  score_step<W>(p, rows, leads, a.dim, keys, scratch.scores);
  if (!rule.plain()) rule_step<W>(p, rule, count, scratch.scores, nullptr);
  if (a.linear) {
    weigh_linearly<W>(p.total, scratch.scores, count);
  } else {
    exponentiate<W>(p, leads, scratch.factor, scratch.scores);
  }
  if (a.drop_below) {
    drop_factors(a, p, *rule.step, count, scratch.kept);
    multiply_by(scratch.scores, scratch.kept, count * W * kLanes);
  }
  sum_step(p, a.linear ? nullptr : scratch.factor, rows.values, leads, a.value_dim, values,
           scratch.scores);
  p.fresh = false;
}

AEROGEL_INLINE void set_limits(const AttendTask& t, const Columns& columns, AttendPanel& p) {
  const bool plain = t.heads == 1 && !t.args->window;  // positions count up
  float last = 0.0f;
  for (int v = 0; v < p.width; ++v) {
    for (int64_t c = v * kLanes; c < (v + 1) * kLanes; ++c) {
      const int64_t column = p.first + least(c, p.count - 1);
      if (plain) {
        p.position[c] = static_cast<float>(column);
        p.lower[c] = -kInfinity;
      } else {
        columns.limits(t, column, p.position + c, p.lower + c);
      }
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
  p.fresh = true;
  if (t.args->drop_below) begin_hashes(t, columns, p);
}

// What one part of a list leaves: maxima, totals and sums of this panel's columns.
AEROGEL_NOINLINE void put_part(const AttendTask& t, const AttendPanel& p) {
  const int64_t stride = padded_dim(t.args->value_dim);
  for (int64_t c = 0; c < p.count; ++c) {
    t.part[p.first + c] = p.maximum[c];
    t.part[t.part_columns + p.first + c] = p.total[c];
  }
  float* const sums = t.part + 2 * t.part_columns + p.first * stride;
  for (int64_t i = 0; i < p.count * stride; i += kLanes) {
    store(sums + i, p.fresh ? zero() : load(p.sums + i));
  }
}

AEROGEL_INLINE void end_panel(const AttendTask& t, const Columns& columns, const AttendPanel& p,
                              float* factor) {
  const AttendArgs& a = *t.args;
  if (t.part) return put_part(t, p);
  for (int64_t c = 0; c < p.count; ++c) {
    const int64_t head = columns.head(t, p.first + c);
    float* const lse = lse_of(a, t.batch, head, columns.query(p.first + c));
    if (a.linear) {
      factor[c] = 1.0f;
      *lse = p.total[c];
    } else {
      factor[c] = finish_total(a, head, p.maximum[c], p.total[c], lse);
    }
  }
  put_columns(t, columns, p, factor, a.value_dim, a.o);
}

constexpr int64_t kMostPanels = 64;  // of a task: attention.cpp gives no more columns

// What is fetched during a step.
struct Wanted {
  PanelAhead keys, values;
};

// During the last: where results will go, and the first rows of the task that follows, if there is one.
// Its first step comes to `step`.
AEROGEL_INLINE Wanted wanted_last(const AttendTask& t, Step& step, const HeadRows& keys,
                                  const HeadRows& values) {
  const AttendArgs& a = *t.args;
  Wanted wanted{{keys, nullptr}, {values, nullptr}};
  if (!t.part) wanted.values.queries = QueryRows(t, a.o, a.value_dim);
  if (!t.next) return wanted;
  const AttendTask& next = *t.next;
  const int64_t kv_head = next.head / group_of(a);
  const bool any = StepReader(next).next(step);
  wanted.keys = {HeadRows(a, a.k, next.batch, kv_head, a.dim), any ? &step : nullptr,
                 QueryRows(next, a.q, a.dim)};
  wanted.values.rows = HeadRows(a, a.v, next.batch, kv_head, a.value_dim);
  wanted.values.step = wanted.keys.step;
  return wanted;
}

void attend_tile(const AttendTask& t) {
  const AttendArgs& a = *t.args;
  const Columns columns(t);
  const int64_t kv_head = t.head / group_of(a);
  StepReader reader(t);
  Step steps[2];
  const HeadRows keys(a, a.k, t.batch, kv_head, a.dim);
  const HeadRows values(a, a.v, t.batch, kv_head, a.value_dim);
  bool more = reader.next(steps[0]);
  if (more && !t.fetched) {  // while queries are laid out
    Ahead{keys, &steps[0]}.fetch(0, 1, 1);
    Ahead{values, &steps[0]}.fetch(0, 1, 1);
  }
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
    p.sums = carver.take(p.width * kLanes * padded_dim(a.value_dim));
    float** const own[] = {&p.maximum, &p.total, &p.position, &p.lower, &p.hash};
    for (float** row : own) *row = carver.take(p.width * kLanes);
    const FloatRows queries = find_columns(t, columns, p, a.q, a.dim, row_copy);
    turn_columns(p, queries, a.dim, score_factor(a), p.queries);
    begin_panel(t, columns, p);
  }
  StepRows rows;
  int now = 0;
  for (; more; now ^= 1) {
    const Step& step = steps[now];
    more = reader.next(steps[now ^ 1]);
    const Wanted wanted = more ? Wanted{{keys, &steps[now ^ 1]}, {values, &steps[now ^ 1]}}
                               : wanted_last(t, steps[now ^ 1], keys, values);
    find_rows(a.type, a.k, t.batch, kv_head, a.dim, step, key_copy, rows.keys);
    find_rows(a.type, a.v, t.batch, kv_head, a.value_dim, step, value_copy, rows.values);
    const ScoreRule rule(t, step, columns);
    for (int64_t i = 0; i < panel_count; ++i) {
      const Wanted own = i == 0 ? wanted : Wanted{{keys, nullptr}, {values, nullptr}};
      for_width(panels[i].width, [&](auto width) {
        attend_step<decltype(width)::value>(a, panels[i], rule, rows, own.keys, own.values, scratch);
      });
    }
  }
  for (int64_t i = 0; i < panel_count; ++i) {
    end_panel(t, columns, panels[i], scratch.factor);
  }
}

}  // namespace
}  // namespace aerogel::AEROGEL_ISA
