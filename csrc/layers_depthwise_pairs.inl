// Depthwise 3x3 on planes of at most seven columns: two rows lie in one vector, each followed by at
// least one zero, so that a neighbouring column is a lane away and a row's end pads the next one.
// Rows above and below are halves of neighbouring vectors. Nothing is loaded twice, and the sums of
// the left and right kernel columns are shifted once, at the end, instead of their inputs.

#if defined(AEROGEL_USE_AVX512)

namespace aerogel::AEROGEL_ISA {
namespace {

constexpr int kHalf = kLanes / 2;
constexpr int64_t kPairColumns = kHalf - 1;

// Lane i of each half takes from step * i + first of its row; rows are `apart` in the source.
__m512i half_lanes(int64_t step, int64_t first, int64_t apart) {
  alignas(64) int32_t place[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    place[i] = static_cast<int32_t>(i % kHalf * step + first + i / kHalf * apart);
  }
  return _mm512_load_si512(place);
}

LaneMask half_masks(int64_t columns, int64_t rows) {
  const uint32_t row = (1u << columns) - 1u;
  return static_cast<LaneMask>(rows >= 2 ? row | row << kHalf : rows == 1 ? row : 0u);
}

// The two rows without the zeros between them.
struct PairOutput {
  __m512i packed;
  int64_t columns;

  explicit PairOutput(int64_t out_w) : columns(out_w) {
    alignas(64) int32_t place[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      place[i] = static_cast<int32_t>(i < out_w ? i : (kHalf + i - out_w) % kLanes);
    }
    packed = _mm512_load_si512(place);
  }
  AEROGEL_INLINE void operator()(float* y, Vec sums, int64_t rows) const {
    store_n(y, _mm512_permutexvar_ps(packed, sums), rows >= 2 ? 2 * columns : columns);
  }
};

// [second row of a, first row of b]
AEROGEL_INLINE Vec between(Vec a, Vec b) { return _mm512_shuffle_f32x4(a, b, 0x4E); }

void depthwise_pairs_stride1(const DepthwiseArgs& args, int64_t first, int64_t last,
                             int64_t first_row, int64_t last_row) {
  const DepthwiseLayer& layer = *args.layer;
  const int64_t height = smaller(layer.window.in_h, last_row + 1);  // below it is another thread's
  const int64_t width = layer.window.in_w;
  const __m512i spread = half_lanes(1, 0, width);
  const LaneMask both = half_masks(width, 2);
  const PairOutput output(width);
  const Clamp clamp(args.activation);
  for (int64_t c = first; c < last; ++c) {
    const float* x = args.x + c / layer.multiplier * args.ldx;
    float* y = args.y + c * args.ldy;
    const TapVectors<9> taps(layer.weight + 9 * c);
    const Vec bias = broadcast(layer.bias[c]);
    const auto rows_at = [&](int64_t row) {
      const LaneMask mask = row + 2 <= height ? both : half_masks(width, height - row);
      return _mm512_maskz_permutexvar_ps(mask, spread, load(x + row * width));
    };
    Vec rows = rows_at(first_row);
    Vec above = first_row > 0 ? rows_at(first_row - 1) : between(zero(), rows);
    for (int64_t row = first_row; row < last_row; row += 2) {
      const Vec next = row + 2 < height ? rows_at(row + 2) : zero(), below = between(rows, next);
      Vec sums[3];  // of kernel columns
#pragma GCC unroll 3
      for (int kx = 0; kx < 3; ++kx) {
        sums[kx] = kx == 1 ? fma(above, taps[kx], bias) : mul(above, taps[kx]);
        sums[kx] = fma(rows, taps[3 + kx], sums[kx]);
        sums[kx] = fma(below, taps[6 + kx], sums[kx]);
      }
      const Vec beside = add(shift_up(zero(), sums[0]), shift_down(sums[2], zero()));
      output(y + row * width, clamp(add(sums[1], beside)), last_row - row);
      rows = next;
      above = below;
    }
  }
}

void depthwise_pairs_stride2(const DepthwiseArgs& args, int64_t first, int64_t last,
                             int64_t first_row, int64_t last_row) {
  const DepthwiseLayer& layer = *args.layer;
  const Window& w = layer.window;
  const int64_t height = smaller(w.in_h, 2 * last_row);
  const __m512i even = half_lanes(2, 0, kLanes), odd = half_lanes(2, 1, kLanes);
  const LaneMask whole = lane_mask(w.in_w);
  const PairOutput output(w.out_w);
  const Clamp clamp(args.activation);
  for (int64_t c = first; c < last; ++c) {
    const float* x = args.x + c / layer.multiplier * args.ldx;
    float* y = args.y + c * args.ldy;
    const TapVectors<9> taps(layer.weight + 9 * c);
    const Vec bias = broadcast(layer.bias[c]);
    const auto row_at = [&](int64_t row) {
      return row < height ? load_kept(x + row * w.in_w, whole) : zero();
    };
    Vec above = first_row > 0 ? row_at(2 * first_row - 1) : zero();
    for (int64_t oy = first_row; oy < last_row; oy += 2) {
      const int64_t row = 2 * oy;
      const Vec middle = row_at(row + 1), below = row_at(row + 3);
      const Vec upper[3] = {above, row_at(row), middle}, lower[3] = {middle, row_at(row + 2), below};
      Vec left = zero(), sums = bias;
#pragma GCC unroll 3
      for (int ky = 0; ky < 3; ++ky) {
        const Vec odds = _mm512_permutex2var_ps(upper[ky], odd, lower[ky]);
        const Vec evens = _mm512_permutex2var_ps(upper[ky], even, lower[ky]);
        left = fma(odds, taps[3 * ky], left);
        sums = fma(evens, taps[3 * ky + 1], sums);
        sums = fma(odds, taps[3 * ky + 2], sums);
      }
      output(y + oy * w.out_w, clamp(add(sums, shift_up(zero(), left))), last_row - oy);
      above = below;
    }
  }
}

// False if the layer is none that pairs of rows are for.
bool depthwise_pairs(const DepthwiseArgs& args, int64_t first, int64_t last, int64_t first_row,
                     int64_t last_row) {
  const Window& w = args.layer->window;
  const bool padded = w.pad_h == 1 && w.pad_w == 1;
  const int64_t widest = w.stride_w == 1 ? kPairColumns : 2 * kPairColumns;
  if (!args.layer->tiles || w.kernel_w != 3 || !padded || w.in_w > widest ||
      !is_cheap(args.activation)) {
    return false;
  }
  (w.stride_w == 1 ? depthwise_pairs_stride1 : depthwise_pairs_stride2)(args, first, last, first_row,
                                                                       last_row);
  return true;
}

}  // namespace
}  // namespace aerogel::AEROGEL_ISA

#else

namespace aerogel::AEROGEL_ISA {
namespace {

bool depthwise_pairs(const DepthwiseArgs&, int64_t, int64_t, int64_t, int64_t) { return false; }

}  // namespace
}  // namespace aerogel::AEROGEL_ISA

#endif
