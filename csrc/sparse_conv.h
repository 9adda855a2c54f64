// Sparse convolution: the sparse product of spmm.h on strips of the input (strips.h), so that the
// unfolded image never exists. Channels that no row of the weight uses are left out.
#pragma once

#include <memory>
#include <vector>

#include "layers_weights.h"
#include "spmm.h"
#include "strips.h"

namespace aerogel {

// Under a 1x1 window without padding every output is made of one column of the input.
inline bool is_point(const Window& w) {
  return w.kernel_h == 1 && w.kernel_w == 1 && w.pad_h == 0 && w.pad_w == 0;
}

// The window over these columns alone, once they are picked.
inline Window over_picked(Window w) {
  w.in_h = w.out_h;
  w.in_w = w.out_w;
  w.stride_h = w.stride_w = 1;
  return w;
}

// How strips lie in scratch for one window, and where each tap reads them.
class StripLayout {
 public:
  // images: that may stand side by side, if the window keeps a plane's size; then they always do.
  StripLayout(const Window& window, const SpmmVariant& variant, int64_t lanes, int64_t images = 1);
  StripLayout(const StripLayout&) = delete;
  StripLayout& operator=(const StripLayout&) = delete;

  const Strips& strips() const { return strips_; }
  // Floats from the beginning of a channel's strips to what tap (ky, kx) reads.
  int64_t offset(int64_t ky, int64_t kx) const {
    return row_offsets_[static_cast<size_t>(ky)] + column_offsets_[static_cast<size_t>(kx)];
  }

  // Whether images may stand side by side.
  static bool takes_group(const Window& window);

 private:
  void lay_side_by_side(const Window& window, int64_t most, int64_t images);
  void choose_panel(const Window& window, int64_t most, int64_t lanes, bool apart);
  void choose_phases(const Window& window);
  int64_t least_pitch(const Window& window) const;

  Strips strips_{};
  std::vector<int32_t> row_phases_, column_phases_;
  std::vector<int64_t> row_offsets_, column_offsets_;
  std::vector<int64_t> shifts_;
  std::vector<float> masks_;
};

// The packed weight of one convolution: [out][in / groups * kernel_h * kernel_w] rows in torch's
// order, for one size of image, and for so many images side by side. Immutable: threads share it.
class SparseConvWeight {
 public:
  // Throws std::invalid_argument for malformed input, or if blocks of rows cross groups.
  SparseConvWeight(const BlockRows& source, int64_t groups, const Window& window,
                   const SpmmVariant& variant, int64_t images = 1);
  SparseConvWeight(const SparseConvWeight&) = delete;
  SparseConvWeight& operator=(const SparseConvWeight&) = delete;

  struct Group {
    std::unique_ptr<SpmmWeight> weight;
    std::vector<int32_t> channels;        // that some row uses, counted within the group
    std::vector<int64_t> slab_channels;   // first of each slab, an index of `channels`
    SpmmWindow window;
  };
  const std::vector<Group>& groups() const { return groups_; }
  const Window& window() const { return window_; }
  const Strips& strips() const { return layout_.strips(); }
  int64_t group_inputs() const { return group_inputs_; }
  int64_t group_outputs() const { return group_outputs_; }
  int64_t nbytes() const;

 private:
  void pack_group(const BlockRows& source, int64_t group, int64_t groups,
                  const SpmmVariant& variant);

  Window window_;
  StripLayout layout_;
  int64_t group_inputs_ = 0, group_outputs_ = 0;
  std::vector<Group> groups_;
};

// One call. `product` holds everything but the weight and the window; its x, y, bias and residual
// are those of the first group.
struct SparseConvArgs {
  const SparseConvWeight* weight = nullptr;
  SpmmArgs product;
};

// Throws std::invalid_argument if the arguments contradict each other or the weight.
void sparse_conv_check(const SparseConvArgs& args);

// groups x images x panels x ranges of rows: independent tasks, in any order, on any thread.
int64_t sparse_conv_task_count(const SparseConvArgs& args, int threads);
void sparse_conv_run_task(const SparseConvArgs& args, int64_t task, int64_t tasks);

// Some rows of the outputs, all channels: `rows` is the weight's window with only these rows, x and y
// begin with its first ones.
void sparse_conv_run_rows(const SparseConvArgs& args, const Window& rows);

// All of it on `threads` threads.
void sparse_conv_run(const SparseConvArgs& args, int threads);

}  // namespace aerogel
