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

int64_t entries_above(const AboveArgs& args) { return active_table().gather_rows->above(args); }

}  // namespace aerogel
