// Backward: probabilities are computed again from lse, step by step. With p the probabilities, g the
// gradient of the outputs and delta = rowsum(g o) - grad_lse,
//     dv += p^T g,  ds = p (g v^T - delta),  dq += scale ds k,  dk += scale ds^T q
// (Dao et al., arXiv 2205.14135). Dropout multiplies p in dv and g v^T, not p in ds, by the factors it
// had; linear weights have ds = g v^T + grad_lse. Sums for keys go to rows in memory, one query panel
// after the other: whoever calls sees to it that no two tasks at once have keys in common.
//
// Reading order: probabilities -> gradients of scores -> sums for keys -> one task.

namespace aerogel::AEROGEL_ISA {
namespace {

// An AttendPanel and what backward needs besides: gradients of the outputs, and both operands as
// rows [column][padded dim].
struct GradPanel {
  AttendPanel base;  // `sums` holds the gradient of the queries, `total` lse in base 2
  float *grads, *query_copy, *grad_copy, *delta;
  FloatRows query_rows, grad_rows;
};

// Scratch of one step, [key][width] each; slopes only where scores are capped, kept only with dropout.
struct GradScratch {
  float *weights, *grads, *slopes, *kept;
};

// Gradients of scores are made with the scale of the logits in them, unless those of biases, which
// have none, are wanted, too.
AEROGEL_INLINE float grad_factor(const AttendArgs& a) { return a.grad_bias ? 1.0f : a.scale; }

// A panel's rows of x, for products that read whole vectors of them.
AEROGEL_INLINE FloatRows whole_rows(const AttendTask& t, const Columns& columns,
                                    const AttendPanel& p, const AttendTensor& x, int64_t dim,
                                    float* copy) {
  const FloatRows rows = find_columns(t, columns, p, x, dim, copy);
  if (rows.data == copy || dim == padded_dim(dim)) return rows;
  const int64_t stride = padded_dim(dim);
  for (int64_t c = 0; c < p.count; ++c) {
    for (int64_t d = 0; d < stride; d += kLanes) {
      const int64_t left = dim - d;
      store(copy + c * stride + d,
            left > 0 ? load_upto(rows.data + c * rows.stride + d, left) : zero());
    }
  }
  return {copy, stride};
}

// rowsum(g o), of kProducts columns at a time.
AEROGEL_NOINLINE void sum_products(const FloatRows& x, const FloatRows& y, int64_t count,
                                   int64_t dim, float* sums) {
  for (int64_t c = 0; c < count; c += kProducts) {
    Vec products[kProducts];
    for (int i = 0; i < kProducts; ++i) {
      const int64_t row = least(c + i, count - 1);
      products[i] = zero();
      for (int64_t d = 0; d < dim; d += kLanes) {
        const int64_t left = dim - d;
        products[i] = fma(load_upto(x.data + row * x.stride + d, left),
                          load_upto(y.data + row * y.stride + d, left), products[i]);
      }
    }
    float own[kProducts];
    sum_lanes(products, own);
    for (int64_t i = 0; i < least(kProducts, count - c); ++i) sums[c + i] = own[i];
  }
}

AEROGEL_INLINE void begin_grad_panel(const AttendTask& t, const Columns& columns, GradPanel& g,
                                     float* scratch) {
  const AttendArgs& a = *t.args;
  AttendPanel& p = g.base;
  const int64_t width = p.width * kLanes;
  g.query_rows = whole_rows(t, columns, p, a.q, a.dim, g.query_copy);
  g.grad_rows = whole_rows(t, columns, p, a.grad_o, a.value_dim, g.grad_copy);
  turn_columns(p, g.query_rows, a.dim, score_factor(a), p.queries);
  turn_columns(p, g.grad_rows, a.value_dim, grad_factor(a), g.grads);
  set_limits(t, columns, p);
  if (a.drop_below) begin_hashes(t, columns, p);
  for (int64_t c = 0; c < width; ++c) {
    g.delta[c] = 0.0f;
    p.total[c] = kInfinity;
  }
  if (!a.linear) {
    const FloatRows out = find_columns(t, columns, p, a.o, a.value_dim, scratch);
    sum_products(out, g.grad_rows, p.count, a.value_dim, g.delta);
  }
  for (int64_t c = 0; c < p.count; ++c) {
    const int64_t column = p.first + c, head = columns.head(t, column);
    const int64_t at = (t.batch * a.q_heads + head) * a.q_len + columns.query(column);
    if (a.grad_lse) g.delta[c] -= a.grad_lse[at];
    g.delta[c] *= grad_factor(a);
    // A query without keys: every probability is 2^-inf = 0.
    if (!a.linear && a.lse[at] != -kInfinity) p.total[c] = a.lse[at] * kLog2e;
  }
  p.fresh = true;
}

// Scores become probabilities.
template <int W>
AEROGEL_NOINLINE void weigh_step(const AttendPanel& p, const Leads& leads, float* scores) {
  Vec lse[W];
#pragma GCC unroll 4
  for (int v = 0; v < W; ++v) lse[v] = load(p.total + v * kLanes);
  for_leads<W>(leads, [&](auto lead, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
#pragma GCC unroll 4
      for (int v = decltype(lead)::value; v < W; ++v) {
        float* const at = scores + (j * W + v) * kLanes;
        store(at, exp2_or_zero(min(broadcast(126.0f), sub(load(at), lse[v]))));
      }
    }
  });
}

// 1 where the rule allows a pair, 0 where it made its score -inf, for the first `ruled` scores.
AEROGEL_NOINLINE void mark_allowed(const float* scores, float* marks, int64_t ruled, int64_t count) {
  const Vec one = broadcast(1.0f);
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec seen = add(load(scores + i), broadcast(__FLT_MAX__));
    store(marks + i, i < ruled ? select_nonnegative(seen, one, zero()) : one);
  }
}

