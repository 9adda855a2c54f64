// A thin SIMD vocabulary: one vector type, Vec, with kLanes float32 lanes, and the dozen operations
// the kernels need. Each translation unit made from isa.cpp.in defines AEROGEL_ISA (a namespace
// name) and one AEROGEL_USE_* macro and is compiled with that instruction set's flags.
//
// Everything that depends on the instruction set lives in namespace aerogel::AEROGEL_ISA. Sources
// included from there must not instantiate inline functions or templates of the standard library:
// the linker keeps one copy of those, and it might be the one that needs AVX-512.
//
// Bare NaN rule: max(a, b) and min(a, b) return b if either is NaN, so relu(x) = max(zero, x)
// propagates NaN as torch does.
#pragma once

#include <stdint.h>

#if defined(AEROGEL_USE_AVX512) || defined(AEROGEL_USE_AVX2)
#include <immintrin.h>
#elif defined(AEROGEL_USE_NEON)
#include <arm_neon.h>
#endif

#ifndef AEROGEL_ISA
#error "simd.h is for sources compiled once per instruction set: see isa.cpp.in"
#endif

#define AEROGEL_INLINE inline __attribute__((always_inline))
#define AEROGEL_NOINLINE __attribute__((noinline))

namespace aerogel::AEROGEL_ISA {

#if defined(AEROGEL_USE_AVX512)

using Vec = __m512;
constexpr int kLanes = 16;
constexpr int kRegisters = 32;

AEROGEL_INLINE __mmask16 lane_mask(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
AEROGEL_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
AEROGEL_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
AEROGEL_INLINE Vec load_n(const float* p, int64_t n) {
  return _mm512_maskz_loadu_ps(lane_mask(n), p);
}
AEROGEL_INLINE void store_n(float* p, Vec v, int64_t n) {
  _mm512_mask_storeu_ps(p, lane_mask(n), v);
}
AEROGEL_INLINE Vec broadcast(float x) { return _mm512_set1_ps(x); }
// fma: a b + c; fnma: c - a b.
AEROGEL_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
AEROGEL_INLINE Vec fnma(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }
AEROGEL_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
AEROGEL_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
AEROGEL_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
AEROGEL_INLINE Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
AEROGEL_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
AEROGEL_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
AEROGEL_INLINE Vec abs(Vec a) { return _mm512_abs_ps(a); }
AEROGEL_INLINE Vec sqrt(Vec a) { return _mm512_sqrt_ps(a); }
AEROGEL_INLINE Vec round(Vec a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// a where x >= 0, otherwise b (also where x is NaN).
AEROGEL_INLINE Vec select_nonnegative(Vec x, Vec a, Vec b) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GE_OQ), b, a);
}
// a * 2^n for integral n in the normal range.
AEROGEL_INLINE Vec scale_by_power(Vec a, Vec n) {
  return _mm512_castsi512_ps(_mm512_add_epi32(
      _mm512_castps_si512(a), _mm512_slli_epi32(_mm512_cvtps_epi32(n), 23)));
}
// Four consecutive floats, each of which broadcast_lane spreads over a vector.
using Quad = __m512;
AEROGEL_INLINE Quad load_quad(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
AEROGEL_INLINE Vec broadcast_lane(Quad q, int lane) {
  switch (lane) {
    case 0: return _mm512_permute_ps(q, 0x00);
    case 1: return _mm512_permute_ps(q, 0x55);
    case 2: return _mm512_permute_ps(q, 0xAA);
    default: return _mm512_permute_ps(q, 0xFF);
  }
}
// Whether broadcast_lane takes the place of a multiply-add. On Intel's processors shuffles of 512 bits
// have one port, which is one of the two for multiply-adds; on AMD's they have others.
AEROGEL_INLINE bool lanes_compete_with_fma() { return __builtin_cpu_is("intel"); }
// Whether asking early for rows of many lines costs more than it saves, because the hardware fetches
// the rest of a row after its first lines. Measured on Sapphire Rapids; elsewhere software asks.
AEROGEL_INLINE bool follows_long_rows() { return __builtin_cpu_is("intel"); }

#elif defined(AEROGEL_USE_AVX2)

using Vec = __m256;
constexpr int kLanes = 8;
constexpr int kRegisters = 16;

AEROGEL_INLINE __m256i lane_mask(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
AEROGEL_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
AEROGEL_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
AEROGEL_INLINE Vec load_n(const float* p, int64_t n) {
  return _mm256_maskload_ps(p, lane_mask(n));
}
AEROGEL_INLINE void store_n(float* p, Vec v, int64_t n) { _mm256_maskstore_ps(p, lane_mask(n), v); }
AEROGEL_INLINE Vec broadcast(float x) { return _mm256_set1_ps(x); }
AEROGEL_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
AEROGEL_INLINE Vec fnma(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a, b, c); }
AEROGEL_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
AEROGEL_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
AEROGEL_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
AEROGEL_INLINE Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
AEROGEL_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
AEROGEL_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
AEROGEL_INLINE Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
AEROGEL_INLINE Vec sqrt(Vec a) { return _mm256_sqrt_ps(a); }
AEROGEL_INLINE Vec round(Vec a) {
  return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
AEROGEL_INLINE Vec select_nonnegative(Vec x, Vec a, Vec b) {
  return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GE_OQ));
}
AEROGEL_INLINE Vec scale_by_power(Vec a, Vec n) {
  return _mm256_castsi256_ps(_mm256_add_epi32(
      _mm256_castps_si256(a), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
}
using Quad = __m256;
AEROGEL_INLINE Quad load_quad(const float* p) {
  return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
}
AEROGEL_INLINE Vec broadcast_lane(Quad q, int lane) {
  switch (lane) {
    case 0: return _mm256_permute_ps(q, 0x00);
    case 1: return _mm256_permute_ps(q, 0x55);
    case 2: return _mm256_permute_ps(q, 0xAA);
    default: return _mm256_permute_ps(q, 0xFF);
  }
}
AEROGEL_INLINE bool lanes_compete_with_fma() { return false; }
AEROGEL_INLINE bool follows_long_rows() { return false; }

#elif defined(AEROGEL_USE_NEON)

using Vec = float32x4_t;
constexpr int kLanes = 4;
constexpr int kRegisters = 32;

AEROGEL_INLINE Vec load(const float* p) { return vld1q_f32(p); }
AEROGEL_INLINE void store(float* p, Vec v) { vst1q_f32(p, v); }
AEROGEL_INLINE Vec load_n(const float* p, int64_t n) {
  float lanes[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return vld1q_f32(lanes);
}
AEROGEL_INLINE void store_n(float* p, Vec v, int64_t n) {
  float lanes[4];
  vst1q_f32(lanes, v);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}
AEROGEL_INLINE Vec broadcast(float x) { return vdupq_n_f32(x); }
AEROGEL_INLINE Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
AEROGEL_INLINE Vec fnma(Vec a, Vec b, Vec c) { return vfmsq_f32(c, a, b); }
AEROGEL_INLINE Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
AEROGEL_INLINE Vec sub(Vec a, Vec b) { return vsubq_f32(a, b); }
AEROGEL_INLINE Vec mul(Vec a, Vec b) { return vmulq_f32(a, b); }
AEROGEL_INLINE Vec div(Vec a, Vec b) { return vdivq_f32(a, b); }
AEROGEL_INLINE Vec max(Vec a, Vec b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
AEROGEL_INLINE Vec min(Vec a, Vec b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
AEROGEL_INLINE Vec abs(Vec a) { return vabsq_f32(a); }
AEROGEL_INLINE Vec sqrt(Vec a) { return vsqrtq_f32(a); }
AEROGEL_INLINE Vec round(Vec a) { return vrndnq_f32(a); }
AEROGEL_INLINE Vec select_nonnegative(Vec x, Vec a, Vec b) {
  return vbslq_f32(vcgezq_f32(x), a, b);
}
AEROGEL_INLINE Vec scale_by_power(Vec a, Vec n) {
  return vreinterpretq_f32_s32(
      vaddq_s32(vreinterpretq_s32_f32(a), vshlq_n_s32(vcvtnq_s32_f32(n), 23)));
}
// The compiler folds the lane into fmla's by-element form.
using Quad = float32x4_t;
AEROGEL_INLINE Quad load_quad(const float* p) { return vld1q_f32(p); }
AEROGEL_INLINE Vec broadcast_lane(Quad q, int lane) {
  switch (lane) {
    case 0: return vdupq_laneq_f32(q, 0);
    case 1: return vdupq_laneq_f32(q, 1);
    case 2: return vdupq_laneq_f32(q, 2);
    default: return vdupq_laneq_f32(q, 3);
  }
}
AEROGEL_INLINE bool lanes_compete_with_fma() { return false; }
AEROGEL_INLINE bool follows_long_rows() { return false; }

#else  // plain C++: fixed-size loops that the compiler turns into whatever the baseline offers

struct Vec {
  float lane[4];
};
constexpr int kLanes = 4;
constexpr int kRegisters = 16;

template <class F>
AEROGEL_INLINE Vec lanewise(F f) {
  Vec out;
  for (int i = 0; i < kLanes; ++i) out.lane[i] = f(i);
  return out;
}
AEROGEL_INLINE Vec load(const float* p) {
  return lanewise([=](int i) { return p[i]; });
}
AEROGEL_INLINE void store(float* p, Vec v) {
  for (int i = 0; i < kLanes; ++i) p[i] = v.lane[i];
}
AEROGEL_INLINE Vec load_n(const float* p, int64_t n) {
  return lanewise([=](int i) { return i < n ? p[i] : 0.0f; });
}
AEROGEL_INLINE void store_n(float* p, Vec v, int64_t n) {
  for (int i = 0; i < kLanes; ++i) {
    if (i < n) p[i] = v.lane[i];
  }
}
AEROGEL_INLINE Vec broadcast(float x) {
  return lanewise([=](int) { return x; });
}
AEROGEL_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return lanewise([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}
AEROGEL_INLINE Vec fnma(Vec a, Vec b, Vec c) {
  return lanewise([&](int i) { return c.lane[i] - a.lane[i] * b.lane[i]; });
}
AEROGEL_INLINE Vec add(Vec a, Vec b) {
  return lanewise([&](int i) { return a.lane[i] + b.lane[i]; });
}
AEROGEL_INLINE Vec sub(Vec a, Vec b) {
  return lanewise([&](int i) { return a.lane[i] - b.lane[i]; });
}
AEROGEL_INLINE Vec mul(Vec a, Vec b) {
  return lanewise([&](int i) { return a.lane[i] * b.lane[i]; });
}
AEROGEL_INLINE Vec div(Vec a, Vec b) {
  return lanewise([&](int i) { return a.lane[i] / b.lane[i]; });
}
AEROGEL_INLINE Vec max(Vec a, Vec b) {
  return lanewise([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
AEROGEL_INLINE Vec min(Vec a, Vec b) {
  return lanewise([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
AEROGEL_INLINE Vec abs(Vec a) {
  return lanewise([&](int i) { return __builtin_fabsf(a.lane[i]); });
}
AEROGEL_INLINE Vec sqrt(Vec a) {
  return lanewise([&](int i) { return __builtin_sqrtf(a.lane[i]); });
}
AEROGEL_INLINE Vec round(Vec a) {
  return lanewise([&](int i) { return __builtin_rintf(a.lane[i]); });
}
AEROGEL_INLINE Vec select_nonnegative(Vec x, Vec a, Vec b) {
  return lanewise([&](int i) { return x.lane[i] >= 0.0f ? a.lane[i] : b.lane[i]; });
}
AEROGEL_INLINE Vec scale_by_power(Vec a, Vec n) {
  return lanewise([&](int i) {
    // A NaN exponent comes with a NaN in a, which any scale keeps.
    const float e = n.lane[i];
    const int32_t power = e == e ? static_cast<int32_t>(e) : 0;
    uint32_t bits;
    __builtin_memcpy(&bits, &a.lane[i], sizeof(bits));
    bits += static_cast<uint32_t>(power) << 23;
    float out;
    __builtin_memcpy(&out, &bits, sizeof(out));
    return out;
  });
}
using Quad = Vec;
AEROGEL_INLINE Quad load_quad(const float* p) { return load(p); }
AEROGEL_INLINE Vec broadcast_lane(Quad q, int lane) { return broadcast(q.lane[lane]); }
AEROGEL_INLINE bool lanes_compete_with_fma() { return false; }
AEROGEL_INLINE bool follows_long_rows() { return false; }

#endif

AEROGEL_INLINE Vec zero() { return broadcast(0.0f); }

// The first n lanes (1 <= n <= kLanes); whole vectors take the unmasked path.
AEROGEL_INLINE Vec load_upto(const float* p, int64_t n) {
  return n >= kLanes ? load(p) : load_n(p, n);
}
AEROGEL_INLINE void store_upto(float* p, Vec v, int64_t n) {
  if (n >= kLanes) {
    store(p, v);
  } else {
    store_n(p, v, n);
  }
}

}  // namespace aerogel::AEROGEL_ISA
