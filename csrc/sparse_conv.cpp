#include "sparse_conv.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "parallel.h"

namespace aerogel {

namespace {

constexpr int64_t kShortRow = 2;  // vectors
constexpr int64_t kLineFloats = 16;

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

int64_t index_of(const std::vector<int32_t>& list, int64_t value) {
  return std::find(list.begin(), list.end(), value) - list.begin();
}

// A pitch of whole vectors, as long as the gaps cost no more than aligned rows are worth.
int64_t align_pitch(int64_t pitch, int64_t columns, int64_t lanes) {
  for (const int64_t to : {lanes, int64_t{8}, int64_t{4}}) {
    if (7 * round_up(pitch, to) <= 8 * columns) return round_up(pitch, to);
  }
  return pitch;
}

}  // namespace

StripLayout::StripLayout(const Window& w, const SpmmVariant& variant, int64_t lanes,
                         int64_t images) {
  Strips& s = strips_;
  if (images > 1) {
    lay_side_by_side(w, spmm_panel_vectors(variant) * lanes, images);
    return;
  }
  // Short rows have a copy for each column of taps: a misaligned vector takes two loads.
  const bool apart = w.kernel_w > 1 && w.out_w <= kShortRow * lanes;
  const int64_t period = apart ? w.kernel_w * w.dilation_w : w.stride_w;
  for (int64_t kx = 0; kx < w.kernel_w; ++kx) {
    const auto phase = static_cast<int32_t>(kx * w.dilation_w % period);
    if (index_of(column_phases_, phase) == static_cast<int64_t>(column_phases_.size())) {
      column_phases_.push_back(phase);
    }
  }
  choose_panel(w, spmm_panel_vectors(variant) * lanes, lanes, apart);
  choose_phases(w);
  // Behind its last row a plane has the zeros that the row's last taps read.
  const int64_t reach = s.columns + (apart ? 0 : (w.kernel_w - 1) * w.dilation_w / w.stride_w);
  s.plane = round_up(s.plane_rows * s.pitch + std::max<int64_t>(0, reach - s.pitch), 16);
  s.channel = s.row_phase_count * s.column_phase_count * s.plane;
  for (int64_t ky = 0; ky < w.kernel_h; ++ky) {
    const int64_t row = ky * w.dilation_h;
    const bool apart = s.row_phase_count == w.kernel_h && s.plane_rows == s.rows;
    const int64_t phase = apart ? ky : index_of(row_phases_, row % w.stride_h);
    row_offsets_.push_back(phase * s.column_phase_count * s.plane +
                           (apart ? 0 : row / w.stride_h * s.pitch));
  }
  for (int64_t kx = 0; kx < w.kernel_w; ++kx) {
    const int64_t column = kx * w.dilation_w;
    column_offsets_.push_back(index_of(column_phases_, column % period) * s.plane +
                              (apart ? 0 : column / w.stride_w));
  }
}

bool StripLayout::takes_group(const Window& w) {
  return w.stride_h == 1 && w.stride_w == 1 && w.out_h == w.in_h && w.out_w == w.in_w;
}

void StripLayout::lay_side_by_side(const Window& w, int64_t most, int64_t images) {
  Strips& s = strips_;
  const int64_t plane = w.in_h * w.in_w, columns = images * plane;
  s.rows = 1;
  s.columns = s.pitch = std::min(most, round_up(columns, kLineFloats));
  s.plane = (round_up(s.columns, kLineFloats) / kLineFloats | 1) * kLineFloats;
  s.taps = w.kernel_h * w.kernel_w;
  s.channel = s.taps * s.plane;
  s.linear = s.bare = true;
  s.mask_row = round_up(columns, kLineFloats);
  const uint32_t bits = ~uint32_t{0};
  float all;
  std::memcpy(&all, &bits, sizeof(all));
  masks_.assign(static_cast<size_t>(s.taps * s.mask_row), 0.0f);
  for (int64_t tap = 0; tap < s.taps; ++tap) {
    const int64_t down = tap / w.kernel_w * w.dilation_h - w.pad_h;
    const int64_t across = tap % w.kernel_w * w.dilation_w - w.pad_w;
    // A tap that meets nothing but padding has no shift: its mask is empty, whatever is read.
    const bool reads = std::abs(down) < w.in_h && std::abs(across) < w.in_w;
    shifts_.push_back(reads ? down * w.in_w + across : 0);
    for (int64_t i = 0; reads && i < columns; ++i) {
      const int64_t y = i % plane / w.in_w + down, x = i % w.in_w + across;
      const bool inside = y >= 0 && y < w.in_h && x >= 0 && x < w.in_w;
      if (inside) masks_[static_cast<size_t>(tap * s.mask_row + i)] = all;
    }
  }
  s.shifts = shifts_.data();
  s.masks = masks_.data();
  for (int64_t ky = 0; ky < w.kernel_h; ++ky) row_offsets_.push_back(ky * w.kernel_w * s.plane);
  for (int64_t kx = 0; kx < w.kernel_w; ++kx) column_offsets_.push_back(kx * s.plane);
}

// As many outputs as fit into `most` places of the grid: whole rows, or a part of one.
void StripLayout::choose_panel(const Window& w, int64_t most, int64_t lanes, bool apart) {
  Strips& s = strips_;
  const int64_t row = round_up(w.out_w, lanes);
  if (most < row) {
    const int64_t across = (w.out_w + most - 1) / most;
    s.rows = 1;
    s.columns = round_up((w.out_w + across - 1) / across, lanes);
    s.pitch = s.columns + (apart ? 0 : (w.kernel_w - 1) * w.dilation_w / w.stride_w);
    s.linear = s.bare = true;
    return;
  }
  s.columns = w.out_w;
  s.pitch = apart ? w.out_w : least_pitch(w);
  if (apart || s.pitch > w.out_w) s.pitch = align_pitch(s.pitch, w.out_w, lanes);
  s.linear = s.pitch <= row;
  s.rows = std::clamp<int64_t>(most / (s.linear ? s.pitch : row), 1, w.out_h);
  s.bare = s.rows == 1 || s.pitch == w.out_w;
  s.linear = s.linear || s.rows == 1;
}

// Rows may overlap: what lies beyond the right border of one may be the left border of the next.
int64_t StripLayout::least_pitch(const Window& w) const {
  const auto fits = [&w](int64_t pitch) {
    for (int64_t kx = 0; kx < w.kernel_w; ++kx) {
      const int64_t column = kx * w.dilation_w, phase = column % w.stride_w - w.pad_w;
      const int64_t beyond = w.out_w + column / w.stride_w - pitch;
      const int64_t border = phase < 0 ? (w.stride_w - 1 - phase) / w.stride_w : 0;
      if (beyond > 0 && (beyond > border || pitch * w.stride_w + phase < w.in_w)) return false;
    }
    return true;
  };
  int64_t pitch = w.out_w;
  while (!fits(pitch)) ++pitch;
  return pitch;
}

// Rows of taps share the rows of their stride's phase, or have rows of their own if these are fewer.
void StripLayout::choose_phases(const Window& w) {
  Strips& s = strips_;
  for (int64_t ky = 0; ky < w.kernel_h; ++ky) {
    const auto phase = static_cast<int32_t>(ky * w.dilation_h % w.stride_h);
    if (index_of(row_phases_, phase) == static_cast<int64_t>(row_phases_.size())) {
      row_phases_.push_back(phase);
    }
  }
  s.row_step = w.stride_h;
  s.plane_rows = s.rows + (w.kernel_h - 1) * w.dilation_h / w.stride_h;
  if (static_cast<int64_t>(row_phases_.size()) * s.plane_rows >= w.kernel_h * s.rows) {
    row_phases_.clear();
    for (int64_t ky = 0; ky < w.kernel_h; ++ky) {
      row_phases_.push_back(static_cast<int32_t>(ky * w.dilation_h));
    }
    s.plane_rows = s.rows;
  }
  s.row_phases = row_phases_.data();
  s.row_phase_count = static_cast<int64_t>(row_phases_.size());
  s.column_phases = column_phases_.data();
  s.column_phase_count = static_cast<int64_t>(column_phases_.size());
}

namespace {

// The block rows of one group, over the columns that any of them uses.
class GroupRows {
 public:
  GroupRows(const BlockRows& source, int64_t group, int64_t groups) {
    const int64_t count = source.rows / source.block + source.rows % source.block;
    const int64_t first = count * group / groups, last = count * (group + 1) / groups;
    const int64_t begin = source.row_ptr[first], end = source.row_ptr[last];
    std::vector<int32_t> position(static_cast<size_t>(source.cols), -1);
    for (int64_t i = begin; i < end; ++i) position.at(static_cast<size_t>(source.columns[i])) = 0;
    for (size_t k = 0; k < position.size(); ++k) {
      if (position[k] < 0) continue;
      position[k] = static_cast<int32_t>(used_.size());
      used_.push_back(static_cast<int32_t>(k));
    }
    for (int64_t i = begin; i < end; ++i) {
      columns_.push_back(position[static_cast<size_t>(source.columns[i])]);
    }
    for (int64_t r = first; r <= last; ++r) row_ptr_.push_back(source.row_ptr[r] - begin);
    rows_ = {source.values + begin * source.block, columns_.data(), row_ptr_.data(),
             source.rows / groups, static_cast<int64_t>(used_.size()), source.block};
  }
  GroupRows(const GroupRows&) = delete;
  GroupRows& operator=(const GroupRows&) = delete;