// Gradients of the scores of R keys; all pointers at the first of W vectors.
template <int R, int W>
AEROGEL_NOINLINE void grad_tile(const AttendArgs& a, const float* grads, const float* delta,
                                const float* const* values, int64_t first, int64_t dim,
                                int64_t width, const GradScratch& scratch) {
  const float* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = values[first + r];
  Vec sums[R][W];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < W; ++v) sums[r][v] = zero();
  }
  multiply<R, W>(sums, [&rows](int64_t d, int r) { return rows[r][d]; }, grads, width, dim);
#pragma GCC unroll 4
  for (int v = 0; v < W; ++v) {
    const Vec shift = load(delta + v * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const int64_t own = (first + r) * width + v * kLanes;
      Vec grad = sums[r][v];
      if (a.drop_below) grad = mul(grad, load(scratch.kept + own));
      grad = sub(grad, shift);
      if (!a.linear) grad = mul(load(scratch.weights + own), grad);
      if (a.linear || a.softcap != 0.0f) grad = mul(grad, load(scratch.slopes + own));
      store(scratch.grads + own, grad);
    }
  }
}

// Adds sum over columns of left[key][column] * rows[column] to W vectors of R keys' sums.
// `fresh` ones are begun.
template <int R, int W>
AEROGEL_NOINLINE void key_tile(const float* left, int64_t width, const float* rows, int64_t stride,
                               int64_t columns, bool fresh, float* const* to, int64_t first) {
  Vec sums[R][W];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < W; ++v) sums[r][v] = fresh ? zero() : load(to[r] + first + v * kLanes);
  }
  multiply<R, W>(sums, [left, width](int64_t c, int r) { return left[r * width + c]; },
                 rows + first, stride, columns);
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < W; ++v) store(to[r] + first + v * kLanes, sums[r][v]);
  }
}

// to[key] += sum over columns of left[key][column] * rows[column], for keys [begin, end); those not
// seen before start at zero.
AEROGEL_NOINLINE void sum_for_keys(const Step& s, int64_t begin, int64_t end, const float* left,
                                   int64_t width, const FloatRows& rows, int64_t dim,
                                   int64_t columns, const PanelAhead& ahead, const uint8_t* seen,
                                   float* to) {
  const int64_t stride = padded_dim(dim);
  for_rows(end - begin, [&](auto size, int64_t first) {
    constexpr int R = decltype(size)::value;
    ahead.fetch(begin + first, R, end);
    float* targets[R];
    int begun = 0;
    for (int r = 0; r < R; ++r) {
      targets[r] = to + s.keys[begin + first + r] * stride;
      begun += seen[s.keys[begin + first + r]];
    }
    for (int r = 0; begun > 0 && begun < R && r < R; ++r) {
      if (seen[s.keys[begin + first + r]]) continue;
      for (int64_t d = 0; d < stride; d += kLanes) store(targets[r] + d, zero());
    }
    const float* const own = left + (begin + first) * width;
    int64_t d = 0;
    for (; d + kWide * kLanes <= stride; d += kWide * kLanes) {
      key_tile<R, kWide>(own, width, rows.data, rows.stride, columns, begun == 0, targets,
                         d);
    }
    for (; d < stride; d += kLanes) {
      key_tile<R, 1>(own, width, rows.data, rows.stride, columns, begun == 0, targets, d);
    }
  });
}

