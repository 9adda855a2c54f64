// What happens to an output row before it is stored: y = act(acc + bias (+ residual)).
#pragma once

#include <cstdint>

namespace aerogel {

enum class Activation : int32_t {
  kNone = 0,
  kRelu,
  kRelu6,
  kHardswish,
  kSilu,
  kGelu,      // exact, erf form
  kGeluTanh,
  kSigmoid,
};

}  // namespace aerogel
