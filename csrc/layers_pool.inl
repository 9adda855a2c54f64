// Max and average pooling: taps of one window column are combined over whole input rows first, then
// the columns of each window.

namespace aerogel::AEROGEL_ISA {
namespace {

constexpr int64_t kPoolSpan = 2048;  // input columns combined at a time, on the stack

template <bool kMax>
AEROGEL_INLINE Vec pool_combine(Vec acc, Vec x) {
  return kMax ? max_or_nan(acc, x) : add(acc, x);
}

template <bool kMax>
AEROGEL_INLINE Vec pool_nothing() {
  return broadcast(kMax ? -__builtin_inff() : 0.0f);
}

// row[i] = combination of the valid window rows of output row oy at input columns from + i, i < count.
template <bool kMax>
AEROGEL_INLINE void pool_rows(const PoolArgs& a, const float* plane, int64_t oy, int64_t from,
                              int64_t count, float* row) {
  const Window& w = a.window;
  int64_t first = 0, last = w.kernel_h;
  while (first < last && (oy < a.taps_y[first].first || oy >= a.taps_y[first].last)) ++first;
  while (first < last && (oy < a.taps_y[last - 1].first || oy >= a.taps_y[last - 1].last)) --last;
  const float* x = plane + (oy * w.stride_h - w.pad_h) * w.in_w + from;
  const int64_t step = w.dilation_h * w.in_w;
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t n = count - i;
    Vec v = pool_nothing<kMax>();
    for (int64_t ky = first; ky < last; ++ky) {
      v = pool_combine<kMax>(v, load_upto(x + ky * step + i, n));
    }
    store(row + i, v);
  }
}

// y[i] combined with row[i * stride], i < count.
template <bool kMax>
AEROGEL_INLINE void pool_columns(const float* row, int64_t stride, int64_t count, float* y) {
  int64_t i = 0;
  for (; stride <= 2 && i + kLanes <= count; i += kLanes) {
    Vec x = load(row + i * stride);
    if (stride == 2) x = split_order(even_of(x, load(row + 2 * i + kLanes)));
    store(y + i, pool_combine<kMax>(load(y + i), x));
  }
  for (; i < count; ++i) {
    const float x = row[i * stride], v = y[i];
    y[i] = kMax ? (v > x || v != v ? v : x) : v + x;
  }
}

// torch's divisor: the window cut at the padded (or at the bare) plane.
AEROGEL_INLINE int64_t pool_extent(int64_t o, int64_t stride, int64_t pad, int64_t kernel,
                                   int64_t in, bool count_pad) {
  const int64_t begin = o * stride - pad;
  const int64_t end = smaller(begin + kernel, in + pad);
  if (count_pad) return end - begin;
  return smaller(end, in) - larger(begin, 0);
}

template <bool kMax>
void pool_plane(const PoolArgs& a, const float* x, float* y, int64_t first_row, int64_t last_row) {
  const Window& w = a.window;
  const int64_t reach = (w.kernel_w - 1) * w.dilation_w + 1;
  const int64_t chunk = larger(1, (kPoolSpan - reach) / w.stride_w + 1);
  float row[kPoolSpan + 2 * kLanes];
  y += first_row * w.out_w;
  for (int64_t oy = first_row; oy < last_row; ++oy, y += w.out_w) {
    for (int64_t ox0 = 0; ox0 < w.out_w; ox0 += chunk) {
      const int64_t ox1 = smaller(ox0 + chunk, w.out_w);
      const int64_t from = larger(0, ox0 * w.stride_w - w.pad_w);
      const int64_t to = smaller(w.in_w, (ox1 - 1) * w.stride_w - w.pad_w + reach);
      pool_rows<kMax>(a, x, oy, from, larger(to - from, 0), row);
      for (int64_t ox = ox0; ox < ox1; ox += kLanes) {
        store_upto(y + ox, pool_nothing<kMax>(), ox1 - ox);
      }
      for (int64_t kx = 0; kx < w.kernel_w; ++kx) {
        const int64_t first = larger(ox0, a.taps_x[kx].first);
        const int64_t last = smaller(ox1, a.taps_x[kx].last);
        const float* tap = row + (kx * w.dilation_w - w.pad_w - from);
        pool_columns<kMax>(tap + first * w.stride_w, w.stride_w, last - first, y + first);
      }
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

void pool_channels(const PoolArgs& args, int64_t first, int64_t last, int64_t first_row,
                   int64_t last_row) {
  for (int64_t c = first; c < last; ++c) {
    const float* x = args.x + c * args.ldx;
    float* y = args.y + c * args.ldy;
    if (args.kind == Pool::kMax) {
      pool_plane<true>(args, x, y, first_row, last_row);
    } else {
      pool_plane<false>(args, x, y, first_row, last_row);
    }
  }
}

}  // namespace
}  // namespace aerogel::AEROGEL_ISA
