// Cutting lookups into tasks, and the search among scores.
#include "gather_rows.h"

#include <algorithm>
#include <atomic>

#include "kernels.h"
#include "parallel.h"

namespace aerogel {
namespace {

constexpr int64_t kTaskRows = 256;

}  // namespace

bool gather_rows(const GatherRowsArgs& a, int threads) {
  const GatherRowsKernels& kernels = *active_table().gather_rows;
  if (threads <= 1 || a.count <= kTaskRows) return kernels.gather(a, 0, a.count);
  std::atomic<bool> inside{true};
  parallel_tasks((a.count + kTaskRows - 1) / kTaskRows, threads, [&](int64_t task) {
    const int64_t begin = task * kTaskRows;
    if (!kernels.gather(a, begin, std::min(a.count, begin + kTaskRows))) {
      inside.store(false, std::memory_order_relaxed);
    }
  });
  return inside.load(std::memory_order_relaxed);
}

int64_t entries_above(const float* matrix, int64_t rows, int64_t columns, const float* limits,
                      int64_t* found_rows, int64_t* found_columns, float* found, int64_t room) {
  int64_t count = 0;
  for (int64_t r = 0; r < rows; ++r, matrix += columns) {
    int32_t any = 0;  // a loop without a branch is one of registers
    for (int64_t c = 0; c < columns; ++c) any |= matrix[c] > limits[c] ? 1 : 0;
    if (!any) continue;
    for (int64_t c = 0; c < columns; ++c) {
      if (!(matrix[c] > limits[c])) continue;
      if (count < room) {
        found_rows[count] = r;
        found_columns[count] = c;
        found[count] = matrix[c];
      }
      ++count;
    }
  }
  return count;
}

}  // namespace aerogel
