// Sparse linear layers on one vector, as operations of a plan.
#pragma once

#include "gemv.h"
#include "nm.h"
#include "plan_ops.h"

namespace aerogel {

struct GemvOp : Op {
  // `source` and `values` are borrowed until the plan is built.
  GemvOp(const BlockRows& source, const StoredValues& values, const float* bias_data,
         Epilogue epilogue);
  void prepare(const std::vector<Value>& values, const KernelTable& table) override;
  int64_t scratch_floats() const override;
  int64_t tasks(const Frame& frame) const override;
  void run(const Frame& frame, int64_t task, int64_t tasks, float* scratch) const override;

  BlockRows source;
  StoredValues stored;
  Epilogue epilogue;
  std::vector<float> bias;
  std::unique_ptr<GemvWeight> weight;
};

// The same for a weight that is n:m along its inputs.
struct NmOp : Op {
  // `source` and `values` are borrowed until the plan is built.
  NmOp(const BlockRows& source, const StoredValues& values, int n, int m, const float* bias_data,
       Epilogue epilogue);
  void prepare(const std::vector<Value>& values, const KernelTable& table) override;
  int64_t scratch_floats() const override;
  int64_t tasks(const Frame& frame) const override;
  void run(const Frame& frame, int64_t task, int64_t tasks, float* scratch) const override;

  BlockRows source;
  StoredValues stored;
  int n, m;
  Epilogue epilogue;
  std::vector<float> bias;
  std::unique_ptr<NmWeight> weight;
};

}  // namespace aerogel
