// Max and average pooling: taps of one window column are combined over whole input rows first
// (unit stride, so the compiler vectorises it), then the columns of each window.

namespace aerogel::AEROGEL_ISA {
namespace {

constexpr int64_t kPoolSpan = 2048;  // input columns combined at a time, on the stack

AEROGEL_INLINE float pool_combine(bool is_max, float acc, float x) {
  if (!is_max) return acc + x;
  return (x > acc) | (x != x) ? x : acc;  // NaN wins, as in torch
}

// row[i] = combination of the valid window rows of output row oy at input column i.
template <bool kMax>
AEROGEL_INLINE void pool_rows(const PoolArgs& a, const float* plane, int64_t oy, int64_t from,
                              int64_t to, float* row) {
  const Window& w = a.window;
  bool first = true;
  for (int64_t ky = 0; ky < w.kernel_h; ++ky) {
    if (oy < a.taps_y[ky].first || oy >= a.taps_y[ky].last) continue;
    const float* x = plane + (oy * w.stride_h - w.pad_h + ky * w.dilation_h) * w.in_w;
    if (first) {
      for (int64_t i = from; i < to; ++i) row[i - from] = x[i];
    } else {
      for (int64_t i = from; i < to; ++i) row[i - from] = pool_combine(kMax, row[i - from], x[i]);
    }
    first = false;
  }
  if (first) {
    for (int64_t i = from; i < to; ++i) row[i - from] = kMax ? -__builtin_inff() : 0.0f;
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
void pool_plane(const PoolArgs& a, const float* x, float* y) {
  const Window& w = a.window;
  const int64_t reach = (w.kernel_w - 1) * w.dilation_w + 1;
  const int64_t chunk = larger(1, (kPoolSpan - reach) / w.stride_w + 1);
  float row[kPoolSpan];
  for (int64_t oy = 0; oy < w.out_h; ++oy, y += w.out_w) {
    for (int64_t ox0 = 0; ox0 < w.out_w; ox0 += chunk) {
      const int64_t ox1 = smaller(ox0 + chunk, w.out_w);
      const int64_t from = larger(0, ox0 * w.stride_w - w.pad_w);
      const int64_t to = smaller(w.in_w, (ox1 - 1) * w.stride_w - w.pad_w + reach);
      pool_rows<kMax>(a, x, oy, from, larger(from, to), row);
      for (int64_t ox = ox0; ox < ox1; ++ox) y[ox] = kMax ? -__builtin_inff() : 0.0f;
      for (int64_t kx = 0; kx < w.kernel_w; ++kx) {
        const int64_t first = larger(ox0, a.taps_x[kx].first);
        const int64_t last = smaller(ox1, a.taps_x[kx].last);
        const float* tap = row + (kx * w.dilation_w - w.pad_w - from);
        if (w.stride_w == 1) {
          for (int64_t ox = first; ox < last; ++ox) y[ox] = pool_combine(kMax, y[ox], tap[ox]);
        } else if (w.stride_w == 2) {
          for (int64_t ox = first; ox < last; ++ox) y[ox] = pool_combine(kMax, y[ox], tap[2 * ox]);
        } else {
          for (int64_t ox = first; ox < last; ++ox) {
            y[ox] = pool_combine(kMax, y[ox], tap[ox * w.stride_w]);
          }
        }
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

void pool_channels(const PoolArgs& args, int64_t first, int64_t last) {
  for (int64_t c = first; c < last; ++c) {
    const float* x = args.x + c * args.ldx;
    float* y = args.y + c * args.ldy;
    if (args.kind == Pool::kMax) {
      pool_plane<true>(args, x, y);
    } else {
      pool_plane<false>(args, x, y);
    }
  }
}

}  // namespace
}  // namespace aerogel::AEROGEL_ISA
