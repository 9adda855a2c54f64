// Layer normalisation down the rows of planes, some vectors of columns at a time. Mean and variance
// come from one walk: the rows are taken in short runs, which are still in the first cache when
// their deviations from their own mean are summed, and runs are merged as Chan, Golub and LeVeque do
// ("Algorithms for computing the sample variance", 1983). Nothing cancels, whatever the mean.

namespace aerogel::AEROGEL_ISA {
namespace {

constexpr int64_t kNormRun = 16;
constexpr int kNormVectors = 4;

template <int V>
struct Moments {
  Vec mean[V], squares[V];
};

// Means of one run of rows and the squared deviations from them.
template <int V>
AEROGEL_INLINE Moments<V> moments_of_run(const float* x, int64_t ldx, int64_t rows) {
  Moments<V> m;
  for (int v = 0; v < V; ++v) m.mean[v] = m.squares[v] = zero();
  const float* row = x;
  for (int64_t r = 0; r < rows; ++r, row += ldx) {
    for (int v = 0; v < V; ++v) m.mean[v] = add(m.mean[v], load(row + v * kLanes));
  }
  const Vec share = broadcast(1.0f / static_cast<float>(rows));
  for (int v = 0; v < V; ++v) m.mean[v] = mul(m.mean[v], share);
  row = x;
  for (int64_t r = 0; r < rows; ++r, row += ldx) {
    for (int v = 0; v < V; ++v) {
      const Vec off = sub(load(row + v * kLanes), m.mean[v]);
      m.squares[v] = fma(off, off, m.squares[v]);
    }
  }
  return m;
}

template <int V>
AEROGEL_INLINE Moments<V> moments_of_column(const float* x, int64_t ldx, int64_t rows) {
  Moments<V> all = moments_of_run<V>(x, ldx, smaller(kNormRun, rows));
  for (int64_t seen = kNormRun; seen < rows; seen += kNormRun) {
    const int64_t count = smaller(kNormRun, rows - seen);
    const Moments<V> run = moments_of_run<V>(x + seen * ldx, ldx, count);
    const float share = static_cast<float>(count) / static_cast<float>(seen + count);
    const Vec of_mean = broadcast(share);
    const Vec of_squares = broadcast(share * static_cast<float>(seen));
    for (int v = 0; v < V; ++v) {
      const Vec off = sub(run.mean[v], all.mean[v]);
      all.mean[v] = fma(off, of_mean, all.mean[v]);
      all.squares[v] = add(all.squares[v], fma(mul(off, off), of_squares, run.squares[v]));
    }
  }
  return all;
}

template <int V>
AEROGEL_NOINLINE void norm_columns(const NormArgs& a, int64_t column) {
  const float* x = a.x + column;
  float* y = a.y + column;
  const Moments<V> m = moments_of_column<V>(x, a.ldx, a.features);
  const Vec share = broadcast(1.0f / static_cast<float>(a.features));
  Vec factor[V];
  for (int v = 0; v < V; ++v) {
    const Vec variance = fma(m.squares[v], share, broadcast(a.epsilon));
    factor[v] = div(broadcast(1.0f), sqrt(variance));
  }
  for (int64_t f = 0; f < a.features; ++f, x += a.ldx, y += a.ldy) {
    const Vec weight = broadcast(a.weight[f]), bias = broadcast(a.bias[f]);
    for (int v = 0; v < V; ++v) {
      const Vec off = mul(sub(load(x + v * kLanes), m.mean[v]), factor[v]);
      store(y + v * kLanes, fma(off, weight, bias));
    }
  }
}

float sum_of(const float* x, int64_t count, Vec shift, bool squared) {
  Vec sum = zero();
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vec off = sub(load(x + i), shift);
    sum = squared ? fma(off, off, sum) : add(sum, off);
  }
  float total = sum_lanes(sum), lanes[kLanes];
  store(lanes, shift);
  for (; i < count; ++i) {
    const float off = x[i] - lanes[0];
    total += squared ? off * off : off;
  }
  return total;
}

// A single column: its features lie side by side.
void norm_vector(const NormArgs& a) {
  const int64_t n = a.features;
  const float share = 1.0f / static_cast<float>(n);
  const Vec mean = broadcast(share * sum_of(a.x, n, zero(), false));
  const Vec variance = broadcast(share * sum_of(a.x, n, mean, true) + a.epsilon);
  const Vec factor = div(broadcast(1.0f), sqrt(variance));
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec off = mul(sub(load_upto(a.x + i, n - i), mean), factor);
    const Vec y = fma(off, load_upto(a.weight + i, n - i), load_upto(a.bias + i, n - i));
    store_upto(a.y + i, y, n - i);
  }
}

void layer_norm(const NormArgs& args, int64_t first, int64_t last) {
  if (args.ldx == 1 && args.ldy == 1) return norm_vector(args);
  int64_t column = first;
  for (; column + kNormVectors * kLanes <= last; column += kNormVectors * kLanes) {
    norm_columns<kNormVectors>(args, column);
  }
  for (; column < last; column += kLanes) norm_columns<1>(args, column);
}

}  // namespace
}  // namespace aerogel::AEROGEL_ISA
