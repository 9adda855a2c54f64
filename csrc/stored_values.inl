// Reading stored weights as vectors of float32, and what happens to sums before they are outputs.
//
// One struct for each ValueType: `load` takes kLanes values, `load_four` four, `one` a single one.
// Four is a vector of four lanes whatever the instruction set.
#pragma once

#include "simd_math.h"
#include "stored_values.h"

namespace aerogel::AEROGEL_ISA {
namespace {

#if defined(AEROGEL_USE_AVX512) || defined(AEROGEL_USE_AVX2)

using Four = __m128;
AEROGEL_INLINE Four four_zero() { return _mm_setzero_ps(); }
AEROGEL_INLINE Four four_spread(float x) { return _mm_set1_ps(x); }
AEROGEL_INLINE Four four_add(Four a, Four b) { return _mm_add_ps(a, b); }
AEROGEL_INLINE Four four_fma(Four a, Four b, Four c) { return _mm_fmadd_ps(a, b, c); }
AEROGEL_INLINE void four_store(float* p, Four v) { _mm_storeu_ps(p, v); }
AEROGEL_INLINE Four four_of(const float* a, const float* b, const float* c, const float* d) {
  const __m128 low = _mm_insert_ps(_mm_load_ss(a), _mm_load_ss(b), 0x10);
  return _mm_insert_ps(_mm_insert_ps(low, _mm_load_ss(c), 0x20), _mm_load_ss(d), 0x30);
}

AEROGEL_INLINE __m128i load_u32(const void* p) {
  int32_t bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return _mm_cvtsi32_si128(bits);
}
AEROGEL_INLINE Four four_float32(const float* p) { return _mm_loadu_ps(p); }
AEROGEL_INLINE Four four_bfloat16(const uint16_t* p) {
  const __m128i halves = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), halves));
}
AEROGEL_INLINE Four four_int8(const int8_t* p) {
  return _mm_cvtepi32_ps(_mm_cvtepi8_epi32(load_u32(p)));
}

#if defined(AEROGEL_USE_AVX512)
AEROGEL_INLINE Vec load_bfloat16(const uint16_t* p) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
AEROGEL_INLINE Vec load_int8(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
#else
AEROGEL_INLINE Vec load_bfloat16(const uint16_t* p) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
AEROGEL_INLINE Vec load_int8(const int8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
#endif

#else  // vectors of four lanes

using Four = Vec;
AEROGEL_INLINE Four four_zero() { return zero(); }
AEROGEL_INLINE Four four_spread(float x) { return broadcast(x); }
AEROGEL_INLINE Four four_add(Four a, Four b) { return add(a, b); }
AEROGEL_INLINE Four four_fma(Four a, Four b, Four c) { return fma(a, b, c); }
AEROGEL_INLINE void four_store(float* p, Four v) { store(p, v); }
AEROGEL_INLINE Four four_of(const float* a, const float* b, const float* c, const float* d) {
#if defined(AEROGEL_USE_NEON)
  const float32x4_t low = vld1q_lane_f32(b, vld1q_dup_f32(a), 1);
  return vld1q_lane_f32(d, vld1q_lane_f32(c, low, 2), 3);
#else
  return {{*a, *b, *c, *d}};
#endif
}

AEROGEL_INLINE Four four_float32(const float* p) { return load(p); }
#if defined(AEROGEL_USE_NEON)
AEROGEL_INLINE Four four_bfloat16(const uint16_t* p) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
}
AEROGEL_INLINE Four four_int8(const int8_t* p) {
  uint32_t bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  const int16x8_t wide = vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(bits)));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
}
#else
AEROGEL_INLINE Four four_bfloat16(const uint16_t* p) {
  return lanewise([=](int i) {
    const uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
    float out;
    __builtin_memcpy(&out, &bits, sizeof out);
    return out;
  });
}
AEROGEL_INLINE Four four_int8(const int8_t* p) {
  return lanewise([=](int i) { return static_cast<float>(p[i]); });
}
#endif
AEROGEL_INLINE Vec load_bfloat16(const uint16_t* p) { return four_bfloat16(p); }
AEROGEL_INLINE Vec load_int8(const int8_t* p) { return four_int8(p); }

#endif

struct Float32Values {
  using Stored = float;
  static AEROGEL_INLINE Vec load(const float* p) { return AEROGEL_ISA::load(p); }
  static AEROGEL_INLINE Four load_four(const float* p) { return four_float32(p); }
  static AEROGEL_INLINE float one(const float* p) { return *p; }
};

struct Bfloat16Values {
  using Stored = uint16_t;
  static AEROGEL_INLINE Vec load(const uint16_t* p) { return load_bfloat16(p); }
  static AEROGEL_INLINE Four load_four(const uint16_t* p) { return four_bfloat16(p); }
  static AEROGEL_INLINE float one(const uint16_t* p) {
    const uint32_t bits = static_cast<uint32_t>(*p) << 16;
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
  }
};

struct Int8Values {
  using Stored = int8_t;
  static AEROGEL_INLINE Vec load(const int8_t* p) { return load_int8(p); }
  static AEROGEL_INLINE Four load_four(const int8_t* p) { return four_int8(p); }
  static AEROGEL_INLINE float one(const int8_t* p) { return static_cast<float>(*p); }
};

// The first n values (1 <= n < kLanes); the other lanes are zero.
template <class Values>
AEROGEL_INLINE Vec load_values_n(const typename Values::Stored* p, int64_t n) {
  typename Values::Stored lanes[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return Values::load(lanes);
}

// y[i] = act(sums[i] * scales[i] + bias[i] + residual[i]) for i < count; all but sums may be null.
[[maybe_unused]] AEROGEL_NOINLINE void finish_sums(const float* sums, const float* scales,
                                                   const float* bias, const float* residual,
                                                   Activation activation, float* y,
                                                   int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t n = count - i;
    Vec v = load_upto(sums + i, n);
    if (scales) v = mul(v, load_upto(scales + i, n));
    if (bias) v = add(v, load_upto(bias + i, n));
    if (residual) v = add(v, load_upto(residual + i, n));
    store_upto(y + i, activate(v, activation), n);
  }
}

}  // namespace
}  // namespace aerogel::AEROGEL_ISA
