// Teams of threads, and independent tasks handed out to them one by one, so that a core which is
// taken away by another process delays only the task it holds. One thread never touches OpenMP.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

#ifdef AEROGEL_STD_THREADS
#include <thread>
#include <vector>
#elif defined(_OPENMP)
#include <omp.h>
#endif

namespace aerogel {

// Calls body(thread, granted) on each thread of a team and returns when all are done. The team is of
// `threads`, or of fewer if the runtime grants no more. `body` must not throw. Every parallel region
// of the library is this one: ThreadSanitizer does not understand OpenMP's barriers, so a build for
// it (AEROGEL_STD_THREADS) has threads of the standard library.
template <class Body>
void run_team(int threads, Body&& body) {
  if (threads > 1) {
#ifdef AEROGEL_STD_THREADS
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back([&body, t, threads] { body(t, threads); });
    body(0, threads);
    for (std::thread& other : others) other.join();
    return;
#elif defined(_OPENMP)
#pragma omp parallel num_threads(threads)
    body(omp_get_thread_num(), omp_get_num_threads());
    return;
#endif
  }
  body(0, 1);
}

template <class Task>
void parallel_tasks(int64_t tasks, int threads, Task&& task) {
  if (threads <= 1 || tasks <= 1) {
    for (int64_t i = 0; i < tasks; ++i) task(i);
    return;
  }
  struct alignas(64) {  // a cache line of its own: what tasks read lies next to it
    std::atomic<int64_t> value{0};
  } next;
  std::atomic<bool> failed{false};
  std::exception_ptr failure;  // an exception may not leave a parallel region
  run_team(static_cast<int>(std::min<int64_t>(threads, tasks)), [&](int, int) {
    for (int64_t i; (i = next.value.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      try {
        task(i);
      } catch (...) {
        if (!failed.exchange(true)) failure = std::current_exception();
      }
    }
  });
  if (failure) std::rethrow_exception(failure);
}

}  // namespace aerogel
