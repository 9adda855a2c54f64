// Which inputs take part, and cutting the outputs into tasks.
#include "sparse_input.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace aerogel {
namespace {

// Outputs of one task: their sums stay in the first cache, with several tokens beside the pieces of
// the rows. Multiples of a line of the narrowest values, so that no line of weights is read twice.
constexpr int64_t kWidest = 4096, kWidestOfTokens = 1024, kLineValues = 64;
constexpr int64_t kNarrowest = 512;  // less of each row would not be worth its beginning

void check_row(const char* name, int64_t stride, int64_t needed, int64_t rows) {
  if (rows > 1 && stride < needed) {
    throw std::invalid_argument(std::string(name) + "=" + std::to_string(stride) +
                                ": expected at least " + std::to_string(needed));
  }
}

void check(const SparseInputArgs& a) {
  if (a.tokens < 0 || a.inputs < 0 || a.outputs < 0) {
    throw std::invalid_argument("tokens, inputs, outputs: expected non-negative sizes");
  }
  if (!(a.threshold >= 0.0f)) {
    throw std::invalid_argument("threshold=" + std::to_string(a.threshold) +
                                ": expected 0 or more");
  }
  check_row("ldw", a.ldw, a.outputs, a.inputs);
  check_row("ldx", a.ldx, a.inputs, a.tokens);
  check_row("ldy", a.ldy, a.outputs, a.tokens);
  if (a.residual) check_row("ldr", a.ldr, a.outputs, a.tokens);
}

// Memory of the caller's thread for one list, kept for the next call.
class ActiveList {
 public:
  // Inputs that the same tokens need follow each other, so that their rows can be added up together.
  ActiveInputs fill(const SparseInputArgs& a, int64_t tokens) {
    grow(a.inputs, tokens);
    std::fill_n(masks_.begin(), a.inputs, uint8_t{0});
    for (int64_t t = 0; t < tokens; ++t) {
      const float* x = a.x + t * a.ldx;
      for (int64_t k = 0; k < a.inputs; ++k) {
        const bool active = !(std::fabs(x[k]) <= a.threshold);  // NaN is not below any threshold
        masks_[k] = static_cast<uint8_t>(masks_[k] | active << t);
      }
    }
    const int64_t count = tokens == 1 ? list(a.inputs) : list_by_tokens(a.inputs);
    for (int64_t n = 0; n < count; ++n) {
      const float* x = a.x + inputs_[n];
      for (int64_t t = 0; t < tokens; ++t) x_[n * tokens + t] = x[t * a.ldx];
    }
    return {inputs_.data(), x_.data(), tokens_.data(), count};
  }

 private:
  void grow(int64_t inputs, int64_t tokens) {
    const size_t most = static_cast<size_t>(inputs) + 1;  // one beyond, written but not listed
    if (masks_.size() < most) {
      masks_.resize(most);
      inputs_.resize(most);
      tokens_.resize(most);
    }
    if (x_.size() < most * tokens) x_.resize(most * tokens);
  }

  // Without branches: which inputs are zero is unpredictable.
  int64_t list(int64_t inputs) {
    int64_t n = 0;
    for (int64_t k = 0; k < inputs; ++k) {
      inputs_[n] = static_cast<int32_t>(k);
      tokens_[n] = 1;
      n += masks_[k];
    }
    return n;
  }

  int64_t list_by_tokens(int64_t inputs) {
    int64_t begin[257] = {};
    for (int64_t k = 0; k < inputs; ++k) ++begin[masks_[k] + 1];
    begin[1] = 0;  // inputs that no token needs are not listed
    for (int m = 1; m < 256; ++m) begin[m + 1] += begin[m];
    const int64_t count = begin[256];
    for (int64_t k = 0; k < inputs; ++k) {
      if (masks_[k] == 0) continue;
      const int64_t n = begin[masks_[k]]++;
      inputs_[n] = static_cast<int32_t>(k);
      tokens_[n] = masks_[k];
    }
    return count;
  }

  std::vector<uint8_t> masks_, tokens_;
  std::vector<int32_t> inputs_;
  std::vector<float> x_;
};

int64_t task_width(const SparseInputArgs& a, int64_t tokens, int threads) {
  const int64_t widest = tokens == 1 ? kWidest : kWidestOfTokens;
  const int64_t tasks = threads > 1 ? 2 * threads : 1;
  const int64_t fair = std::clamp((a.outputs + tasks - 1) / tasks, kNarrowest, widest);
  return (fair + kLineValues - 1) / kLineValues * kLineValues;
}

SparseInputArgs from_token(SparseInputArgs a, int64_t token) {
  a.x += token * a.ldx;
  a.y += token * a.ldy;
  if (a.residual) a.residual += token * a.ldr;
  return a;
}

}  // namespace

void sparse_input_run(const SparseInputArgs& args, int threads) {
  check(args);
  if (args.outputs == 0) return;
  const SparseInputKernels& kernels = *active_table().sparse_input;
  for (int64_t token = 0; token < args.tokens; token += kSparseInputTokens) {
    const SparseInputArgs part = from_token(args, token);
    const int64_t tokens = std::min(kSparseInputTokens, args.tokens - token);
    thread_local ActiveList list;
    const ActiveInputs active = list.fill(part, tokens);
    const int64_t width = task_width(part, tokens, threads);
    parallel_tasks((args.outputs + width - 1) / width, threads, [&](int64_t task) {
      thread_local Scratch scratch;
      const int64_t first = task * width, last = std::min(first + width, args.outputs);
      kernels.run({&part, active, tokens, first, last, scratch.at_least(tokens * width)});
    });
  }
}

}  // namespace aerogel
