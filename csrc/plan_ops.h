// The operations a plan can hold. A new one is a struct here (or in a file of its own) and a method
// in bind_plan.cpp.
#pragma once

#include "plan.h"
#include "sparse_conv.h"
#include "spmm.h"

namespace aerogel {

// How many tasks are worth their hand-out for so much work (in multiply-adds or moved floats).
int64_t worthwhile_tasks(int64_t units, int64_t work, int threads);

// Of a window whose rows are made `tile` at a time.
inline RowReach reach_of(const Window& w, int64_t tile) {
  return {(w.kernel_h - 1) * w.dilation_h + 1, w.stride_h, w.pad_h, w.in_h, tile};
}

// What operations with a bias, an activation and perhaps a residual (their second input) share.
struct Epilogue {
  Activation activation = Activation::kNone;
  bool residual = false;
};

// Dense convolution of planes, or (1x1) of anything planar.
struct ConvOp : Op {
  ConvOp(const ConvSource& source, Epilogue epilogue) : source(source), epilogue(epilogue) {}
  bool columnwise() const override { return source.groups == 1 && pointwise(); }
  bool takes_group(int64_t columns) const override;
  bool reads_bare(size_t i) const override { return i == 0; }
  void prepare(const std::vector<Value>& values, const KernelTable& table) override;
  int64_t scratch_floats() const override;
  int64_t tasks(const Frame& frame) const override;
  void run(const Frame& frame, int64_t task, int64_t tasks, float* scratch) const override;

  RowReach row_reach() const override;
  void run_rows(const Frame& frame, const RowPlaces& places, float* scratch) const override;

  bool pointwise() const;
  ConvArgs args(const Frame& frame) const;

  ConvSource source;
  Epilogue epilogue;
  const LayerKernels* kernels = nullptr;
  std::unique_ptr<ConvWeight> weight;
  DirectShape direct{};  // of a convolution that runs row by row; else without rows
};

struct DepthwiseOp : Op {
  DepthwiseOp(const ConvSource& source, Activation activation)
      : source(source), activation(activation) {}
  bool reads_bare(size_t) const override { return false; }
  void prepare(const std::vector<Value>& values, const KernelTable& table) override;
  int64_t scratch_floats() const override;
  int64_t tasks(const Frame& frame) const override;
  void run(const Frame& frame, int64_t task, int64_t tasks, float* scratch) const override;

  RowReach row_reach() const override;
  void run_rows(const Frame& frame, const RowPlaces& places, float* scratch) const override;
  bool reads_parts() const override { return true; }
  bool joins_parts() const override { return true; }

  ConvSource source;
  Activation activation;
  int64_t joined_row = 0;  // floats from channel to channel of an input put together, else 0
  const LayerKernels* kernels = nullptr;
  std::unique_ptr<DepthwiseWeight> weight;
};

// A dense layer on one vector per image; jointly on all of them it becomes a ConvOp.
struct LinearOp : ConvOp {
  using ConvOp::ConvOp;
  bool reads_bare(size_t) const override { return true; }
  void prepare(const std::vector<Value>& values, const KernelTable& table) override;
  int64_t scratch_floats() const override;
  int64_t tasks(const Frame& frame) const override;
  void run(const Frame& frame, int64_t task, int64_t tasks, float* scratch) const override;

  int64_t blocks = 0;  // of kGemvRows outputs
  FloatBuffer rows, bias;
};

// A sparse product adds the residual when it writes a result for good. Slabs write partial sums.
inline int replaced_residual(Epilogue epilogue, const SpmmVariant& variant) {
  return epilogue.residual && variant.k_blocks == 1 ? 1 : -1;
}

struct SpmmOp : Op {
  SpmmOp(const BlockRows& source, const float* bias_data, const SpmmVariant& variant,
         Epilogue epilogue);
  bool columnwise() const override { return true; }
  int replaced_input() const override { return replaced_residual(epilogue, variant); }
  bool reads_bare(size_t) const override { return false; }
  void prepare(const std::vector<Value>& values, const KernelTable& table) override;
  int64_t tasks(const Frame& frame) const override;
  void run(const Frame& frame, int64_t task, int64_t tasks, float* scratch) const override;
  RowReach row_reach() const override;
  void run_rows(const Frame& frame, const RowPlaces& places, float* scratch) const override;
  void keep_outputs_together() override { variant.row_tiles = 1; }
  bool reads_parts() const override { return true; }
  bool writes_once() const override { return variant.k_blocks == 1; }
  SpmmArgs args(const Frame& frame) const;

