// Dot products leave the registers eight at a time.
#pragma once

#include "simd.h"

namespace aerogel::AEROGEL_ISA {
namespace {

constexpr int kProducts = 8;

// sums[i] = the sum of all lanes of v[i].
#if defined(AEROGEL_USE_AVX2) || defined(AEROGEL_USE_AVX512)
#if defined(AEROGEL_USE_AVX512)
AEROGEL_INLINE __m256 halved(Vec v) {
  return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
}
#else
AEROGEL_INLINE __m256 halved(Vec v) { return v; }
#endif

AEROGEL_INLINE void sum_lanes(const Vec (&v)[kProducts], float* sums) {
  const __m256 a = _mm256_hadd_ps(halved(v[0]), halved(v[1]));
  const __m256 b = _mm256_hadd_ps(halved(v[2]), halved(v[3]));
  const __m256 c = _mm256_hadd_ps(halved(v[4]), halved(v[5]));
  const __m256 d = _mm256_hadd_ps(halved(v[6]), halved(v[7]));
  const __m256 low = _mm256_hadd_ps(a, b), high = _mm256_hadd_ps(c, d);
  _mm256_storeu_ps(sums, _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20),
                                       _mm256_permute2f128_ps(low, high, 0x31)));
}
#elif defined(AEROGEL_USE_NEON)
AEROGEL_INLINE void sum_lanes(const Vec (&v)[kProducts], float* sums) {
  for (int i = 0; i < kProducts; i += 4) {
    store(sums + i, vpaddq_f32(vpaddq_f32(v[i], v[i + 1]), vpaddq_f32(v[i + 2], v[i + 3])));
  }
}
#else
AEROGEL_INLINE void sum_lanes(const Vec (&v)[kProducts], float* sums) {
  for (int i = 0; i < kProducts; ++i) {
    float lanes[kLanes];
    store(lanes, v[i]);
    sums[i] = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
  }
}
#endif

}  // namespace
}  // namespace aerogel::AEROGEL_ISA
