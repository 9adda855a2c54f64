// Depthwise 3x3 as a walk down the plane. A strip of up to four vectors of output columns keeps the
// sums of all the output rows that an input row touches in registers: every input is loaded once per
// kernel column, every weight once per channel, and a row of output is stored when its last input row
// has passed. Columns beside the plane are masked away by the loads of the strip's outer vectors, rows
// above and below it are passed by.
//
// Needs mask registers and 32 vectors: with stride 1, twelve sums and nine weights.

#if defined(AEROGEL_USE_AVX512)

namespace aerogel::AEROGEL_ISA {
namespace {

constexpr int kStripVectors = 4;
constexpr int kMostStrips = 8;  // of a plane; wider ones are left to the tiles

using StripMasks = LaneMask[3];  // of a kernel column: lanes that read inside the plane

struct DepthwiseStrip {
  const float* x;  // plane of the first channel, at the strip's first column under kernel column 0
  int64_t ldx;
  const float* weight;  // [channels][9]
  const float* bias;
  float* y;  // plane of the first channel, at the strip's first column
  int64_t ldy;
  int64_t channels;
  int64_t first_row, last_row;
  int64_t last_start;  // of the last vector, from the strip's first column
  int64_t lanes;       // of the last vector that are stored
  StripMasks first, last;  // of the outer vectors
};

// kAlone: the whole row, not wider than a vector and padded by one: its neighbours are in registers.
template <int kStride, int kVecs, bool kAlone>
AEROGEL_INLINE void strip_inputs(const DepthwiseStrip& s, const float* row, int v, Vec (&x)[3]) {
  const float* from = row + kStride * (v == kVecs - 1 ? s.last_start : v * kLanes);
  const StripMasks& mask = v == kVecs - 1 ? s.last : s.first;
  const bool outer = v == 0 || v == kVecs - 1;
  if (kStride == 1 && kAlone) {
    x[1] = load_kept(from + 1, mask[1]);
    x[0] = shift_up(zero(), x[1]);
    x[2] = shift_down(x[1], zero());
  } else if (kStride == 1) {
#pragma GCC unroll 3
    for (int kx = 0; kx < 3; ++kx) {
      x[kx] = outer ? load_kept(from + kx, mask[kx]) : load(from + kx);
      in_register(x[kx]);
    }
  } else {
    const Vec low = load(from + 1), high = load(from + 1 + kLanes);
    x[1] = even_of(low, high);
    x[2] = odd_of(low, high);
    x[0] = shift_up(load(from + 1 - kLanes), x[2]);
#pragma GCC unroll 3
    for (int kx = 0; kx < 3 && outer; ++kx) x[kx] = kept(x[kx], mask[kx]);
  }
}

// sum + the products of one kernel row
AEROGEL_INLINE Vec strip_row(const TapVectors<9>& taps, int ky, const Vec (&x)[3], Vec sum) {
#pragma GCC unroll 3
  for (int kx = 0; kx < 3; ++kx) sum = fma(x[kx], taps[3 * ky + kx], sum);
  return sum;
}

template <int kVecs>
struct StripSums {
  Vec v[kVecs];

