// The pattern of a sampled product, and cutting its rows into tasks.
#include "sddmm.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace aerogel {
namespace {

constexpr int64_t kTasksPerThread = 2;
constexpr int64_t kTaskRows = 256;  // every task packs all of x: fewer rows would not pay for it

void check_operand(const char* name, const SddmmOperand& operand, int64_t features,
                   const SddmmArgs& a) {
  const int64_t needed = a.tokens ? features : a.columns;
  if (operand.row < needed) {
    throw std::invalid_argument(std::string(name) + " row stride=" + std::to_string(operand.row) +
                                ": expected at least " + std::to_string(needed));
  }
}

void check(const SddmmArgs& a) {
  if (!a.pattern) throw std::invalid_argument("pattern: expected one");
  if (a.columns < 0 || a.batch < 0) {
    throw std::invalid_argument("columns=" + std::to_string(a.columns) +
                                ", batch=" + std::to_string(a.batch) +
                                ": expected non-negative sizes");
  }
  if (a.tokens && a.batch != 1) {
    throw std::invalid_argument("batch=" + std::to_string(a.batch) + ": expected 1 with tokens");
  }
  check_operand("x", a.x, a.pattern->stream().cols, a);
  check_operand("dy", a.dy, a.pattern->stream().rows, a);
}

// Block rows of about equal work for every task, as tasks + 1 limits.
std::vector<int64_t> row_limits(const SddmmStream& p, int64_t tasks) {
  std::vector<int64_t> limits{0};
  const int64_t rows = p.block_rows;
  const auto work = [&p](int64_t r) { return p.row_ptr[r] + r; };
  for (int64_t t = 1; t < tasks; ++t) {
    const int64_t target = work(rows) * t / tasks;
    int64_t low = limits.back(), high = rows;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (work(middle) < target) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    limits.push_back(low);
  }
  limits.push_back(rows);
  return limits;
}

}  // namespace

SddmmPattern::SddmmPattern(const BlockRows& source) {
  spmm_check_source(source);
  const int64_t full = source.rows / source.block;
  const int64_t count = full + source.rows % source.block;
  row_ptr_.assign(source.row_ptr, source.row_ptr + count + 1);
  columns_.assign(source.columns, source.columns + row_ptr_.back());
  const int64_t slabs = std::max<int64_t>(1, (source.cols + kSddmmSlab - 1) / kSddmmSlab);
  for (int64_t s = 0; s <= slabs; ++s) slab_cols_.push_back(source.cols * s / slabs);
  for (int64_t s = 0; s <= slabs; ++s) {
    for (int64_t r = 0; r < count; ++r) {
      const int32_t* begin = columns_.data() + row_ptr_[r];
      const int32_t* end = columns_.data() + row_ptr_[r + 1];
      cuts_.push_back(std::lower_bound(begin, end, slab_cols_[s]) - columns_.data());
    }
  }
  stream_ = {columns_.data(), row_ptr_.data(), slab_cols_.data(), cuts_.data(), source.rows,
             source.cols,     source.block,    slabs,             count,        full,
             row_ptr_[full]};
}

int64_t SddmmPattern::value_count() const {
  return stream_.full_columns * stream_.block + (row_ptr_.back() - stream_.full_columns);
}

void sddmm_run(const SddmmArgs& args, int threads) {
  check(args);
  const SddmmStream& pattern = args.pattern->stream();
  if (args.columns == 0 || args.batch == 0) {
    std::fill_n(args.values, args.pattern->value_count(), 0.0f);
    return;
  }
  int64_t tasks = 1;
  if (threads > 1) {
    const int64_t most = std::max<int64_t>(threads, pattern.rows / kTaskRows);
    tasks = std::clamp<int64_t>(threads * kTasksPerThread, 1, most);
  }
  const std::vector<int64_t> limits = row_limits(pattern, tasks);
  const SddmmKernels& kernels = *active_table().sddmm;
  parallel_tasks(tasks, threads, [&](int64_t t) {
    if (limits[t] == limits[t + 1]) return;
    thread_local Scratch scratch;
    const int64_t outputs = (limits[t + 1] - limits[t]) * pattern.block;
    const int64_t slab = std::min(pattern.cols, kSddmmSlab);
    kernels.run_rows({&args, &pattern, limits[t], limits[t + 1],
                      scratch.at_least((outputs + slab) * kSddmmColumns)});
  });
}

}  // namespace aerogel