AEROGEL_INLINE void scale_by(float* x, float factor, int64_t count) {
  const Vec by = broadcast(factor);
  for (int64_t i = 0; i < count; i += kLanes) store(x + i, mul(load(x + i), by));
}

AEROGEL_NOINLINE void sum_for_bias(const AttendTask& t, const Step& s, const float* grads,
                                   int64_t width, int64_t columns) {
  float* const to = t.args->grad_bias + t.bias_copy * t.args->tiles + t.tile_begin;
  for (int64_t j = 0; j < s.count; ++j) {
    const float* const row = grads + j * width;
    float sum = 0.0f;
    for (int64_t c = 0; c < columns; ++c) sum += row[c];
    to[s.tiles[j]] += sum;
  }
}

// What is fetched during a step: rows of keys and values, and of their gradients.
struct GradWanted {
  PanelAhead keys, values, grad_k, grad_v;
};

// `step` is the next of this task if there are `more`; else it becomes the first of the task that
// follows, and its queries, gradients and outputs are fetched, too.
AEROGEL_INLINE GradWanted grad_wanted(const AttendTask& t, bool more, Step& step,
                                      const HeadRows& keys, const HeadRows& values) {
  const AttendArgs& a = *t.args;
  const int64_t dim = padded_dim(a.dim), value_dim = padded_dim(a.value_dim);
  const int64_t at = (t.batch * a.kv_heads + t.head / group_of(a)) * a.k_len;
  const bool any = more || (t.next && StepReader(*t.next).next(step));
  const Step* const after = any ? &step : nullptr;
  const auto row = [&](float* grads, int64_t width) {
    return HeadRows(reinterpret_cast<const char*>(grads + at * width), 4 * width);
  };
  GradWanted wanted{{keys, after},
                    {values, after},
                    {row(a.grad_k, dim), t.grad_kv ? after : nullptr},
                    {row(a.grad_v, value_dim), t.grad_kv ? after : nullptr}};
  if (!more && t.grad_q) wanted.grad_v.queries = QueryRows(t, a.grad_q, a.dim);
  if (more || !t.next) return wanted;
  wanted.keys.queries = QueryRows(*t.next, a.q, a.dim);
  wanted.values.queries = QueryRows(*t.next, a.grad_o, a.value_dim);
  if (!a.linear) wanted.grad_k.queries = QueryRows(*t.next, a.o, a.value_dim);
  return wanted;
}

