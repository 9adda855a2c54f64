// Independent tasks on a given number of threads, handed out one by one so that a core which is
// taken away by another process delays only the task it holds. One thread never touches OpenMP.
#pragma once

#include <cstdint>
#include <exception>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace aerogel {

template <class Task>
void parallel_tasks(int64_t tasks, int threads, Task&& task) {
#ifdef _OPENMP
  if (threads > 1 && tasks > 1) {
    std::exception_ptr failure;  // an exception may not leave a parallel region
    const int team = static_cast<int64_t>(threads) < tasks ? threads : static_cast<int>(tasks);
#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
    for (int64_t i = 0; i < tasks; ++i) {
      try {
        task(i);
      } catch (...) {
#pragma omp critical(aerogel_parallel_failure)
        failure = std::current_exception();
      }
    }
    if (failure) std::rethrow_exception(failure);
    return;
  }
#endif
  (void)threads;
  for (int64_t i = 0; i < tasks; ++i) task(i);
}

}  // namespace aerogel
