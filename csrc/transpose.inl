// Transposes of float matrices, in square blocks of registers.
#pragma once

#include "simd.h"

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
[[maybe_unused]] AEROGEL_NOINLINE void transpose(const float* from, int64_t from_stride, float* to,
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

}  // namespace
}  // namespace aerogel::AEROGEL_ISA
