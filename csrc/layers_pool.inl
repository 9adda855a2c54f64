// Max and average pooling: taps of one window column are combined over whole input rows first, then
// the columns of each window.

namespace aerogel::AEROGEL_ISA {
namespace {

constexpr int kUsualTaps = 3;        // of a window's column or row: loops that are unrolled
constexpr int64_t kPoolSpan = 2048;  // input columns combined at a time, on the stack

template <bool kMax>
AEROGEL_INLINE Vec pool_combine(Vec acc, Vec x) {
  return kMax ? max_or_nan(acc, x) : add(acc, x);
}

template <bool kMax>
AEROGEL_INLINE Vec pool_nothing() {
  return broadcast(kMax ? -__builtin_inff() : 0.0f);
}

// row[i] = combination of x[i + tap * step]. kTaps: how many, or 0 for any number.
template <bool kMax, int kTaps>
AEROGEL_INLINE void combine_rows(const float* x, int64_t step, int64_t taps, int64_t count,
                                 float* row) {
  if (kTaps) taps = kTaps;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Vec v = pool_nothing<kMax>();
    for (int64_t tap = 0; tap < taps; ++tap) v = pool_combine<kMax>(v, load(x + tap * step + i));
    store(row + i, v);
  }
  if (i == count) return;
  Vec v = pool_nothing<kMax>();
  for (int64_t tap = 0; tap < taps; ++tap) {
    v = pool_combine<kMax>(v, load_n(x + tap * step + i, count - i));
  }
  store(row + i, v);
}

// row[i] = combination of the valid window rows of output row oy at input columns from + i, i < count.
template <bool kMax>
AEROGEL_INLINE void pool_rows(const PoolArgs& a, const float* plane, int64_t oy, int64_t from,
                              int64_t count, float* row) {
  const Window& w = a.window;
  int64_t first = 0, last = w.kernel_h;
  while (first < last && (oy < a.taps_y[first].first || oy >= a.taps_y[first].last)) ++first;
  while (first < last && (oy < a.taps_y[last - 1].first || oy >= a.taps_y[last - 1].last)) --last;
  const float* x = plane + (oy * w.stride_h - w.pad_h + first * w.dilation_h) * w.in_w + from;
  const int64_t step = w.dilation_h * w.in_w, taps = last - first;
  taps == kUsualTaps ? combine_rows<kMax, kUsualTaps>(x, step, taps, count, row)
                     : combine_rows<kMax, 0>(x, step, taps, count, row);
}

// Up to kLanes of `left` floats, so far apart. kStride: 1, 2 or any; of one or two, whole vectors are read.
template <int kStride>
AEROGEL_INLINE Vec load_apart(const float* from, int64_t stride, int64_t left) {
  if (kStride == 1) return load(from);
  if (kStride == 2) return split_order(even_of(load(from), load(from + kLanes)));
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < smaller(left, kLanes); ++i) lanes[i] = from[i * stride];
  return load(lanes);
}

// y[i] = combination of row[i * stride + tap * dilation] over the taps of a window, i < count.
template <bool kMax, int kStride, int kTaps>
AEROGEL_INLINE void pool_columns(const Window& w, const float* row, int64_t count, float* y) {
  const int64_t taps = kTaps ? kTaps : w.kernel_w;
  for (int64_t i = 0; i < count; i += kLanes) {
    const float* x = row + i * w.stride_w;
    Vec v = pool_nothing<kMax>();
    for (int64_t kx = 0; kx < taps; ++kx, x += w.dilation_w) {
      v = pool_combine<kMax>(v, load_apart<kStride>(x, w.stride_w, count - i));
    }
    store_upto(y + i, v, count - i);
  }
}

AEROGEL_INLINE void fill_span(float* to, int64_t count, Vec v) {
  for (int64_t i = 0; i < count; i += kLanes) store_upto(to + i, v, count - i);
}

// torch's divisor: the window cut at the padded (or at the bare) plane.
AEROGEL_INLINE int64_t pool_extent(int64_t o, int64_t stride, int64_t pad, int64_t kernel,
                                   int64_t in, bool count_pad) {
  const int64_t begin = o * stride - pad;
  const int64_t end = smaller(begin + kernel, in + pad);
  if (count_pad) return end - begin;
  return smaller(end, in) - larger(begin, 0);
}

// The padding of a row takes no part in any window.
template <bool kMax, int kStride>
void pool_plane(const PoolArgs& a, const float* x, float* y, int64_t first_row, int64_t last_row) {
  const Window& w = a.window;
  const int64_t reach = (w.kernel_w - 1) * w.dilation_w + 1;
  const int64_t chunk = larger(1, (kPoolSpan - reach) / w.stride_w + 1);
  float row[kPoolSpan + 2 * kLanes];
  y += first_row * w.out_w;
  for (int64_t oy = first_row; oy < last_row; ++oy, y += w.out_w) {
    for (int64_t ox0 = 0; ox0 < w.out_w; ox0 += chunk) {
      const int64_t ox1 = smaller(ox0 + chunk, w.out_w);
      const int64_t from = ox0 * w.stride_w - w.pad_w;
      const int64_t width = (ox1 - ox0 - 1) * w.stride_w + reach;
      const int64_t begin = smaller(width, larger(0, -from));
      const int64_t end = larger(begin, smaller(width, w.in_w - from));
      fill_span(row, begin, pool_nothing<kMax>());
      pool_rows<kMax>(a, x, oy, from + begin, end - begin, row + begin);
      fill_span(row + end, width - end, pool_nothing<kMax>());
      w.kernel_w == kUsualTaps ? pool_columns<kMax, kStride, kUsualTaps>(w, row, ox1 - ox0, y + ox0)
                               : pool_columns<kMax, kStride, 0>(w, row, ox1 - ox0, y + ox0);
    }
    if (kMax) continue;
    const bool count_pad = a.kind == Pool::kAverage;
    const int64_t rows = pool_extent(oy, w.stride_h, w.pad_h, w.kernel_h, w.in_h, count_pad);
    for (int64_t ox = 0; ox < w.out_w; ++ox) {
      const int64_t columns = pool_extent(ox, w.stride_w, w.pad_w, w.kernel_w, w.in_w, count_pad);
      y[ox] /= static_cast<float>(rows * columns);
    }
  }
}

template <bool kMax>
AEROGEL_INLINE auto pool_plane_of(const Window& w) {
  return w.stride_w == 1   ? &pool_plane<kMax, 1>
         : w.stride_w == 2 ? &pool_plane<kMax, 2>
                           : &pool_plane<kMax, 0>;
}

void pool_channels(const PoolArgs& args, int64_t first, int64_t last, int64_t first_row,
                   int64_t last_row) {
  const auto plane =
      args.kind == Pool::kMax ? pool_plane_of<true>(args.window) : pool_plane_of<false>(args.window);
  for (int64_t c = first; c < last; ++c) {
    plane(args, args.x + c * args.ldx, args.y + c * args.ldy, first_row, last_row);
  }
}

}  // namespace
}  // namespace aerogel::AEROGEL_ISA