  AEROGEL_INLINE void fill(Vec value) {
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) v[i] = value;
  }
};

template <int kVecs, bool kCapped>
AEROGEL_INLINE void strip_store(const DepthwiseStrip& s, const Clamp& clamp,
                                const StripSums<kVecs>& sums, float* y) {
#pragma GCC unroll 4
  for (int i = 0; i < kVecs; ++i) {
    Vec sum = max(clamp.low, sums.v[i]);
    if (kCapped) sum = min(clamp.high, sum);
    if (kVecs == 1) {
      store_n(y, sum, s.lanes);
    } else {
      store(y + (i == kVecs - 1 ? s.last_start : i * kLanes), sum);
    }
  }
}

// One input row under the sums of three output rows: its last, middle and first.
template <int kVecs, bool kAlone>
AEROGEL_INLINE void strip_step(const DepthwiseStrip& s, const TapVectors<9>& taps, Vec bias,
                               const float* row, StripSums<kVecs>& last, StripSums<kVecs>& middle,
                               StripSums<kVecs>& first) {
#pragma GCC unroll 4
  for (int i = 0; i < kVecs; ++i) {
    Vec x[3];
    strip_inputs<1, kVecs, kAlone>(s, row, i, x);
    last.v[i] = strip_row(taps, 2, x, last.v[i]);
    middle.v[i] = strip_row(taps, 1, x, middle.v[i]);
    first.v[i] = strip_row(taps, 0, x, bias);
  }
}

template <int kVecs, bool kCapped, bool kAlone>
AEROGEL_NOINLINE void strip_stride1(const DepthwiseStrip& strip, const Window& w,
                                    const Clamp& given) {
  using Sums = StripSums<kVecs>;
  const DepthwiseStrip s = strip;  // copies, which no store can change
  const Clamp clamp = given;
  const int64_t in_w = w.in_w, in_h = w.in_h, out_w = w.out_w, top = s.first_row - w.pad_h;
  const float* plane = s.x + top * in_w;
  float* out = s.y + s.first_row * out_w;
  for (int64_t c = 0; c < s.channels; ++c, plane += s.ldx, out += s.ldy) {
    const TapVectors<9> taps(s.weight + 9 * c);
    const Vec bias = broadcast(s.bias[c]);
    const float* row = plane;
    float* y = out;
    int64_t iy = top;
    Sums a, b, d;
    const auto step = [&](Sums& last, Sums& middle, Sums& first) {
      if (iy >= 0 && iy < in_h) {
        strip_step<kVecs, kAlone>(s, taps, bias, row, last, middle, first);
      } else {
        first.fill(bias);
      }
      ++iy;
      row += in_w;
    };
    const auto finish = [&](Sums& last, Sums& middle, Sums& first) {
      step(last, middle, first);
      strip_store<kVecs, kCapped>(s, clamp, last, y);
      y += out_w;
    };
    a.fill(bias);
    b.fill(bias);
    step(a, b, d);
    step(b, d, a);
    int64_t left = s.last_row - s.first_row;
    for (; left > 3 && iy >= 0 && iy + 2 < in_h; left -= 3, iy += 3) {
      const auto inside = [&](Sums& last, Sums& middle, Sums& first) {
        strip_step<kVecs, kAlone>(s, taps, bias, row, last, middle, first);
        strip_store<kVecs, kCapped>(s, clamp, last, y);
        row += in_w;
        y += out_w;
      };
      inside(d, a, b);
      inside(a, b, d);
      inside(b, d, a);
    }
    for (;;) {
      finish(d, a, b);
      if (--left == 0) break;
      finish(a, b, d);
      if (--left == 0) break;
      finish(b, d, a);
      if (--left == 0) break;
    }
  }
}

template <int kVecs, bool kCapped, bool kAlone>
AEROGEL_NOINLINE void strip_stride2(const DepthwiseStrip& strip, const Window& w,
                                    const Clamp& given) {
  const DepthwiseStrip s = strip;
  const Clamp clamp = given;
  const int64_t in_w = w.in_w, in_h = w.in_h, out_w = w.out_w, top = 2 * s.first_row - w.pad_h;
  const float* plane = s.x + top * in_w;
  float* out = s.y + s.first_row * out_w;
  for (int64_t c = 0; c < s.channels; ++c, plane += s.ldx, out += s.ldy) {
    const TapVectors<9> taps(s.weight + 9 * c);
    const Vec bias = broadcast(s.bias[c]);
    StripSums<kVecs> sums, next;
    next.fill(bias);
    const auto inputs = [&](const float* row, int i, Vec(&x)[3]) {
      strip_inputs<2, kVecs, kAlone>(s, row, i, x);
    };
    if (top >= 0 && top < in_h) {
#pragma GCC unroll 4
      for (int i = 0; i < kVecs; ++i) {
        Vec x[3];
        inputs(plane, i, x);
        next.v[i] = strip_row(taps, 0, x, next.v[i]);
      }
    }
    const float* row = plane + in_w;
    float* y = out;
    int64_t iy = top + 1;
    for (int64_t oy = s.first_row; oy < s.last_row; ++oy, iy += 2, row += 2 * in_w, y += out_w) {
      sums = next;
      next.fill(bias);
      if (iy >= 0 && iy < in_h) {
#pragma GCC unroll 4
        for (int i = 0; i < kVecs; ++i) {
          Vec x[3];
          inputs(row, i, x);
          sums.v[i] = strip_row(taps, 1, x, sums.v[i]);
        }
      }
      if (iy + 1 >= 0 && iy + 1 < in_h) {
#pragma GCC unroll 4
        for (int i = 0; i < kVecs; ++i) {
          Vec x[3];
          inputs(row + in_w, i, x);
          sums.v[i] = strip_row(taps, 2, x, sums.v[i]);
          next.v[i] = strip_row(taps, 0, x, next.v[i]);
        }
      }
      strip_store<kVecs, kCapped>(s, clamp, sums, y);
    }
  }
}

using StripKernel = void (*)(const DepthwiseStrip&, const Window&, const Clamp&);

template <int kVecs, bool kAlone>
StripKernel pick_strip(int64_t stride, bool capped) {
  if (stride == 1) {
    return capped ? &strip_stride1<kVecs, true, kAlone> : &strip_stride1<kVecs, false, kAlone>;
  }
  return capped ? &strip_stride2<kVecs, true, kAlone> : &strip_stride2<kVecs, false, kAlone>;
}

StripKernel pick_strip(const Window& w, int64_t vectors, bool capped) {
  const bool alone = w.stride_w == 1 && w.pad_w == 1 && w.in_w <= kLanes;
  switch (vectors) {
    case 1:
      return alone ? pick_strip<1, true>(w.stride_w, capped)
                   : pick_strip<1, false>(w.stride_w, capped);
    case 2: return pick_strip<2, false>(w.stride_w, capped);
    case 3: return pick_strip<3, false>(w.stride_w, capped);
    default: return pick_strip<kStripVectors, false>(w.stride_w, capped);
  }
}

void strip_masks(const DepthwiseTile& tile, StripMasks& masks) {
  for (int kx = 0; kx < 3; ++kx) {
    masks[kx] = tile.mask ? mask_of(load(tile.mask + kx * kLanes)) : lane_mask(kLanes);
  }
}

// Layers with tiles that strips are for.
bool strips_fit(const Window& w, Activation activation) {
  const bool narrow = (w.out_w + kLanes - 1) / kLanes <= kMostStrips * kStripVectors;
  return w.kernel_w == 3 && (w.stride_w == 1 || w.pad_w == 1) && narrow && is_cheap(activation);
}

// False if the layer is none that strips are for.
bool depthwise_strips(const DepthwiseArgs& args, int64_t first, int64_t last, int64_t first_row,
                      int64_t last_row) {
  const DepthwiseLayer& layer = *args.layer;
  const Window& w = layer.window;
  if (!layer.tiles || !strips_fit(w, args.activation)) return false;
  const Clamp clamp(args.activation);
  const bool capped = args.activation != Activation::kRelu;
  const int64_t count = (layer.tile_count + kStripVectors - 1) / kStripVectors;
  StripKernel kernels[kMostStrips];
  DepthwiseStrip strips[kMostStrips];
  int64_t starts[kMostStrips];
  for (int64_t i = 0; i < count; ++i) {
    const int64_t begin = layer.tile_count * i / count, end = layer.tile_count * (i + 1) / count;
    const DepthwiseTile &head = layer.tiles[begin], &tail = layer.tiles[end - 1];
    kernels[i] = pick_strip(w, end - begin, capped);
    starts[i] = head.start;
    DepthwiseStrip& s = strips[i];
    s.ldx = args.ldx;
    s.ldy = args.ldy;
    s.first_row = first_row;
    s.last_row = last_row;
    s.last_start = tail.start - head.start;
    s.lanes = smaller(kLanes, w.out_w);
    strip_masks(head, s.first);
    strip_masks(tail, s.last);
  }
  // A plane at a time, unless it is a single strip.
  const int64_t together = count == 1 && layer.multiplier == 1 ? last - first : 1;
  for (int64_t c = first; c < last; c += together) {
    for (int64_t i = 0; i < count; ++i) {
      DepthwiseStrip& s = strips[i];
      s.x = args.x + c / layer.multiplier * args.ldx + starts[i] * w.stride_w - w.pad_w;
      s.y = args.y + c * args.ldy + starts[i];
      s.weight = layer.weight + 9 * c;
      s.bias = layer.bias + c;
      s.channels = together;
      kernels[i](s, w, clamp);
    }
  }
  return true;
}

}  // namespace
}  // namespace aerogel::AEROGEL_ISA

#else

namespace aerogel::AEROGEL_ISA {
namespace {

bool strips_fit(const Window&, Activation) { return false; }
bool depthwise_strips(const DepthwiseArgs&, int64_t, int64_t, int64_t, int64_t) { return false; }

}  // namespace
}  // namespace aerogel::AEROGEL_ISA

#endif
