// Cutting a tensor into tasks.
#include "zero_pruned.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "parallel.h"

namespace aerogel {
namespace {

constexpr int64_t kTaskEntries = 1 << 15;  // fewer would not pay for waking a thread

}  // namespace

bool zero_pruned(const ZeroPrunedArgs& a, int threads) {
  if (a.width != 1 && a.width != 2 && a.width != 4 && a.width != 8) {
    throw std::invalid_argument("width=" + std::to_string(a.width) + ": expected 1, 2, 4 or 8");
  }
  const ZeroPrunedKernels& kernels = *active_table().zero_pruned;
  if (threads <= 1 || a.count < 2 * kTaskEntries) return kernels.zero(a, 0, a.count);
  std::atomic<bool> written{false};
  parallel_tasks((a.count + kTaskEntries - 1) / kTaskEntries, threads, [&](int64_t task) {
    const int64_t begin = task * kTaskEntries;
    if (kernels.zero(a, begin, std::min(a.count, begin + kTaskEntries))) {
      written.store(true, std::memory_order_relaxed);
    }
  });
  return written.load(std::memory_order_relaxed);
}

}  // namespace aerogel
