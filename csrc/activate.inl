// Activations over whole rows: the kind is looked at once, and several vectors are worked on at a
// time, because each is a long chain of dependent instructions.
#pragma once

#include "simd_math.h"

namespace aerogel::AEROGEL_ISA {
namespace {

template <class Function>
AEROGEL_INLINE void map_span(const float* x, float* y, int64_t count, const Function& function) {
  constexpr int kAtOnce = 4;
  int64_t i = 0;
  for (; i + kAtOnce * kLanes <= count; i += kAtOnce * kLanes) {
    Vec v[kAtOnce];
    for (int j = 0; j < kAtOnce; ++j) v[j] = function(load(x + i + j * kLanes));
    for (int j = 0; j < kAtOnce; ++j) store(y + i + j * kLanes, v[j]);
  }
  for (; i < count; i += kLanes) {
    store_upto(y + i, function(load_upto(x + i, count - i)), count - i);
  }
}

// y may be x.
AEROGEL_NOINLINE void activate_span(Activation activation, const float* x, float* y,
                                    int64_t count) {
  switch (activation) {
    case Activation::kNone:
      if (x != y) map_span(x, y, count, [](Vec v) { return v; });
      return;
    case Activation::kRelu: return map_span(x, y, count, [](Vec v) { return relu(v); });
    case Activation::kRelu6: return map_span(x, y, count, [](Vec v) { return relu6(v); });
    case Activation::kHardswish: return map_span(x, y, count, [](Vec v) { return hardswish(v); });
    case Activation::kSilu: return map_span(x, y, count, [](Vec v) { return silu(v); });
    case Activation::kGelu: return map_span(x, y, count, [](Vec v) { return gelu(v); });
    case Activation::kGeluTanh: return map_span(x, y, count, [](Vec v) { return gelu_tanh(v); });
    case Activation::kSigmoid: return map_span(x, y, count, [](Vec v) { return sigmoid(v); });
  }
}

}  // namespace
}  // namespace aerogel::AEROGEL_ISA
