// Arithmetic of attention: powers of two, tanh, rows in 16 bits, and the one register tile that all
// its products use.

namespace aerogel::AEROGEL_ISA {
namespace {

constexpr float kLog2e = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
constexpr float kInfinity = __builtin_inff();

// The widest panel of columns, in vectors, and the rows of a register tile: with 32 registers 24
// sums, 4 columns and a broadcast; with 16 registers 12, 2 and 1.
constexpr int kWide = kRegisters >= 32 ? 4 : 2;
constexpr int kTall = 6;

// A constant that overloads can take.
template <int N>
struct Size {
  static constexpr int value = N;
};

// Calls f(Size<rows>, first) for tiles of 6, 4, 2 and 1 rows that cover [0, count).
template <class F>
AEROGEL_INLINE void for_rows(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + kTall <= count; i += kTall) f(Size<kTall>{}, i);
  if (i + 4 <= count) {
    f(Size<4>{}, i);
    i += 4;
  }
  if (i + 2 <= count) {
    f(Size<2>{}, i);
    i += 2;
  }
  if (i < count) f(Size<1>{}, i);
}

// sums[r][v] += left(k, r) * right[k * stride + v] for k < depth.
template <int R, int W, class Left>
AEROGEL_INLINE void multiply(Vec (&sums)[R][W], const Left& left, const float* right,
                             int64_t stride, int64_t depth) {
  for (int64_t k = 0; k < depth; ++k, right += stride) {
    Vec x[W];
#pragma GCC unroll 4
    for (int v = 0; v < W; ++v) x[v] = load(right + v * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const Vec w = broadcast(left(k, r));
#pragma GCC unroll 4
      for (int v = 0; v < W; ++v) sums[r][v] = fma(w, x[v], sums[r][v]);
    }
  }
}

// 2^x for x < 127, and exactly 0 where that is no normal number. Minimax on [-1/2, 1/2] with 2^0 = 1:
// relative error 1e-7.
AEROGEL_INLINE Vec exp2_or_zero(Vec x) {
#if defined(AEROGEL_USE_AVX512)
  const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
#else
  const Vec below = sub(broadcast(-126.0f), x);
  x = max(broadcast(-126.0f), x);
#endif
  const Vec n = round(x);
  const Vec r = sub(x, n);
  Vec p = broadcast(1.3264727e-3f);
  p = fma(p, r, broadcast(9.6715126e-3f));
  p = fma(p, r, broadcast(5.5507337e-2f));
  p = fma(p, r, broadcast(2.4022242e-1f));
  p = fma(p, r, broadcast(6.9314698e-1f));
  p = fma(p, r, broadcast(1.0f));
#if defined(AEROGEL_USE_AVX512)
  return _mm512_maskz_scalef_ps(normal, p, n);
#else
  return select_nonnegative(below, zero(), scale_by_power(p, n));
#endif
}

// A polynomial near 0 (Cephes, tanhf), where 1 - 2 / (e^2x + 1) would cancel.
AEROGEL_INLINE Vec tanh(Vec x) {
  const Vec a = abs(x), z = mul(x, x);
  Vec p = broadcast(-5.70498872745e-3f);
  p = fma(p, z, broadcast(2.06390887954e-2f));
  p = fma(p, z, broadcast(-5.37397155531e-2f));
  p = fma(p, z, broadcast(1.33314422036e-1f));
  p = fma(p, z, broadcast(-3.33332819422e-1f));
  p = fma(mul(p, z), x, x);
  const Vec e = exp_nonpositive(mul(a, broadcast(-2.0f)));
  const Vec t = div(sub(broadcast(1.0f), e), add(broadcast(1.0f), e));
  return select_nonnegative(sub(broadcast(0.625f), a), p,
                            select_nonnegative(x, t, sub(zero(), t)));
}

// What a score is shifted by: its maximum, or 0 for a query that sees no key, since -inf - -inf is
// NaN.
AEROGEL_INLINE Vec shift_of(Vec maximum) {
  return select_nonnegative(sub(maximum, broadcast(-__FLT_MAX__)), maximum, zero());
}

AEROGEL_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t bits = h & 0x7fffu;
  uint32_t out;
  if (bits >= 0x7c00u) {
    out = 0x7f800000u | (bits & 0x3ffu) << 13;
  } else if (bits >= 0x400u) {
    out = (bits << 13) + (112u << 23);
  } else {
    const float value = static_cast<float>(bits) * 5.9604644775390625e-8f;  // 2^-24
    __builtin_memcpy(&out, &value, sizeof out);
  }
  out |= sign;
  float value;
  __builtin_memcpy(&value, &out, sizeof value);
  return value;
}

// To the nearest, ties to even, as torch does.
AEROGEL_INLINE uint16_t half_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // from 65520 on
  if (bits >= 0x38800000u) {
    bits += 0xfffu + (bits >> 13 & 1u);
    return static_cast<uint16_t>(sign | (bits - (112u << 23)) >> 13);
  }
  float magnitude;
  __builtin_memcpy(&magnitude, &bits, sizeof magnitude);
  magnitude += 0.5f;  // its last bit is worth 2^-24 there
  __builtin_memcpy(&bits, &magnitude, sizeof bits);
  return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
}

AEROGEL_INLINE uint16_t bfloat16_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

struct Float16Values {
  using Stored = uint16_t;
  static AEROGEL_INLINE Vec load(const uint16_t* p) {
#if defined(AEROGEL_USE_AVX512)
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(AEROGEL_USE_AVX2)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(AEROGEL_USE_NEON)
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#else
    return lanewise([=](int i) { return half_to_float(p[i]); });
#endif
  }
};

template <class Values>
AEROGEL_INLINE Vec load_row(const typename Values::Stored* p, int64_t n) {
  return n >= kLanes ? Values::load(p) : load_values_n<Values>(p, n);
}
template <>
AEROGEL_INLINE Vec load_row<Float32Values>(const float* p, int64_t n) {
  return load_upto(p, n);
}

template <class Values>
AEROGEL_INLINE void widen(const void* from, float* to, int64_t n) {
  const auto* p = static_cast<const typename Values::Stored*>(from);
  for (int64_t i = 0; i < n; i += kLanes) store_upto(to + i, load_row<Values>(p + i, n - i), n - i);
}

AEROGEL_INLINE int64_t bytes_of(AttendType type) { return type == AttendType::kFloat32 ? 4 : 2; }

AEROGEL_INLINE void widen_row(AttendType type, const void* from, float* to, int64_t n) {
  switch (type) {
    case AttendType::kFloat32: return widen<Float32Values>(from, to, n);
    case AttendType::kBfloat16: return widen<Bfloat16Values>(from, to, n);
    case AttendType::kFloat16: return widen<Float16Values>(from, to, n);
  }
}

AEROGEL_INLINE void narrow_row(AttendType type, const float* from, void* to, int64_t n) {
  auto* p = static_cast<uint16_t*>(to);
  switch (type) {
    case AttendType::kFloat32:
      __builtin_memcpy(to, from, static_cast<size_t>(n) * sizeof(float));
      break;
    case AttendType::kBfloat16:
      for (int64_t i = 0; i < n; ++i) p[i] = bfloat16_of(from[i]);
      break;
    case AttendType::kFloat16:
      for (int64_t i = 0; i < n; ++i) p[i] = half_of(from[i]);
      break;
  }
}

}  // namespace
}  // namespace aerogel::AEROGEL_ISA
