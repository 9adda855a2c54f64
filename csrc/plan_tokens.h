// The operations of a plan over sequences: values whose columns are the tokens of one sequence, or
// of several of the same length one after the other.
#pragma once

#include "plan_ops.h"
#include "tokens.h"

namespace aerogel {

// Layer normalisation of every column.
struct NormOp : Op {
  // weight, bias: a float per feature, or null for ones and zeros.
  NormOp(int64_t features, const float* weight, const float* bias, float epsilon);
  bool columnwise() const override { return true; }
  int replaced_input() const override { return 0; }
  bool reads_bare(size_t) const override { return false; }
  void prepare(const std::vector<Value>& values, const KernelTable& table) override;
  int64_t tasks(const Frame& frame) const override;
  void run(const Frame& frame, int64_t task, int64_t tasks, float* scratch) const override;

  std::vector<float> weight, bias;
  float epsilon;
  const TokenKernels* kernels = nullptr;
};

// Which rows of its operands an attention takes, and how the columns are cut.
struct AttentionShape {
  int64_t heads = 1;
  int64_t groups = 1;  // heads that share a key and a value: heads / groups of these
  int64_t head_dim = 1, value_dim = 1;
  int64_t q_row = 0, k_row = 0, v_row = 0;  // first row of head 0: operands may be parts of one value
  int64_t sequences = 1;                  // in the columns of q, k and v
  float scale = 1.0f;
  bool empty_is_zero = false;
  // Columns of the mask: [sequences][heads][queries], each only where it says so.
  bool mask_per_sequence = false, mask_per_head = false, mask_per_query = false;
};

// Softmax attention of every sequence and head. Inputs: q, k, v, and perhaps a mask, which has a row
// per key and is added to the scores.
struct AttentionOp : Op {
  AttentionOp(const AttentionShape& shape, int64_t queries, int64_t keys)
      : shape(shape), queries(queries), keys(keys) {}
  bool reads_bare(size_t) const override { return false; }
  void prepare(const std::vector<Value>& values, const KernelTable& table) override;
  int64_t scratch_floats() const override;
  int64_t tasks(const Frame& frame) const override;
  void run(const Frame& frame, int64_t task, int64_t tasks, float* scratch) const override;

  AttentionShape shape;
  int64_t queries, keys;  // of one sequence
  const TokenKernels* kernels = nullptr;

 private:
  void add_mask(const Frame& frame, int64_t sequence, int64_t head, AttentionArgs* args) const;
};

// Columns start, start + step, ... of a value.
struct ColumnsOp : Op {
  ColumnsOp(int64_t start, int64_t step) : start(start), step(step) {}
  int64_t tasks(const Frame& frame) const override;
  void run(const Frame& frame, int64_t task, int64_t tasks, float* scratch) const override;

  int64_t start, step;
};

// Values side by side: the columns of the first input, then those of the second.
struct ConcatOp : Op {
  int64_t tasks(const Frame& frame) const override;
  void run(const Frame& frame, int64_t task, int64_t tasks, float* scratch) const override;
};

}  // namespace aerogel
