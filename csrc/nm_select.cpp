// Cutting the groups into tasks.
#include "nm_select.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "parallel.h"

namespace aerogel {
namespace {

constexpr int64_t kTaskEntries = 1 << 16;

}  // namespace

void nm_select_run(const NmSelectArgs& args, int threads) {
  if (args.m < 1 || args.m > kNmSelectMost || args.n < 0 || args.n > args.m) {
    throw std::invalid_argument("n:m=" + std::to_string(args.n) + ":" + std::to_string(args.m) +
                                ": expected 0 <= n <= m <= " + std::to_string(kNmSelectMost));
  }
  const int64_t groups = args.outer * args.inner;
  const int64_t step = std::max(kTaskEntries / args.m / kNmSelectLanes, int64_t{1}) * kNmSelectLanes;
  const NmSelectKernels& kernels = *active_table().nm_select;
  parallel_tasks((groups + step - 1) / step, threads, [&](int64_t task) {
    kernels.run(args, task * step, std::min(groups, (task + 1) * step));
  });
}

}  // namespace aerogel
