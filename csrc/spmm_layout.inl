// Slabs of activations into aligned scratch and finished tiles out of it: [k][stride] planes, with
// the columns of one register tile side by side. Token-major data is transposed on the way.
#include "simd_math.h"
#include "spmm.h"

namespace aerogel::AEROGEL_ISA {
namespace {

#if defined(AEROGEL_USE_AVX2) || defined(AEROGEL_USE_AVX512)
constexpr int kBlock = 8;  // side of one transposed block

// to[j * to_stride + i] = from[i * from_stride + j] for 8 x 8 floats.
AEROGEL_INLINE void transpose_block(const float* from, int64_t from_stride, float* to,
                                    int64_t to_stride) {
  __m256 r[8], t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(from + i * from_stride);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    r[4 * i + 0] = _mm256_shuffle_ps(t[4 * i + 0], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i + 0], t[4 * i + 2], 0xEE);
    r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xEE);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * to_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * to_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}
#else
constexpr int kBlock = 4;

AEROGEL_INLINE void transpose_block(const float* from, int64_t from_stride, float* to,
                                    int64_t to_stride) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) to[j * to_stride + i] = from[i * from_stride + j];
  }
}
#endif

// to[j][i] = from[i][j] for rows x cols floats.
AEROGEL_NOINLINE void transpose(const float* from, int64_t from_stride, float* to,
                                int64_t to_stride, int64_t rows, int64_t cols) {
  const int64_t whole_rows = rows / kBlock * kBlock, whole_cols = cols / kBlock * kBlock;
  for (int64_t i = 0; i < whole_rows; i += kBlock) {
    for (int64_t j = 0; j < whole_cols; j += kBlock) {
      transpose_block(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
    }
    for (int64_t j = whole_cols; j < cols; ++j) {
      for (int64_t k = i; k < i + kBlock; ++k) to[j * to_stride + k] = from[k * from_stride + j];
    }
  }
  for (int64_t i = whole_rows; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) to[j * to_stride + i] = from[i * from_stride + j];
  }
}

// Activation rows [k_begin, k_end) of these columns into scratch[k][stride]. Columns up to the next
// whole vector are zeroed: the kernels load them.
AEROGEL_NOINLINE void pack_slab(const SpmmPanel& p, Columns columns, int64_t k_begin, int64_t k_end,
                                int64_t stride, float* scratch) {
  const int64_t ldx = p.args->ldx;
  const int64_t width = columns.width;
  const int64_t whole = width / kLanes * kLanes;
  if (p.args->tokens) {
    if (width > whole) {
      for (int64_t k = k_begin; k < k_end; ++k) store(scratch + k * stride + whole, zero());
    }
    transpose(p.x + columns.first * ldx + k_begin, ldx, scratch + k_begin * stride, stride, width,
              k_end - k_begin);
    return;
  }
  for (int64_t k = k_begin; k < k_end; ++k) {
    const float* from = p.x + k * ldx + columns.first;
    float* to = scratch + k * stride;
    for (int64_t j = 0; j < whole; j += kLanes) store(to + j, load(from + j));
    if (width > whole) store(to + whole, load_n(from + whole, width - whole));
  }
}

// Output rows [row_begin, row_end) of these tokens from scratch[row][stride] to y[token][row], with
// the epilogue.
AEROGEL_NOINLINE void unpack_tile(const SpmmPanel& p, Columns tokens, int64_t row_begin,
                                  int64_t row_end, int64_t stride, const float* scratch) {
  const SpmmArgs& a = *p.args;
  float* y = p.y + tokens.first * a.ldy;
  transpose(scratch, stride, y + row_begin, a.ldy, row_end - row_begin, tokens.width);
  if (a.activation == Activation::kNone && !p.residual) return;
  for (int64_t t = 0; t < tokens.width; ++t) {
    const float* r = p.residual ? p.residual + (tokens.first + t) * a.ldr : nullptr;
    for (int64_t j = row_begin; j < row_end; j += kLanes) {
      const int64_t n = row_end - j;
      Vec v = load_upto(y + t * a.ldy + j, n);
      if (r) v = add(v, load_upto(r + j, n));
      store_upto(y + t * a.ldy + j, activate(v, a.activation), n);
    }
  }
}

}  // namespace
}  // namespace aerogel::AEROGEL_ISA
