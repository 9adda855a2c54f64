// Sparse convolution: the sparse product of spmm.h on panels of the input gathered under each tap,
// so that the unfolded image never exists. Taps that no row of the weight uses are left out.
#pragma once

#include <memory>
#include <vector>

#include "layers_weights.h"
#include "spmm.h"

namespace aerogel {

// The packed weight of one convolution: [out][in / groups * kernel_h * kernel_w] rows in torch's
// order. Independent of the size of the image. Immutable: threads share it.
class SparseConvWeight {
 public:
  // Throws std::invalid_argument for malformed input, or if blocks of rows cross groups.
  SparseConvWeight(const BlockRows& source, int64_t groups, int64_t kernel_h, int64_t kernel_w,
                   const SpmmVariant& variant);
  SparseConvWeight(const SparseConvWeight&) = delete;
  SparseConvWeight& operator=(const SparseConvWeight&) = delete;

  struct Group {
    std::unique_ptr<SpmmWeight> weight;
    std::vector<WindowTap> taps;  // of each column that is left; channels count within the group
  };
  const std::vector<Group>& groups() const { return groups_; }
  int64_t group_inputs() const { return group_inputs_; }
  int64_t group_outputs() const { return group_outputs_; }
  int64_t nbytes() const;

 private:
  int64_t group_inputs_, group_outputs_;
  std::vector<Group> groups_;
};

// One call. `product` holds everything but the weight and the window; its x, y, bias and residual
// are those of the first group.
struct SparseConvArgs {
  const SparseConvWeight* weight = nullptr;
  const Window* window = nullptr;
  const Taps* taps = nullptr;
  const float* x_end = nullptr;
  SpmmArgs product;
};

// Throws std::invalid_argument if the arguments contradict each other or the weight.
void sparse_conv_check(const SparseConvArgs& args);

// groups x images x panels x ranges of rows: independent tasks, in any order, on any thread.
int64_t sparse_conv_task_count(const SparseConvArgs& args, int threads);
void sparse_conv_run_task(const SparseConvArgs& args, int64_t task, int64_t tasks);

// All of it on `threads` threads.
void sparse_conv_run(const SparseConvArgs& args, int threads);

}  // namespace aerogel
