// Cutting a weight into tasks of groups.
#include "nm_mask.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "parallel.h"

namespace aerogel {
namespace {

constexpr int64_t kTaskEntries = 1 << 15;  // fewer would not pay for waking a thread

void check(const NmMaskArgs& a) {
  if (a.n < 1 || a.n > a.m || a.m > kNmMaskLongest) {
    throw std::invalid_argument("n=" + std::to_string(a.n) + ", m=" + std::to_string(a.m) +
                                ": expected 1 <= n <= m <= " + std::to_string(kNmMaskLongest));
  }
  if (a.outer < 0 || a.length < 0 || a.inner < 0) {
    throw std::invalid_argument("outer=" + std::to_string(a.outer) + ", length=" +
                                std::to_string(a.length) + ", inner=" + std::to_string(a.inner) +
                                ": expected non-negative sizes");
  }
}

void select_all(NmMaskTask all, int64_t outer, int threads) {
  const int64_t count = outer * all.groups * all.inner;
  const int64_t tasks =
      threads > 1 ? std::max<int64_t>(1, count * all.m / kTaskEntries) : 1;
  const NmMaskKernels& kernels = *active_table().nm_mask;
  parallel_tasks(tasks, threads, [&](int64_t t) {
    NmMaskTask task = all;
    task.begin = count * t / tasks;
    task.end = count * (t + 1) / tasks;
    kernels.select(task);
  });
}

}  // namespace

void nm_mask(const NmMaskArgs& a, int threads) {
  check(a);
  const int64_t whole = a.length / a.m, rest = a.length % a.m;
  NmMaskTask task{a.score, a.mask, a.length * a.inner, a.m * a.inner, a.inner, whole, a.n, a.m,
                  a.magnitude ? INT32_MAX : -1, 0, 0};
  select_all(task, a.outer, threads);
  if (rest == 0) return;
  task.score += whole * task.step;
  task.mask += whole * task.step;
  task.groups = 1;
  task.m = rest;
  task.n = std::min(a.n, rest);
  select_all(task, a.outer, threads);
}

}  // namespace aerogel
