// Polynomial products modulo z^n - e^(2 pi i f); see fft_conv.h for the idea.
//
// Reading order: complex numbers and splits -> the tile of 16 x 16 values, where the last splits go
// across lanes -> blocks of any size, recursively -> the outer step, between real segments and
// blocks.
#include "fft_conv.h"
#include "kernels.h"
#include "simd.h"
#include "transpose.inl"

namespace aerogel::AEROGEL_ISA {
namespace {

constexpr int64_t kPair = 2 * kFftGroup;  // floats of one group

// ---------------------------------------------------------------- complex numbers

struct Complex {
  Vec re, im;
};

AEROGEL_INLINE Complex load_complex(const float* p) { return {load(p), load(p + kFftGroup)}; }
AEROGEL_INLINE void store_complex(float* p, Complex v) {
  store(p, v.re);
  store(p + kFftGroup, v.im);
}
AEROGEL_INLINE Complex broadcast_complex(const float* p) {
  return {broadcast(p[0]), broadcast(p[1])};
}
AEROGEL_INLINE Complex operator+(Complex a, Complex b) {
  return {add(a.re, b.re), add(a.im, b.im)};
}
AEROGEL_INLINE Complex operator-(Complex a, Complex b) {
  return {sub(a.re, b.re), sub(a.im, b.im)};
}
AEROGEL_INLINE Complex operator*(Complex a, Complex b) {
  return {fnma(a.im, b.im, mul(a.re, b.re)), fma(a.im, b.re, mul(a.re, b.im))};
}
AEROGEL_INLINE Complex times_conjugate(Complex a, Complex b) {
  return {fma(a.im, b.im, mul(a.re, b.re)), fnma(a.re, b.im, mul(a.im, b.re))};
}
AEROGEL_INLINE Complex plus_i(Complex a, Complex b) { return {sub(a.re, b.im), add(a.im, b.re)}; }
AEROGEL_INLINE Complex minus_i(Complex a, Complex b) { return {add(a.re, b.im), sub(a.im, b.re)}; }

// ---------------------------------------------------------------- splits

// b, b^2, b^3 of a split into four.
struct Powers {
  Complex one, two, three;
};
AEROGEL_INLINE Powers broadcast_powers(const float* p) {
  return {broadcast_complex(p), broadcast_complex(p + 2), broadcast_complex(p + 4)};
}
AEROGEL_INLINE Powers load_powers(const float* p) {
  return {load_complex(p), load_complex(p + kPair), load_complex(p + 2 * kPair)};
}

// Modulo z^(4h) - b^4 to z^h - b, z^h + b, z^h - ib, z^h + ib.
AEROGEL_INLINE void split4(Complex& x0, Complex& x1, Complex& x2, Complex& x3, const Powers& b) {
  const Complex t1 = x1 * b.one, t2 = x2 * b.two, t3 = x3 * b.three;
  const Complex even = x0 + t2, even_i = x0 - t2, odd = t1 + t3, odd_i = t1 - t3;
  x0 = even + odd;
  x1 = even - odd;
  x2 = plus_i(even_i, odd_i);
  x3 = minus_i(even_i, odd_i);
}

// Its inverse, four times too large.
AEROGEL_INLINE void join4(Complex& x0, Complex& x1, Complex& x2, Complex& x3, const Powers& b) {
  const Complex even = x0 + x1, odd = x0 - x1, even_i = x2 + x3, odd_i = x2 - x3;
  x0 = even + even_i;
  x1 = times_conjugate(minus_i(odd, odd_i), b.one);
  x2 = times_conjugate(even - even_i, b.two);
  x3 = times_conjugate(plus_i(odd, odd_i), b.three);
}

constexpr bool kForward = true, kInverse = false;

// A block of 4 * quarter complex values at z.
template <bool kDirection>
AEROGEL_INLINE void pass4(float* z, int64_t quarter, const float* twiddles) {
  const Powers b = broadcast_powers(twiddles);
  const int64_t step = 2 * quarter;
  for (int64_t j = 0; j < step; j += kPair) {
    for (int64_t v = 0; v < kFftGroup; v += kLanes) {
      float* p = z + j + v;
      Complex x0 = load_complex(p), x1 = load_complex(p + step), x2 = load_complex(p + 2 * step),
              x3 = load_complex(p + 3 * step);
      if (kDirection == kForward) {
        split4(x0, x1, x2, x3, b);
      } else {
        join4(x0, x1, x2, x3, b);
      }
      store_complex(p, x0);
      store_complex(p + step, x1);
      store_complex(p + 2 * step, x2);
      store_complex(p + 3 * step, x3);
    }
  }
}

// A block of 2 * half complex values at z.
template <bool kDirection>
AEROGEL_INLINE void pass2(float* z, int64_t half, const float* twiddles) {
  const Complex b = broadcast_complex(twiddles);
  const int64_t step = 2 * half;
  for (int64_t j = 0; j < step; j += kPair) {
    for (int64_t v = 0; v < kFftGroup; v += kLanes) {
      float* p = z + j + v;
      const Complex x0 = load_complex(p), x1 = load_complex(p + step);
      if (kDirection == kForward) {
        const Complex t = x1 * b;
        store_complex(p, x0 + t);
        store_complex(p + step, x0 - t);
      } else {
        store_complex(p, x0 + x1);
        store_complex(p + step, times_conjugate(x0 - x1, b));
      }
    }
  }
}

// ---------------------------------------------------------------- the tile

AEROGEL_INLINE void transpose_tile(const float* from, float* to) {
  for (int64_t part = 0; part < kPair; part += kFftGroup) {
    for (int64_t i = 0; i < kFftGroup; i += kBlock) {
      for (int64_t j = 0; j < kFftGroup; j += kBlock) {
        transpose_block(from + part + i * kPair + j, kPair, to + part + j * kPair + i, kPair);
      }
    }
  }
}

template <bool kDirection>
AEROGEL_INLINE void tile_rows(float* z, const float* twiddles) {
  if (kDirection == kForward) pass4<kForward>(z, kFftTile / 4, twiddles);
  for (int64_t q = 0; q < 4; ++q) {
    pass4<kDirection>(z + q * 4 * kPair, kFftGroup, twiddles + kFftSplitFloats * (1 + q));
  }
  if (kDirection == kInverse) pass4<kInverse>(z, kFftTile / 4, twiddles);
}

enum class Middle { kSpectrum, kProduct, kConjugate, kInvert };

// Rows 0..15 of a transposed tile are the coefficients of 16 blocks in the lanes. Two splits, the
// product, and back; a spectrum goes to `out`, everything else stays in t.
template <Middle kMiddle>
AEROGEL_INLINE void tile_lanes(float* t, const float* twiddles, const float* filter, float* out) {
  for (int64_t v = 0; v < kFftGroup; v += kLanes) {
    float* const column = t + v;
    if (kMiddle != Middle::kInvert) {
      const Powers b = load_powers(twiddles + v);
      for (int64_t i = 0; i < 4; ++i) {
        float* const p = column + i * kPair;
        Complex x0 = load_complex(p), x1 = load_complex(p + 4 * kPair),
                x2 = load_complex(p + 8 * kPair), x3 = load_complex(p + 12 * kPair);
        split4(x0, x1, x2, x3, b);
        store_complex(p, x0);
        store_complex(p + 4 * kPair, x1);
        store_complex(p + 8 * kPair, x2);
        store_complex(p + 12 * kPair, x3);
      }
    }
    for (int64_t q = 0; q < 4; ++q) {
      const Powers b = load_powers(twiddles + v + (1 + q) * 3 * kPair);
      float* const p = column + q * 4 * kPair;
      Complex x[4];
      for (int i = 0; i < 4; ++i) x[i] = load_complex(p + i * kPair);
      if (kMiddle != Middle::kInvert) split4(x[0], x[1], x[2], x[3], b);
      if (kMiddle == Middle::kProduct || kMiddle == Middle::kConjugate) {
        const float* const k = filter + v + q * 4 * kPair;
        for (int i = 0; i < 4; ++i) {
          const Complex factor = load_complex(k + i * kPair);
          x[i] = kMiddle == Middle::kProduct ? x[i] * factor : times_conjugate(x[i], factor);
        }
      }
      if (kMiddle != Middle::kSpectrum) join4(x[0], x[1], x[2], x[3], b);
      float* const to = kMiddle == Middle::kSpectrum ? out + v + q * 4 * kPair : p;
      for (int i = 0; i < 4; ++i) store_complex(to + i * kPair, x[i]);
    }
    if (kMiddle != Middle::kSpectrum) {
      const Powers b = load_powers(twiddles + v);
      for (int64_t i = 0; i < 4; ++i) {
        float* const p = column + i * kPair;
        Complex x0 = load_complex(p), x1 = load_complex(p + 4 * kPair),
                x2 = load_complex(p + 8 * kPair), x3 = load_complex(p + 12 * kPair);
        join4(x0, x1, x2, x3, b);
        store_complex(p, x0);
        store_complex(p + 4 * kPair, x1);
        store_complex(p + 8 * kPair, x2);
        store_complex(p + 12 * kPair, x3);
      }
    }
  }
}

// The tile at z, down, through the middle and up; a spectrum stays transposed.
template <Middle kMiddle>
AEROGEL_NOINLINE void tile(float* z, const float* twiddles, const float* filter) {
  alignas(64) float t[2 * kFftTile];
  const float* const lanes = twiddles + kFftTileRowFloats;
  if (kMiddle == Middle::kInvert) {
    for (int64_t i = 0; i < 2 * kFftTile; i += kLanes) store(t + i, load(z + i));
  } else {
    tile_rows<kForward>(z, twiddles);
    transpose_tile(z, t);
  }
  tile_lanes<kMiddle>(t, lanes, filter, z);
  if (kMiddle == Middle::kSpectrum) return;
  transpose_tile(t, z);
  tile_rows<kInverse>(z, twiddles);
}

// ---------------------------------------------------------------- blocks

// A block of `size` complex values; returns the twiddles of the block after it.
template <Middle kMiddle>
const float* run_block(float* z, int64_t size, const float* twiddles, const float* filter) {
  constexpr bool kDown = kMiddle != Middle::kInvert, kUp = kMiddle != Middle::kSpectrum;
  if (size == kFftTile) {
    tile<kMiddle>(z, twiddles, filter);
    return twiddles + kFftTileFloats;
  }
  const float* const own = twiddles;
  twiddles += kFftSplitFloats;
  const int64_t parts = fft_parts(size), part = size / parts;
  const bool four = parts == 4;
  if (kDown) four ? pass4<kForward>(z, part, own) : pass2<kForward>(z, part, own);
  for (int64_t q = 0; q < parts; ++q) {
    twiddles = run_block<kMiddle>(z + q * 2 * part, part, twiddles, filter + q * 2 * part);
  }
  if (kUp) four ? pass4<kInverse>(z, part, own) : pass2<kInverse>(z, part, own);
  return twiddles;
}

template <Middle kMiddle>
void all_blocks(const FftConvTables& t, float* work, int64_t stride, const float* filter) {
  for (int64_t q = 0; q < t.blocks; ++q) {
    run_block<kMiddle>(work + q * stride, t.block, t.twiddles + q * t.twiddle_stride,
                   filter + q * 2 * t.block);
  }
}

// ---------------------------------------------------------------- the outer step

AEROGEL_INLINE Vec load_signal(const FftSignal& s, int64_t at) {
  const int64_t left = s.length - at;
  if (left <= 0) return zero();
  const Vec x = load_upto(s.data + at, left);
  return s.gate ? mul(x, load_upto(s.gate + at, left)) : x;
}

// From kInputs real segments to the blocks.
template <int kInputs>
void split_outer(const FftConvTables& t, const FftSignal& signal, float* work, int64_t stride) {
  for (int64_t j = 0; j < t.block; j += kLanes) {
    Vec x[kInputs];
    for (int p = 0; p < kInputs; ++p) x[p] = load_signal(signal, p * t.block + j);
    float* z = work + 2 * (j / kFftGroup * kFftGroup) + j % kFftGroup;
    const float* a = t.analysis;
    for (int64_t q = 0; q < t.blocks; ++q, a += 2 * kInputs, z += stride) {
      Vec re = x[0], im = zero();  // the first segment's factor is 1
      for (int p = 1; p < kInputs; ++p) {
        re = fma(x[p], broadcast(a[2 * p]), re);
        im = fma(x[p], broadcast(a[2 * p + 1]), im);
      }
      store(z, re);
      store(z + kFftGroup, im);
    }
  }
}

// From the blocks to kInputs real segments.
template <int kInputs, bool kCarry>
void join_outer(const FftConvTables& t, const float* work, int64_t stride, const FftEnd& end) {
  const Vec sign = broadcast(end.adjoint ? -1.0f : 1.0f);
  for (int64_t j = 0; j < t.block; j += kLanes) {
    Vec out[kInputs], tail[kCarry ? kInputs : 1];
    for (int p = 0; p < kInputs; ++p) out[p] = zero();
    for (int p = 0; kCarry && p < kInputs; ++p) tail[p] = zero();
    const float* z = work + 2 * (j / kFftGroup * kFftGroup) + j % kFftGroup;
    const float *s = end.adjoint ? t.adjoint : t.synthesis, *r = t.tail;
    for (int64_t q = 0; q < t.blocks; ++q, s += 2 * kInputs, r += 2 * kInputs, z += stride) {
      const Complex x = load_complex(z);
      for (int p = 0; p < kInputs; ++p) {
        out[p] = fma(x.re, broadcast(s[2 * p]), out[p]);
        out[p] = fma(x.im, broadcast(s[2 * p + 1]), out[p]);
        if (kCarry) {
          tail[p] = fma(x.re, broadcast(r[2 * p]), tail[p]);
          tail[p] = fma(x.im, broadcast(r[2 * p + 1]), tail[p]);
        }
      }
    }
    for (int p = 0; p < kInputs; ++p) {
      const int64_t at = p * t.block + j, left = end.length - at;
      if (kCarry) {
        out[p] = fma(load(end.carry + at), sign, out[p]);
        store(end.carry + at, tail[p]);
      }
      if (left <= 0) continue;
      if (end.gate) out[p] = mul(out[p], load_upto(end.gate + at, left));
      store_upto(end.y + at, out[p], left);
    }
  }
}

template <int kInputs>
void join_outer_either(const FftConvTables& t, const float* work, int64_t stride,
                       const FftEnd& end) {
  end.carry ? join_outer<kInputs, true>(t, work, stride, end)
            : join_outer<kInputs, false>(t, work, stride, end);
}

void split_any(const FftConvTables& t, const FftSignal& signal, float* work, int64_t stride) {
  switch (t.inputs) {
    case 1: return split_outer<1>(t, signal, work, stride);
    case 2: return split_outer<2>(t, signal, work, stride);
    case 3: return split_outer<3>(t, signal, work, stride);
    case 4: return split_outer<4>(t, signal, work, stride);
    case 5: return split_outer<5>(t, signal, work, stride);
    case 6: return split_outer<6>(t, signal, work, stride);
    case 7: return split_outer<7>(t, signal, work, stride);
    case 8: return split_outer<8>(t, signal, work, stride);
    default: return split_outer<16>(t, signal, work, stride);
  }
}

void join_any(const FftConvTables& t, const float* work, int64_t stride, const FftEnd& end) {
  switch (t.inputs) {
    case 1: return join_outer_either<1>(t, work, stride, end);
    case 2: return join_outer_either<2>(t, work, stride, end);
    case 3: return join_outer_either<3>(t, work, stride, end);
    case 4: return join_outer_either<4>(t, work, stride, end);
    case 5: return join_outer_either<5>(t, work, stride, end);
    case 6: return join_outer_either<6>(t, work, stride, end);
    case 7: return join_outer_either<7>(t, work, stride, end);
    case 8: return join_outer_either<8>(t, work, stride, end);
    default: return join_outer_either<16>(t, work, stride, end);
  }
}

// ---------------------------------------------------------------- what the table holds

void analyse(const FftConvTables& t, const FftSignal& signal, float* spectrum, int64_t stride) {
  split_any(t, signal, spectrum, stride);
  all_blocks<Middle::kSpectrum>(t, spectrum, stride, spectrum);
}

void convolve(const FftConvTables& t, const FftSignal& signal, const float* filter, bool conjugate,
              float* work, int64_t stride) {
  split_any(t, signal, work, stride);
  conjugate ? all_blocks<Middle::kConjugate>(t, work, stride, filter)
            : all_blocks<Middle::kProduct>(t, work, stride, filter);
}

void accumulate(const FftConvTables& t, const float* x, const float* dy, const float* next,
                float* sum, int64_t stride) {
  for (int64_t q = 0; q < t.blocks; ++q) {
    for (int64_t j = 0; j < 2 * t.block; j += kPair) {
      for (int64_t v = 0; v < kFftGroup; v += kLanes) {
        const int64_t at = q * stride + j + v;
        Complex d = load_complex(dy + at);
        if (next) d = plus_i(d, load_complex(next + at));
        const Complex a = load_complex(sum + at);
        store_complex(sum + at, a + times_conjugate(d, load_complex(x + at)));
      }
    }
  }
}

void invert(const FftConvTables& t, float* work, int64_t stride) {
  all_blocks<Middle::kInvert>(t, work, stride, work);
}

}  // namespace

extern const FftConvKernels kFftConvKernels;
const FftConvKernels kFftConvKernels = {&analyse, &convolve, &join_any, &accumulate, &invert};

}  // namespace aerogel::AEROGEL_ISA