  const BlockRows& rows() const { return rows_; }
  const std::vector<int32_t>& used() const { return used_; }

 private:
  std::vector<int32_t> used_, columns_;
  std::vector<int64_t> row_ptr_;
  BlockRows rows_;
};

}  // namespace

SparseConvWeight::SparseConvWeight(const BlockRows& source, int64_t groups, const Window& window,
                                   const SpmmVariant& variant, int64_t images)
    : window_(window), layout_(window, variant, active_table().lanes, images) {
  const int64_t taps = window.kernel_h * window.kernel_w;
  if (groups < 1 || source.rows % groups || (groups > 1 && source.rows / groups % source.block)) {
    throw std::invalid_argument("groups=" + std::to_string(groups) + ": expected a divisor of " +
                                std::to_string(source.rows) + " outputs into whole blocks of " +
                                std::to_string(source.block));
  }
  if (source.cols % taps) {
    throw std::invalid_argument("kernel_size: expected a divisor of " +
                                std::to_string(source.cols) + " columns");
  }
  group_inputs_ = source.cols / taps;
  group_outputs_ = source.rows / groups;
  if (group_inputs_ * strips().channel > std::numeric_limits<int32_t>::max() / 8) {
    throw std::invalid_argument("width=" + std::to_string(window.in_w) + ": too large for " +
                                std::to_string(group_inputs_) + " channels");
  }
  groups_.resize(static_cast<size_t>(groups));
  for (int64_t g = 0; g < groups; ++g) pack_group(source, g, groups, variant);
}

void SparseConvWeight::pack_group(const BlockRows& source, int64_t g, int64_t groups,
                                  const SpmmVariant& variant) {
  const GroupRows part(source, g, groups);
  const int64_t kernel_w = window_.kernel_w, taps = window_.kernel_h * kernel_w;
  Group& group = groups_[static_cast<size_t>(g)];
  SpmmPlaces places;
  std::vector<int64_t> first_tap;  // of each channel that is used
  for (const int32_t k : part.used()) {
    const auto channel = static_cast<int32_t>(k / taps);
    if (group.channels.empty() || group.channels.back() != channel) {
      first_tap.push_back(static_cast<int64_t>(places.columns.size()));
      group.channels.push_back(channel);
    }
    const int64_t at = (static_cast<int64_t>(group.channels.size()) - 1) * strips().channel +
                       layout_.offset(k % taps / kernel_w, k % kernel_w);
    places.columns.push_back(static_cast<int32_t>(4 * at));
  }
  first_tap.push_back(static_cast<int64_t>(places.columns.size()));
  const auto count = static_cast<int64_t>(group.channels.size());
  const int64_t slabs = std::clamp<int64_t>(variant.k_blocks, 1, std::max<int64_t>(count, 1));
  const int64_t slab_floats = (count + slabs - 1) / slabs * strips().channel;
  for (int64_t s = 0; s <= slabs; ++s) {
    group.slab_channels.push_back(count * s / slabs);
    places.slab_cols.push_back(first_tap[static_cast<size_t>(group.slab_channels.back())]);
    // Slabs take turns in one place, where the zeros come behind the longest.
    const int64_t zeros = group.slab_channels.back() * strips().channel + slab_floats;
    if (s < slabs) places.zeros.push_back(static_cast<int32_t>(4 * zeros));
  }
  SpmmVariant gathered = variant;
  gathered.pack = 0;
  group.weight = std::make_unique<SpmmWeight>(part.rows(), gathered, places);
  group.window = {&window_, &strips(), group.channels.data(), group.slab_channels.data(),
                  slab_floats};
}

int64_t SparseConvWeight::nbytes() const {
  int64_t bytes = 0;
  for (const Group& group : groups_) {
    bytes += group.weight->nbytes() +
             static_cast<int64_t>(group.channels.size() * sizeof(int32_t) +
                                  group.slab_channels.size() * sizeof(int64_t));
  }
  return bytes;
}

namespace {

SpmmArgs group_product(const SparseConvArgs& args, int64_t g) {
  const SparseConvWeight& weight = *args.weight;
  const SparseConvWeight::Group& group = weight.groups()[static_cast<size_t>(g)];
  const int64_t row = g * weight.group_outputs();
  SpmmArgs product = args.product;
  product.weight = group.weight.get();
  product.window = &group.window;
  product.x += g * weight.group_inputs() * product.ldx;
  product.y += row * product.ldy;
  if (product.bias) product.bias += row;
  if (product.residual) product.residual += row * product.ldr;
  return product;
}

}  // namespace

void sparse_conv_check(const SparseConvArgs& args) { spmm_check(group_product(args, 0)); }

int64_t sparse_conv_task_count(const SparseConvArgs& args, int threads) {
  const int64_t groups = static_cast<int64_t>(args.weight->groups().size());
  const int64_t share = (threads + groups - 1) / groups;  // threads for each group
  return groups * spmm_task_count(group_product(args, 0), static_cast<int>(share));
}

void sparse_conv_run_task(const SparseConvArgs& args, int64_t task, int64_t tasks) {
  const int64_t each = tasks / static_cast<int64_t>(args.weight->groups().size());
  spmm_run_task(group_product(args, task / each), task % each, each);
}

void sparse_conv_run_rows(const SparseConvArgs& args, const Window& rows) {
  for (size_t g = 0; g < args.weight->groups().size(); ++g) {
    SpmmArgs product = group_product(args, static_cast<int64_t>(g));
    SpmmWindow window = *product.window;
    window.window = &rows;
    product.window = &window;
    const int64_t tasks = spmm_task_count(product, 1);
    for (int64_t task = 0; task < tasks; ++task) spmm_run_task(product, task, tasks);
  }
}

void sparse_conv_run(const SparseConvArgs& args, int threads) {
  const int64_t tasks = sparse_conv_task_count(args, threads);
  parallel_tasks(tasks, threads, [&](int64_t task) { sparse_conv_run_task(args, task, tasks); });
}

}  // namespace aerogel
