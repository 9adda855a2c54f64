// Vocabulary that only the layers need: masks, every second element, sums.
#pragma once

#include "simd.h"

namespace aerogel::AEROGEL_ISA {
namespace {

#if defined(AEROGEL_USE_AVX512)

AEROGEL_INLINE Vec keep(Vec v, Vec mask) { return _mm512_and_ps(v, mask); }
AEROGEL_INLINE Vec even_of(Vec a, Vec b) {
  const __m512i pick = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return _mm512_permutex2var_ps(a, pick, b);
}
AEROGEL_INLINE Vec odd_of(Vec a, Vec b) {
  const __m512i pick = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return _mm512_permutex2var_ps(a, pick, b);
}
AEROGEL_INLINE Vec split_order(Vec v) { return v; }
// A mask in a register of its own costs a load nothing.
using LaneMask = __mmask16;
AEROGEL_INLINE LaneMask mask_of(Vec bits) {
  return _mm512_test_epi32_mask(_mm512_castps_si512(bits), _mm512_castps_si512(bits));
}
AEROGEL_INLINE Vec kept(Vec v, LaneMask mask) { return _mm512_maskz_mov_ps(mask, v); }
AEROGEL_INLINE Vec load_kept(const float* p, LaneMask mask) {
  return _mm512_maskz_loadu_ps(mask, p);
}
// v moved by one lane; the free lane comes from the neighbour.
AEROGEL_INLINE Vec shift_up(Vec before, Vec v) {
  return _mm512_castsi512_ps(
      _mm512_alignr_epi32(_mm512_castps_si512(v), _mm512_castps_si512(before), kLanes - 1));
}
AEROGEL_INLINE Vec shift_down(Vec v, Vec after) {
  return _mm512_castsi512_ps(
      _mm512_alignr_epi32(_mm512_castps_si512(after), _mm512_castps_si512(v), 1));
}
// The lanes whose bits are set in both a and b, zero in the others, for which nothing is read.
AEROGEL_INLINE Vec load_where(const float* p, uint32_t a, uint32_t b) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>(a & b), p);
}

#elif defined(AEROGEL_USE_AVX2)

AEROGEL_INLINE Vec keep(Vec v, Vec mask) { return _mm256_and_ps(v, mask); }
// Within 128-bit halves only, which is cheap; split_order undoes the order (and makes it).
AEROGEL_INLINE Vec even_of(Vec a, Vec b) { return _mm256_shuffle_ps(a, b, 0x88); }
AEROGEL_INLINE Vec odd_of(Vec a, Vec b) { return _mm256_shuffle_ps(a, b, 0xdd); }
AEROGEL_INLINE Vec split_order(Vec v) {
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8));
}
AEROGEL_INLINE Vec load_where(const float* p, uint32_t a, uint32_t b) {
  const __m256i bits = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(a)),
                                        _mm256_set1_epi32(static_cast<int>(b)));
  const __m256i to_sign = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
  return _mm256_maskload_ps(p, _mm256_sllv_epi32(bits, to_sign));
}

#elif defined(AEROGEL_USE_NEON)

AEROGEL_INLINE Vec keep(Vec v, Vec mask) {
  return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v), vreinterpretq_u32_f32(mask)));
}
AEROGEL_INLINE Vec even_of(Vec a, Vec b) { return vuzp1q_f32(a, b); }
AEROGEL_INLINE Vec odd_of(Vec a, Vec b) { return vuzp2q_f32(a, b); }
AEROGEL_INLINE Vec split_order(Vec v) { return v; }

#else

AEROGEL_INLINE Vec keep(Vec v, Vec mask) {
  return lanewise([&](int i) {
    uint32_t bits, wanted;
    __builtin_memcpy(&bits, &v.lane[i], sizeof bits);
    __builtin_memcpy(&wanted, &mask.lane[i], sizeof wanted);
    bits &= wanted;
    float out;
    __builtin_memcpy(&out, &bits, sizeof out);
    return out;
  });
}
AEROGEL_INLINE Vec even_of(Vec a, Vec b) {
  return lanewise([&](int i) { return i < 2 ? a.lane[2 * i] : b.lane[2 * i - 4]; });
}
AEROGEL_INLINE Vec odd_of(Vec a, Vec b) {
  return lanewise([&](int i) { return i < 2 ? a.lane[2 * i + 1] : b.lane[2 * i - 3]; });
}
AEROGEL_INLINE Vec split_order(Vec v) { return v; }

#endif

#if !defined(AEROGEL_USE_AVX512) && !defined(AEROGEL_USE_AVX2)
AEROGEL_INLINE Vec load_where(const float* p, uint32_t a, uint32_t b) {
  const uint32_t bits = a & b;
  if (bits == (1u << kLanes) - 1u) return load(p);
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = bits >> i & 1u ? p[i] : 0.0f;
  return load(lanes);
}
#endif

// Keeps a value that is used several times from being loaded anew at every use.
#if defined(AEROGEL_USE_AVX512)
AEROGEL_INLINE void in_register(Vec& v) { asm("" : "+v"(v)); }
#elif defined(AEROGEL_USE_AVX2)
AEROGEL_INLINE void in_register(Vec& v) { asm("" : "+x"(v)); }
#elif defined(AEROGEL_USE_NEON)
AEROGEL_INLINE void in_register(Vec& v) { asm("" : "+w"(v)); }
#else
AEROGEL_INLINE void in_register(Vec&) {}
#endif

// Weights that stay in registers while a plane passes by.
template <int kCount>
struct TapVectors {
  Vec taps[kCount];

  AEROGEL_INLINE explicit TapVectors(const float* weight) {
#pragma GCC unroll 32
    for (int t = 0; t < kCount; ++t) {
      taps[t] = broadcast(weight[t]);
      in_register(taps[t]);
    }
  }
  AEROGEL_INLINE Vec operator[](int t) const { return taps[t]; }
};

// The maximum, or NaN if either is one.
#if defined(AEROGEL_USE_AVX512)
AEROGEL_INLINE Vec max_or_nan(Vec a, Vec b) {
  return _mm512_mask_mov_ps(max(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
}
#elif defined(AEROGEL_USE_AVX2)
AEROGEL_INLINE Vec max_or_nan(Vec a, Vec b) {
  return _mm256_blendv_ps(max(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
}
#elif defined(AEROGEL_USE_NEON)
AEROGEL_INLINE Vec max_or_nan(Vec a, Vec b) { return vmaxq_f32(a, b); }
#else
AEROGEL_INLINE Vec max_or_nan(Vec a, Vec b) {
  return lanewise([&](int i) {
    return a.lane[i] > b.lane[i] || a.lane[i] != a.lane[i] ? a.lane[i] : b.lane[i];
  });
}
#endif

AEROGEL_INLINE float sum_lanes(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

AEROGEL_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
AEROGEL_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace
}  // namespace aerogel::AEROGEL_ISA
