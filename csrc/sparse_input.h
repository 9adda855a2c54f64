// Dense weight x activations with zeros: y[t] = act(W x[t] + bias (+ residual[t])), where only the
// inputs of magnitude above a threshold take part. The weight is stored transposed, the outputs of
// one input side by side, so that an input which is zero saves its whole row on the way from memory.
//
// Reference: Liu et al., Deja Vu: contextual sparsity for efficient LLMs at inference time,
// arXiv 2310.17157 (the row-skipping product); Lee et al., CATS, arXiv 2404.08763 (the threshold).
#pragma once

#include <cstdint>

#include "epilogue.h"
#include "stored_values.h"

namespace aerogel {

struct SparseInputArgs {
  StoredValues weight;  // [inputs][ldw]
  int64_t ldw = 0;      // values from input to input
  int64_t inputs = 0, outputs = 0;
  const float* bias = nullptr;  // [outputs] or null
  const float* x = nullptr;
  int64_t ldx = 0;  // floats from token to token
  float* y = nullptr;
  int64_t ldy = 0;
  const float* residual = nullptr;  // or null; must not be y
  int64_t ldr = 0;
  int64_t tokens = 1;
  float threshold = 0.0f;  // inputs of at most this magnitude do not take part; NaN does
  Activation activation = Activation::kNone;
};

// All of it on `threads` threads; the result does not depend on them. A row that several tokens need
// comes from memory once for every kSparseInputTokens of them. Throws std::invalid_argument if
// strides contradict the sizes.
void sparse_input_run(const SparseInputArgs& args, int threads);

constexpr int64_t kSparseInputTokens = 8;
constexpr int64_t kSparseInputRows = 4;  // that are added up together

// The inputs that take part for some token.
struct ActiveInputs {
  const int32_t* inputs;
  const float* x;        // [count][tokens]
  const uint8_t* tokens;  // bit t: the input takes part for token t
  int64_t count;
};

// Outputs [first, last) of up to kSparseInputTokens tokens: what every instruction set provides.
struct SparseInputTask {
  const SparseInputArgs* args;  // its first token is the first of these
  ActiveInputs active;
  int64_t tokens;
  int64_t first, last;
  float* scratch;  // tokens * (last - first) floats
};

struct SparseInputKernels {
  void (*run)(const SparseInputTask& task);
};

}  // namespace aerogel
