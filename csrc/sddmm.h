// Products of two dense matrices at stored places only, float32: values[n, k] = sum over columns of
// dy[n] * x[k]. It is the gradient of a sparse weight whose product is y = W x.
//
// Activations are laid out as in spmm.h: planar rows, image by image, or token-major.
#pragma once

#include <cstdint>
#include <vector>

#include "spmm.h"

namespace aerogel {

struct SddmmKernels;

// A pattern as the kernels read it: plain pointers, valid as long as the SddmmPattern lives. Input
// features are walked in slabs; block row r stores the columns of slab s at
// cuts[s * block_rows + r] .. cuts[(s + 1) * block_rows + r].
struct SddmmStream {
  const int32_t* columns;
  const int64_t* row_ptr;
  const int64_t* slab_cols;  // first input feature of each slab, slabs + 1 entries
  const int64_t* cuts;
  int64_t rows, cols, block, slabs;
  int64_t block_rows, full_rows;  // all, and those of `block` outputs; the others have one
  int64_t full_columns;           // stored columns of the full block rows
};

// Where the values are: the pattern of a weight, checked once. Immutable: threads share it.
class SddmmPattern {
 public:
  // Copies the pattern; `source.values` is not read. Throws std::invalid_argument as SpmmWeight.
  explicit SddmmPattern(const BlockRows& source);
  SddmmPattern(const SddmmPattern&) = delete;
  SddmmPattern& operator=(const SddmmPattern&) = delete;

  const SddmmStream& stream() const { return stream_; }
  int64_t value_count() const;

 private:
  std::vector<int32_t> columns_;
  std::vector<int64_t> row_ptr_, slab_cols_, cuts_;
  SddmmStream stream_{};
};

// Dense rows of features, or of tokens.
struct SddmmOperand {
  const float* data = nullptr;
  int64_t row = 0;    // floats from feature to feature (planar) or from token to token
  int64_t image = 0;  // floats from image to image (planar)
};

struct SddmmArgs {
  const SddmmPattern* pattern = nullptr;
  SddmmOperand x;   // cols features
  SddmmOperand dy;  // rows features
  float* values = nullptr;
  int64_t columns = 0;  // pixels of an image, or tokens
  int64_t batch = 1;    // images
  bool tokens = false;  // token-major; then batch is 1
};

// All of it on `threads` threads; the result does not depend on them. Throws std::invalid_argument
// if the strides contradict the pattern.
void sddmm_run(const SddmmArgs& args, int threads);

// Block rows [row_begin, row_end): what every instruction set provides.
struct SddmmTask {
  const SddmmArgs* args;
  const SddmmStream* stream;
  int64_t row_begin, row_end;
  float* scratch;  // scratch_floats(...) floats, 64-byte aligned
};

struct SddmmKernels {
  void (*run_rows)(const SddmmTask& task);
};

// Columns of activations that are packed and multiplied at a time, and the features in a slab of
// them: 192 KiB, so that a slab stays in the second cache.
constexpr int64_t kSddmmColumns = 64;
constexpr int64_t kSddmmSlab = 768;

}  // namespace aerogel
