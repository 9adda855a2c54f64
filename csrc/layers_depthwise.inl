// Depthwise convolution. 3x3 and 5x5 with stride 1 or 2 run on tiles of several output rows x one
// vector: an input vector is loaded once and serves every output row it touches, weights of one
// kernel column stay in registers. Nothing is copied: rows above and below the plane are read from
// a row of zeros, columns beside it are masked away in the vectors that meet the border.

namespace aerogel::AEROGEL_ISA {
namespace {

struct DepthwiseBlock {
  const float* const* rows;  // input rows under the tile, moved left by the padding
  const float* weight;       // of this channel
  float bias;
  Activation activation;  // a cheap one
  float* y;
  int64_t out_w;
  int64_t floats;  // that may be written from y on
};

// kShort: output rows are shorter than a vector. A row then spills into the next one, which is
// written afterwards.
template <int kKernel, int kStride, int kRowCount, bool kMasked, bool kShort>
AEROGEL_INLINE void depthwise_tile(const DepthwiseBlock& b, const DepthwiseTile& tile,
                                   const Clamp& clamp) {
  constexpr int kInRows = (kRowCount - 1) * kStride + kKernel;
  constexpr int kTogether = kStride;  // kernel columns that share the loads of an input row
  Vec acc[kRowCount];
  for (int o = 0; o < kRowCount; ++o) acc[o] = broadcast(b.bias);
#pragma GCC unroll 8
  for (int kx = 0; kx < kKernel; kx += kTogether) {
    Vec weight[kTogether][kKernel];
    Vec mask[kTogether];
    for (int t = 0; t < kTogether && kx + t < kKernel; ++t) {
      for (int ky = 0; ky < kKernel; ++ky) {
        weight[t][ky] = broadcast(b.weight[ky * kKernel + kx + t]);
      }
      if (kMasked) {
        mask[t] = load(tile.mask + (kx + t) * kLanes);
        if (kStride == 2) mask[t] = split_order(mask[t]);
      }
    }
#pragma GCC unroll 32
    for (int r = 0; r < kInRows; ++r) {
      const float* from = b.rows[r] + tile.start * kStride + kx;
      Vec x[kTogether];
      if (kStride == 1) {
        x[0] = load(from);
      } else {
        const Vec low = load(from), high = load(from + kLanes);
        x[0] = even_of(low, high);
        x[kTogether - 1] = odd_of(low, high);
      }
      for (int t = 0; t < kTogether && kx + t < kKernel; ++t) {
        if (kMasked) x[t] = keep(x[t], mask[t]);
        in_register(x[t]);
#pragma GCC unroll 8
        for (int o = 0; o < kRowCount; ++o) {
          const int ky = r - o * kStride;
          if (ky >= 0 && ky < kKernel) acc[o] = fma(x[t], weight[t][ky], acc[o]);
        }
      }
    }
  }
  float* y = b.y + tile.start;
  const int64_t out_w = b.out_w;
#pragma GCC unroll 8
  for (int o = 0; o < kRowCount; ++o) {
    const Vec sum = clamp(kStride == 2 ? split_order(acc[o]) : acc[o]);
    if (kShort) {
      store_upto(y + o * out_w, sum, b.floats - o * out_w);
    } else {
      store(y + o * out_w, sum);
    }
  }
}

template <int kKernel, int kStride, int kRowCount>
AEROGEL_NOINLINE void depthwise_rows(const DepthwiseLayer& layer, const DepthwiseBlock& block) {
  const Clamp clamp(block.activation);
  const DepthwiseTile* tile = layer.tiles;
  const DepthwiseTile* end = tile + layer.tile_count;
  if (block.out_w < kLanes) {
    depthwise_tile<kKernel, kStride, kRowCount, true, true>(block, *tile, clamp);
    return;
  }
  for (; tile < end; ++tile) {
    if (tile->mask) {
      depthwise_tile<kKernel, kStride, kRowCount, true, false>(block, *tile, clamp);
    } else {
      depthwise_tile<kKernel, kStride, kRowCount, false, false>(block, *tile, clamp);
    }
  }
}

template <int kKernel, int kStride>
void depthwise_plane(const DepthwiseLayer& layer, const float* x, const float* weight, float bias,
                     Activation activation, float* y, int64_t first_row, int64_t last_row) {
  const Window& w = layer.window;
  const int64_t whole = depthwise_tile_rows(w);
  for (int64_t oy = first_row; oy < last_row;) {
    const int64_t left = last_row - oy;
    const int64_t count = left >= whole ? whole : (left >= 4 ? 4 : 1);
    const float* rows[6 * kStride + kKernel];
    for (int64_t r = 0; r < (count - 1) * kStride + kKernel; ++r) {
      const int64_t iy = oy * w.stride_h - w.pad_h + r;
      rows[r] = (iy >= 0 && iy < w.in_h ? x + iy * w.in_w : layer.zeros) - w.pad_w;
    }
    const DepthwiseBlock block = {rows, weight, bias, activation, y + oy * w.out_w, w.out_w,
                                  left * w.out_w};
    if (count == 7) {
      depthwise_rows<kKernel, kStride, 7>(layer, block);
    } else if (count == 4) {
      depthwise_rows<kKernel, kStride, 4>(layer, block);
    } else {
      depthwise_rows<kKernel, kStride, 1>(layer, block);
    }
    oy += count;
  }
}

// Any window: one tap at a time over its valid part of each output row.
void depthwise_general(const DepthwiseLayer& layer, const float* x, const float* weight, float bias,
                       Activation, float* y, int64_t first_row, int64_t last_row) {
  const Window& w = layer.window;
  y += first_row * w.out_w;
  for (int64_t oy = first_row; oy < last_row; ++oy, y += w.out_w) {
    for (int64_t ox = 0; ox < w.out_w; ++ox) y[ox] = bias;
    for (int64_t ky = 0; ky < w.kernel_h; ++ky) {
      if (oy < layer.taps_y[ky].first || oy >= layer.taps_y[ky].last) continue;
      const int64_t iy = oy * w.stride_h - w.pad_h + ky * w.dilation_h;
      for (int64_t kx = 0; kx < w.kernel_w; ++kx) {
        const TapRange range = layer.taps_x[kx];
        const float tap = weight[ky * w.kernel_w + kx];
        const float* row = x + iy * w.in_w + kx * w.dilation_w - w.pad_w;
        if (w.stride_w == 1) {
          for (int64_t ox = range.first; ox < range.last; ++ox) y[ox] += tap * row[ox];
        } else {
          for (int64_t ox = range.first; ox < range.last; ++ox) y[ox] += tap * row[ox * w.stride_w];
        }
      }
    }
  }
}

#if defined(AEROGEL_USE_AVX512)

constexpr int kMostTaps = 25;

// Planes that a few registers hold: every tap takes all outputs at once from the input's registers, by
// a permutation. kPairs: of registers that hold the input.
template <int kPairs>
void depthwise_registers(const DepthwiseArgs& args, int64_t first, int64_t last) {
  const DepthwiseLayer& layer = *args.layer;
  const Window& w = layer.window;
  __m512i from[kMostTaps];               // of each output: its input's place
  __mmask16 reads[kMostTaps][kPairs];    // which outputs read that pair; padding reads none
  int taps = 0;
  for (int64_t ky = 0; ky < w.kernel_h; ++ky) {
    for (int64_t kx = 0; kx < w.kernel_w; ++kx, ++taps) {
      alignas(64) int32_t place[kLanes] = {};
      for (int p = 0; p < kPairs; ++p) reads[taps][p] = 0;
      for (int64_t i = 0; i < w.out_h * w.out_w; ++i) {
        const int64_t y = i / w.out_w * w.stride_h - w.pad_h + ky * w.dilation_h;
        const int64_t x = i % w.out_w * w.stride_w - w.pad_w + kx * w.dilation_w;
        if (y < 0 || y >= w.in_h || x < 0 || x >= w.in_w) continue;
        place[i] = static_cast<int32_t>(y * w.in_w + x);
        const int bit = 1 << i;
        reads[taps][place[i] / (2 * kLanes)] |= static_cast<__mmask16>(bit);
      }
      from[taps] = _mm512_load_si512(place);  // the permutation looks at an index modulo 32
    }
  }
  const Clamp clamp(args.activation);
  for (int64_t c = first; c < last; ++c) {
    const float* x = args.x + c / layer.multiplier * args.ldx;
    const float* weight = layer.weight + c * taps;
    Vec acc[kPairs];
    for (int p = 0; p < kPairs; ++p) acc[p] = p == 0 ? broadcast(layer.bias[c]) : zero();
    for (int t = 0; t < taps; ++t) {
      const Vec tap = broadcast(weight[t]);
      for (int p = 0; p < kPairs; ++p) {
        const Vec low = load(x + 2 * p * kLanes), high = load(x + (2 * p + 1) * kLanes);
        const Vec moved = _mm512_permutex2var_ps(low, from[t], high);
        acc[p] = _mm512_mask3_fmadd_ps(moved, tap, acc[p], reads[t][p]);
      }
    }
    if (kPairs == 2) acc[0] = add(acc[0], acc[kPairs - 1]);
    store(args.y + c * args.ldy, clamp(acc[0]));
  }
}

// Channels that fit; false if the layer's do not.
bool depthwise_small(const DepthwiseArgs& args, int64_t first, int64_t last) {
  const Window& w = args.layer->window;
  const int64_t in = w.in_h * w.in_w;
  if (w.out_h * w.out_w > kLanes || in > 4 * kLanes || w.kernel_h * w.kernel_w > kMostTaps ||
      !is_cheap(args.activation)) {
    return false;
  }
  in > 2 * kLanes ? depthwise_registers<2>(args, first, last)
                  : depthwise_registers<1>(args, first, last);
  return true;
}

#else

bool depthwise_small(const DepthwiseArgs&, int64_t, int64_t) { return false; }

#endif

using DepthwisePlane = void (*)(const DepthwiseLayer&, const float* x, const float* weight,
                                float bias, Activation, float* y, int64_t first_row,
                                int64_t last_row);

AEROGEL_INLINE DepthwisePlane pick_depthwise(const DepthwiseLayer& layer) {
  if (!layer.tiles) return &depthwise_general;
  if (layer.window.kernel_w == 3) {
    return layer.window.stride_w == 1 ? &depthwise_plane<3, 1> : &depthwise_plane<3, 2>;
  }
  return layer.window.stride_w == 1 ? &depthwise_plane<5, 1> : &depthwise_plane<5, 2>;
}

// Strips take any number of rows alike.
int64_t depthwise_rows_together(const Window& w, Activation activation) {
  return strips_fit(w, activation) ? 1 : depthwise_tile_rows(w);
}

void depthwise_channels(const DepthwiseArgs& args, int64_t first, int64_t last, int64_t first_row,
                        int64_t last_row) {
  const DepthwiseLayer& layer = *args.layer;
  const bool whole = first_row == 0 && last_row == layer.window.out_h;
  if (whole && depthwise_small(args, first, last)) return;  // such planes are never cut into bands
  if (depthwise_pairs(args, first, last, first_row, last_row)) return;
  if (depthwise_strips(args, first, last, first_row, last_row)) return;
  const DepthwisePlane plane = pick_depthwise(layer);
  const bool in_registers = layer.tiles && is_cheap(args.activation);
  const int64_t taps = layer.window.kernel_h * layer.window.kernel_w;
  for (int64_t c = first; c < last; ++c) {
    float* y = args.y + c * args.ldy;
    plane(layer, args.x + c / layer.multiplier * args.ldx, layer.weight + c * taps, layer.bias[c],
          in_registers ? args.activation : Activation::kNone, y, first_row, last_row);
    if (!in_registers) {
      float* row = y + first_row * layer.window.out_w;
      activate_span(args.activation, row, row, (last_row - first_row) * layer.window.out_w);
    }
  }
}

}  // namespace
}  // namespace aerogel::AEROGEL_ISA