  BlockRows source;
  SpmmVariant variant;
  Epilogue epilogue;
  std::vector<float> bias;
  std::unique_ptr<SpmmWeight> weight;
};

struct SparseConvOp : Op {
  SparseConvOp(const BlockRows& source, const float* bias_data, int64_t groups,
               const Window& window, const SpmmVariant& variant, Epilogue epilogue);
  bool takes_group(int64_t columns) const override;
  bool reads_picked() const override;
  std::unique_ptr<Op> pick_columns() override;
  int replaced_input() const override { return replaced_residual(epilogue, variant); }
  bool reads_bare(size_t i) const override { return i == 0; }
  void prepare(const std::vector<Value>& values, const KernelTable& table) override;
  int64_t tasks(const Frame& frame) const override;
  void run(const Frame& frame, int64_t task, int64_t tasks, float* scratch) const override;
  RowReach row_reach() const override;
  void run_rows(const Frame& frame, const RowPlaces& places, float* scratch) const override;
  void keep_outputs_together() override { variant.row_tiles = 1; }
  bool reads_parts() const override { return true; }
  bool in_bands() const override { return false; }
  bool writes_once() const override { return variant.k_blocks == 1; }
  SparseConvArgs args(const Frame& frame) const;

  BlockRows source;
  int64_t groups;
  Window window;
  SpmmVariant variant;
  Epilogue epilogue;
  std::vector<float> bias;
  std::unique_ptr<SparseConvWeight> weight;
};

struct PoolOp : Op {
  PoolOp(Pool kind, const Window& window) : kind(kind), window(window), taps(window) {}
  void prepare(const std::vector<Value>& values, const KernelTable& table) override;
  int64_t tasks(const Frame& frame) const override;
  void run(const Frame& frame, int64_t task, int64_t tasks, float* scratch) const override;
  RowReach row_reach() const override;
  void run_rows(const Frame& frame, const RowPlaces& places, float* scratch) const override;

  Pool kind;
  Window window;
  Taps taps;
  const LayerKernels* kernels = nullptr;
};

struct MeanOp : Op {
  void prepare(const std::vector<Value>& values, const KernelTable& table) override;
  int64_t scratch_floats() const override;
  int64_t tasks(const Frame& frame) const override;
  void run(const Frame& frame, int64_t task, int64_t tasks, float* scratch) const override;
  bool joins_parts() const override { return true; }

  int64_t joined_row = 0;  // as in DepthwiseOp
  const LayerKernels* kernels = nullptr;
};

struct BinaryOp : Op {
  BinaryOp(Binary kind, bool broadcast, Activation activation)
      : kind(kind), broadcast(broadcast), activation(activation) {}
  bool columnwise() const override { return !broadcast; }
  int replaced_input() const override { return 0; }
  void prepare(const std::vector<Value>& values, const KernelTable& table) override;
  int64_t tasks(const Frame& frame) const override;
  void run(const Frame& frame, int64_t task, int64_t tasks, float* scratch) const override;

  Binary kind;
  bool broadcast;  // the second operand is one column
  Activation activation;
  const LayerKernels* kernels = nullptr;
};

struct ActivationOp : Op {
  explicit ActivationOp(Activation activation) : activation(activation) {}
  bool columnwise() const override { return true; }
  int replaced_input() const override { return 0; }
  void prepare(const std::vector<Value>& values, const KernelTable& table) override;
  int64_t tasks(const Frame& frame) const override;
  void run(const Frame& frame, int64_t task, int64_t tasks, float* scratch) const override;

  Activation activation;
  const LayerKernels* kernels = nullptr;
};

// Every stride-th column of every stride-th row.
struct PickOp : Op {
  explicit PickOp(const Window& window) : window(window) {}
  int64_t tasks(const Frame& frame) const override;
  void run(const Frame& frame, int64_t task, int64_t tasks, float* scratch) const override;

  Window window;
};

// Rows copied between two planar forms of the same elements: padded or not, planes or flat.
struct CopyOp : Op {
  int64_t tasks(const Frame& frame) const override;
  void run(const Frame& frame, int64_t task, int64_t tasks, float* scratch) const override;
};

// Between token-major rows of `features` floats and planes, in either direction.
struct TransposeOp : Op {
  explicit TransposeOp(bool to_planes) : to_planes(to_planes) {}
  void prepare(const std::vector<Value>& values, const KernelTable& table) override;
  int64_t tasks(const Frame& frame) const override;
  void run(const Frame& frame, int64_t task, int64_t tasks, float* scratch) const override;

  bool to_planes;
  const LayerKernels* kernels = nullptr;
};

}  // namespace aerogel
