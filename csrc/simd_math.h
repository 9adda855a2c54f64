// Vectorised activation functions, absolute error about 1e-6 and relative error about 1e-6 where
// the function is not tiny; NaN goes through every one of them.
#pragma once

#include "epilogue.h"
#include "simd.h"

namespace aerogel::AEROGEL_ISA {

// exp(x) for x <= 0: 2^n * p(r) with n = round(x log2 e), |r| <= ln2 / 2. Everything below -87
// gives the smallest normal number instead of a denormal.
AEROGEL_INLINE Vec exp_nonpositive(Vec x) {
  x = max(broadcast(-87.0f), x);
  const Vec n = round(mul(x, broadcast(1.44269504f)));
  Vec r = fma(n, broadcast(-0.693359375f), x);  // ln 2 in two parts
  r = fma(n, broadcast(2.12194440e-4f), r);
  Vec p = broadcast(1.0f / 720.0f);  // Taylor: the remainder is 1.3e-7 at |r| = 0.35
  p = fma(p, r, broadcast(1.0f / 120.0f));
  p = fma(p, r, broadcast(1.0f / 24.0f));
  p = fma(p, r, broadcast(1.0f / 6.0f));
  p = fma(p, r, broadcast(0.5f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
  return scale_by_power(p, n);
}

AEROGEL_INLINE Vec sigmoid(Vec x) {
  const Vec e = exp_nonpositive(sub(zero(), abs(x)));
  return div(select_nonnegative(x, broadcast(1.0f), e), add(broadcast(1.0f), e));
}

AEROGEL_INLINE Vec relu(Vec x) { return max(zero(), x); }

AEROGEL_INLINE Vec relu6(Vec x) { return min(broadcast(6.0f), relu(x)); }

AEROGEL_INLINE Vec hardswish(Vec x) {
  const Vec gate = relu6(add(x, broadcast(3.0f)));
  return mul(mul(x, gate), broadcast(1.0f / 6.0f));
}

AEROGEL_INLINE Vec silu(Vec x) { return mul(x, sigmoid(x)); }

// x Phi(x) = relu(x) - |x| Phi(-|x|), free of cancellation, and 2 Phi(-a) = 1 / p(a)^16: that root is
// so smooth that a polynomial gives it (the form of Abramowitz and Stegun, Handbook of Mathematical
// Functions, 7.1.28). Coefficients: minimax on [0, 6] for the error of a / p^16, which is 9e-8;
// beyond, p^16 only grows. Half the work of exp and a rational factor.
AEROGEL_INLINE Vec gelu(Vec x) {
  const Vec a = min(broadcast(14.0f), abs(x));  // inf / inf is NaN
  Vec p = broadcast(1.9346521185e-7f);
  p = fma(p, a, broadcast(-1.7385102637e-6f));
  p = fma(p, a, broadcast(1.1548247130e-5f));
  p = fma(p, a, broadcast(3.7234563934e-5f));
  p = fma(p, a, broadcast(5.1877843362e-5f));
  p = fma(p, a, broadcast(3.2664006576e-3f));
  p = fma(p, a, broadcast(2.1146427840e-2f));
  p = fma(p, a, broadcast(4.9866303802e-2f));
  p = fma(p, a, broadcast(1.0f));
  p = mul(p, p);
  p = mul(p, p);
  p = mul(p, p);
  p = mul(p, p);
  return sub(relu(x), div(mul(broadcast(0.5f), a), p));
}

// x (1 + tanh u) / 2 = x sigmoid(2 u).
AEROGEL_INLINE Vec gelu_tanh(Vec x) {
  const Vec cubic = fma(mul(x, x), broadcast(0.044715f), broadcast(1.0f));
  return mul(x, sigmoid(mul(mul(x, cubic), broadcast(1.59576912f))));
}

AEROGEL_INLINE Vec activate(Vec x, Activation activation) {
  switch (activation) {
    case Activation::kNone: return x;
    case Activation::kRelu: return relu(x);
    case Activation::kRelu6: return relu6(x);
    case Activation::kHardswish: return hardswish(x);
    case Activation::kSilu: return silu(x);
    case Activation::kGelu: return gelu(x);
    case Activation::kGeluTanh: return gelu_tanh(x);
    case Activation::kSigmoid: return sigmoid(x);
  }
  return x;
}

}  // namespace aerogel::AEROGEL_ISA
