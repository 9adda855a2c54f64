#include "spmm.h"

#include "kernels.h"
#include "parallel.h"

namespace aerogel {

struct SpmmWeight::Storage {};
SpmmWeight::SpmmWeight(const BlockRows&, const SpmmVariant& variant, int64_t ldx)
    : variant_(variant), kernels_(active_table().spmm), ldx_(ldx) {}
SpmmWeight::~SpmmWeight() = default;
int64_t SpmmWeight::nbytes() const { return 0; }
void spmm_check(const SpmmArgs&) {}
int64_t spmm_task_count(const SpmmArgs&, int) { return 0; }
void spmm_run_task(const SpmmArgs&, int64_t, int64_t) {}
void spmm_run(const SpmmArgs& args, int threads) {
  const int64_t tasks = spmm_task_count(args, threads);
  parallel_tasks(tasks, threads, [&](int64_t task) { spmm_run_task(args, task, tasks); });
}

}  // namespace aerogel