template <int W>
AEROGEL_INLINE void backward_step(const AttendTask& t, GradPanel& g, const ScoreRule& rule,
                                  const StepRows& rows, const GradWanted& wanted,
                                  const GradScratch& scratch) {
  const AttendArgs& a = *t.args;
  const Step& s = *rule.step;
  const Leads leads = leads_of(g.base, rule);
  const int64_t count = leads.live(W), width = W * kLanes;
  score_step<W>(g.base, rows, leads, a.dim, wanted.keys, scratch.weights);
  if (!rule.plain()) rule_step<W>(g.base, rule, count, scratch.weights, scratch.slopes);
  if (a.linear) {
    mark_allowed(scratch.weights, scratch.slopes, rule.plain() ? 0 : count * width, count * width);
    weigh_linearly<W>(nullptr, scratch.weights, count);
  } else {
    weigh_step<W>(g.base, leads, scratch.weights);
  }
  if (a.drop_below) drop_factors(a, g.base, s, count, scratch.kept);
  for_leads<W>(leads, [&](auto lead, int64_t begin, int64_t end) {
    constexpr int64_t L = decltype(lead)::value * kLanes;
    for (int64_t j = begin; L > 0 && j < end; ++j) {
      for (int64_t c = 0; c < L; c += kLanes) store(scratch.grads + j * width + c, zero());
    }
    for_rows(end - begin, [&](auto size, int64_t first) {
      constexpr int R = decltype(size)::value;
      wanted.values.fetch(begin + first, R, end);
      grad_tile<R, W - decltype(lead)::value>(
          a, g.grads + L, g.delta + L, rows.values, begin + first, a.value_dim, width,
          {scratch.weights + L, scratch.grads + L, scratch.slopes + L, scratch.kept + L});
    });
  });
  if (a.grad_bias) {
    if (t.grad_q) sum_for_bias(t, s, scratch.grads, width, g.base.count);
    scale_by(scratch.grads, a.scale, count * width);
  }
  if (t.grad_q) {
    sum_step(g.base, nullptr, rows.keys, leads, a.dim, wanted.grad_k, scratch.grads);
    g.base.fresh = false;
  }
  if (!t.grad_kv) return;
  if (a.drop_below) multiply_by(scratch.weights, scratch.kept, count * width);
  const int64_t at = (t.batch * a.kv_heads + t.head / group_of(a)) * a.k_len;
  for_leads<W>(leads, [&](auto lead, int64_t begin, int64_t end) {
    const int64_t first = decltype(lead)::value * kLanes, columns = g.base.count - first;
    sum_for_keys(s, begin, end, scratch.weights + first, width,
                 g.grad_rows.from(first), a.value_dim, columns, wanted.grad_v, t.seen,
                 a.grad_v + at * padded_dim(a.value_dim));
    sum_for_keys(s, begin, end, scratch.grads + first, width,
                 g.query_rows.from(first), a.dim, columns, {wanted.keys.rows, nullptr}, t.seen,
                 a.grad_k + at * padded_dim(a.dim));
  });
  for (int64_t j = 0; j < count; ++j) t.seen[s.keys[j]] = 1;
}

void attend_tile_backward(const AttendTask& t) {
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
  GradScratch scratch{};
  float** const arrays[] = {&scratch.weights, &scratch.grads, &scratch.slopes, &scratch.kept};
  for (float** array : arrays) *array = carver.take(kStepKeys * widest);
  float* const key_copy = carver.take(kStepKeys * padded_dim(a.dim));
  float* const value_copy = carver.take(kStepKeys * padded_dim(a.value_dim));
  float* const row_copy = carver.take(widest * (padded_dim(a.dim) + padded_dim(a.value_dim)));
  GradPanel panels[kMostPanels];
  const int64_t panel_count = panels_of(columns.count);
  for (int64_t i = 0; i < panel_count; ++i) {
    GradPanel& g = panels[i];
    AttendPanel& p = g.base;
    cut_panel(columns.count, i, p);
    const int64_t width = p.width * kLanes;
    p.queries = carver.take(width * a.dim);
    p.sums = carver.take(width * padded_dim(a.dim));
    g.query_copy = carver.take(width * padded_dim(a.dim));
    g.grads = carver.take(width * a.value_dim);
    g.grad_copy = carver.take(width * padded_dim(a.value_dim));
    float** const own[] = {&p.maximum, &p.total, &p.position, &p.lower, &g.delta, &p.hash};
    for (float** row : own) *row = carver.take(width);
    begin_grad_panel(t, columns, g, row_copy);
  }
  StepRows rows;
  int now = 0;
  for (; more; now ^= 1) {
    const Step& step = steps[now];
    more = reader.next(steps[now ^ 1]);
    const GradWanted wanted = grad_wanted(t, more, steps[now ^ 1], keys, values);
    const GradWanted nothing{{keys, nullptr}, {values, nullptr}, {keys, nullptr}, {values, nullptr}};
    find_rows(a.type, a.k, t.batch, kv_head, a.dim, step, key_copy, rows.keys);
    find_rows(a.type, a.v, t.batch, kv_head, a.value_dim, step, value_copy, rows.values);
    const ScoreRule rule(t, step, columns);
    for (int64_t i = 0; i < panel_count; ++i) {
      for_width(panels[i].base.width, [&](auto width) {
        backward_step<decltype(width)::value>(t, panels[i], rule, rows, i == 0 ? wanted : nothing,
                                              scratch);
      });
    }
  }
  for (int64_t i = 0; t.grad_q && i < panel_count; ++i) {
    AttendPanel& p = panels[i].base;
    for (int64_t c = 0; c < p.width * kLanes; ++c) p.maximum[c] = 1.0f;
    put_columns(t, columns, p, p.maximum, a.dim, a.grad_q);
  }
}

}  // namespace
}  // namespace aerogel::AEROGEL_ISA
