#include "sparse_conv.h"

#include <stdexcept>
#include <string>

#include "kernels.h"
#include "parallel.h"

namespace aerogel {
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

SparseConvWeight::SparseConvWeight(const BlockRows& source, int64_t groups, int64_t kernel_h,
                                   int64_t kernel_w, const SpmmVariant& variant) {
  const int64_t taps = kernel_h * kernel_w;
  if (groups < 1 || source.rows % groups || (groups > 1 && source.rows / groups % source.block)) {
    throw std::invalid_argument("groups=" + std::to_string(groups) + ": expected a divisor of " +
                                std::to_string(source.rows) + " outputs into whole blocks of " +
                                std::to_string(source.block));
  }
  if (kernel_h < 1 || kernel_w < 1 || source.cols % taps) {
    throw std::invalid_argument("kernel_size: expected a divisor of " +
                                std::to_string(source.cols) + " columns");
  }
  group_inputs_ = source.cols / taps;
  group_outputs_ = source.rows / groups;
  const std::vector<WindowTap> all = window_taps(group_inputs_, kernel_h, kernel_w);
  if (spmm_panel_vectors(variant) > kWidestWindow) {
    throw std::invalid_argument("vectors=" + std::to_string(variant.vectors) +
                                ", column_tiles=" + std::to_string(variant.column_tiles) +
                                ": expected at most " + std::to_string(kWidestWindow) +
                                " vectors in a panel");
  }
  SpmmVariant gathered = variant;
  gathered.pack = 0;
  const int64_t width = spmm_panel_vectors(variant) * active_table().lanes;
  for (int64_t g = 0; g < groups; ++g) {
    const GroupRows part(source, g, groups);
    Group group;
    group.weight = std::make_unique<SpmmWeight>(part.rows(), gathered, width, false,
                                                SpmmWeight::Reads::kWindow);
    for (const int32_t k : part.used()) group.taps.push_back(all[static_cast<size_t>(k)]);
    groups_.push_back(std::move(group));
  }
}

int64_t SparseConvWeight::nbytes() const {
  int64_t bytes = 0;
  for (const Group& group : groups_) {
    bytes += group.weight->nbytes() + static_cast<int64_t>(group.taps.size() * sizeof(WindowTap));
  }
  return bytes;
}

namespace {

// One group as a product; `window` must outlive it.
SpmmArgs group_product(const SparseConvArgs& args, int64_t g, SpmmWindow* window) {
  const SparseConvWeight& weight = *args.weight;
  const SparseConvWeight::Group& group = weight.groups()[static_cast<size_t>(g)];
  const int64_t row = g * weight.group_outputs();
  SpmmArgs product = args.product;
  product.weight = group.weight.get();
  product.x += g * weight.group_inputs() * product.ldx;
  product.y += row * product.ldy;
  if (product.bias) product.bias += row;
  if (product.residual) product.residual += row * product.ldr;
  *window = {{args.window, args.taps->x.data(), args.taps->y.data(), nullptr, product.ldx,
              args.x_end},
             group.taps.data()};
  product.window = window;
  return product;
}

}  // namespace

void sparse_conv_check(const SparseConvArgs& args) {
  SpmmWindow window;
  spmm_check(group_product(args, 0, &window));
}

int64_t sparse_conv_task_count(const SparseConvArgs& args, int threads) {
  SpmmWindow window;
  const int64_t groups = static_cast<int64_t>(args.weight->groups().size());
  const int64_t share = (threads + groups - 1) / groups;  // threads for each group
  return groups * spmm_task_count(group_product(args, 0, &window), static_cast<int>(share));
}

void sparse_conv_run_task(const SparseConvArgs& args, int64_t task, int64_t tasks) {
  SpmmWindow window;
  const int64_t each = tasks / static_cast<int64_t>(args.weight->groups().size());
  spmm_run_task(group_product(args, task / each, &window), task % each, each);
}

void sparse_conv_run(const SparseConvArgs& args, int threads) {
  const int64_t tasks = sparse_conv_task_count(args, threads);
  parallel_tasks(tasks, threads, [&](int64_t task) { sparse_conv_run_task(args, task, tasks); });
}

}  // namespace aerogel
