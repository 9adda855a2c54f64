// Weights as they lie in memory where memory is the limit: float32, its upper half (bfloat16), or
// eight-bit integers with a scale for every output. Kernels multiply them by float32 activations and
// add up in float32.
#pragma once

#include <cstdint>

namespace aerogel {

enum class ValueType : int32_t { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2 };

constexpr int64_t value_bytes(ValueType type) {
  return type == ValueType::kFloat32 ? 4 : type == ValueType::kBfloat16 ? 2 : 1;
}

// Borrowed values of a matrix. `scales` has one number for every output, or is null.
struct StoredValues {
  const void* data = nullptr;
  ValueType type = ValueType::kFloat32;
  const float* scales = nullptr;
};

}  // namespace aerogel
