// Transposes of float matrices, in square blocks of registers.
#pragma once

#include "simd.h"

namespace aerogel::AEROGEL_ISA {
namespace {

// The side of one transposed block.
#if defined(AEROGEL_USE_AVX512)
constexpr int kBlock = 16;
#elif defined(AEROGEL_USE_AVX2)
constexpr int kBlock = 8;
#else
constexpr int kBlock = 4;
#endif

// to[j * to_stride + i] = factor * from[i * from_stride + j] for kBlock x kBlock floats.
AEROGEL_INLINE void transpose_block(const float* from, int64_t from_stride, float* to,
                                    int64_t to_stride, float factor = 1.0f) {
#if defined(AEROGEL_USE_AVX512)
  // Rows 4 apart meet in one register as they are loaded, four floats each; what is left are 4 x 4
  // transposes within those.
  const __m512 by = _mm512_set1_ps(factor);
#pragma GCC unroll 4
  for (int j = 0; j < 16; j += 4, to += 4 * to_stride) {
    __m512 r[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const float* const p = from + i * from_stride + j;
      r[i] = _mm512_castps128_ps512(_mm_loadu_ps(p));
      r[i] = _mm512_insertf32x4(r[i], _mm_loadu_ps(p + 4 * from_stride), 1);
      r[i] = _mm512_insertf32x4(r[i], _mm_loadu_ps(p + 8 * from_stride), 2);
      r[i] = _mm512_insertf32x4(r[i], _mm_loadu_ps(p + 12 * from_stride), 3);
    }
    const __m512 a = _mm512_unpacklo_ps(r[0], r[1]), b = _mm512_unpackhi_ps(r[0], r[1]);
    const __m512 c = _mm512_unpacklo_ps(r[2], r[3]), d = _mm512_unpackhi_ps(r[2], r[3]);
    _mm512_storeu_ps(to, _mm512_mul_ps(by, _mm512_shuffle_ps(a, c, 0x44)));
    _mm512_storeu_ps(to + to_stride, _mm512_mul_ps(by, _mm512_shuffle_ps(a, c, 0xEE)));
    _mm512_storeu_ps(to + 2 * to_stride, _mm512_mul_ps(by, _mm512_shuffle_ps(b, d, 0x44)));
    _mm512_storeu_ps(to + 3 * to_stride, _mm512_mul_ps(by, _mm512_shuffle_ps(b, d, 0xEE)));
  }
#elif defined(AEROGEL_USE_AVX2)
  const __m256 by = _mm256_set1_ps(factor);
  __m256 r[8], t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = _mm256_mul_ps(by, _mm256_loadu_ps(from + i * from_stride));
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
#elif defined(AEROGEL_USE_NEON)
  float32x4_t r[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) r[i] = vmulq_n_f32(vld1q_f32(from + i * from_stride), factor);
  const float64x2_t even_low = vreinterpretq_f64_f32(vtrn1q_f32(r[0], r[1]));
  const float64x2_t odd_low = vreinterpretq_f64_f32(vtrn2q_f32(r[0], r[1]));
  const float64x2_t even_high = vreinterpretq_f64_f32(vtrn1q_f32(r[2], r[3]));
  const float64x2_t odd_high = vreinterpretq_f64_f32(vtrn2q_f32(r[2], r[3]));
  vst1q_f32(to, vreinterpretq_f32_f64(vtrn1q_f64(even_low, even_high)));
  vst1q_f32(to + to_stride, vreinterpretq_f32_f64(vtrn1q_f64(odd_low, odd_high)));
  vst1q_f32(to + 2 * to_stride, vreinterpretq_f32_f64(vtrn2q_f64(even_low, even_high)));
  vst1q_f32(to + 3 * to_stride, vreinterpretq_f32_f64(vtrn2q_f64(odd_low, odd_high)));
#else
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) to[j * to_stride + i] = factor * from[i * from_stride + j];
  }
#endif
}

// The same for rows x cols floats, at most kBlock each.
AEROGEL_INLINE void transpose_rest(const float* from, int64_t from_stride, float* to,
                                   int64_t to_stride, int64_t rows, int64_t cols, float factor) {
#if defined(AEROGEL_USE_AVX512)  // alone has masked stores that cost no more than whole ones
  constexpr int64_t kFew = 4;  // below, single floats are as fast
  if (rows >= kFew && cols >= kFew) {
    alignas(64) float whole[kBlock * kBlock], turned[kBlock * kBlock];
    for (int64_t i = 0; i < rows; ++i) {
      store(whole + i * kBlock, load_n(from + i * from_stride, cols));
    }
    for (int64_t i = rows; i < kBlock; ++i) store(whole + i * kBlock, zero());
    transpose_block(whole, kBlock, turned, kBlock, factor);
    for (int64_t j = 0; j < cols; ++j) {
      store_n(to + j * to_stride, load(turned + j * kBlock), rows);
    }
    return;
  }
#endif
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) to[j * to_stride + i] = factor * from[i * from_stride + j];
  }
}

// to[j][i] = factor * from[i][j] for rows x cols floats; a factor of 1 changes no bit.
[[maybe_unused]] AEROGEL_NOINLINE void transpose_scaled(const float* from, int64_t from_stride,
                                                        float* to, int64_t to_stride, int64_t rows,
                                                        int64_t cols, float factor) {
  for (int64_t i = 0; i < rows; i += kBlock) {
    const int64_t height = rows - i < kBlock ? rows - i : kBlock;
    for (int64_t j = 0; j < cols; j += kBlock) {
      const int64_t width = cols - j < kBlock ? cols - j : kBlock;
      const float* const own = from + i * from_stride + j;
      float* const there = to + j * to_stride + i;
      if (height == kBlock && width == kBlock) {
        transpose_block(own, from_stride, there, to_stride, factor);
      } else {
        transpose_rest(own, from_stride, there, to_stride, height, width, factor);
      }
    }
  }
}

[[maybe_unused]] AEROGEL_INLINE void transpose(const float* from, int64_t from_stride, float* to,
                                               int64_t to_stride, int64_t rows, int64_t cols) {
  transpose_scaled(from, from_stride, to, to_stride, rows, cols, 1.0f);
}

}  // namespace
}  // namespace aerogel::AEROGEL_ISA
