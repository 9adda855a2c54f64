// How a plan runs: one parallel region per call, in which every thread has a share of each operation's
// tasks and helps the others when it is done, and between operations a barrier that spins briefly,
// then yields, then sleeps. A foreign process that takes a core away costs its time slice, not a
// spinning stand-off.
#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <mutex>
#include <thread>

#include "parallel.h"
#include "plan.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace aerogel {

namespace {

// Seconds of this thread's CPU time, which other processes do not enter; of wall time if several
// threads work, because the slowest one counts.
double seconds_now(int threads) {
#ifdef CLOCK_THREAD_CPUTIME_ID
  if (threads == 1) {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
  }
#endif
  const auto since = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double>(since).count();
}

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A thread's patience: about 10 us of spinning, then about a millisecond of yields, then naps, which
// last longer than most operations.
class Patience {
 public:
  void wait() {
    if (++waited_ <= 512) {
      relax();
    } else if (waited_ <= 2512) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(30));
    }
  }

 private:
  int waited_ = 0;
};

// Shared by the threads of one run. All of them pass through the same sequence of steps. In each, a
// thread takes tasks from its own share first, because neighbouring tasks touch neighbouring data and
// what a core wrote in one step is likely to be what it reads in the next. Every share has a counter.
// Three rows of counters suffice: while step s runs, nobody is still in step s - 2, whose counters are
// prepared for step s + 1.
class Team {
 public:
  explicit Team(int threads) : threads_(threads), counters_(3 * static_cast<size_t>(threads)) {}

  // Every thread of the team calls it for the same step; returns when the step is done.
  template <class Task>
  void share(int64_t step, int64_t tasks, int thread, Task&& task) {
    for (int helped = 0; helped < threads_; ++helped) {
      const int owner = (thread + helped) % threads_;
      const int64_t begin = first_task(tasks, owner), end = first_task(tasks, owner + 1);
      std::atomic<int64_t>& taken = counter(step, owner);
      while (taken.load(std::memory_order_relaxed) < end - begin) {
        const int64_t i = begin + taken.fetch_add(1, std::memory_order_relaxed);
        if (i >= end) break;
        guard([&] { task(i); });
      }
    }
    counter(step + 1, thread).store(0, std::memory_order_relaxed);
    arrived_.value.fetch_add(1, std::memory_order_acq_rel);
    const int64_t all = (step + 1) * threads_;
    for (Patience patience; arrived_.value.load(std::memory_order_acquire) < all;) patience.wait();
  }

  // An exception may neither leave a parallel region nor keep a thread from its barriers.
  template <class Body>
  void guard(Body&& body) {
    try {
      body();
    } catch (...) {
      if (!failed_.exchange(true)) failure_ = std::current_exception();
    }
  }

  void rethrow() const {
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
  };
  // A single task is the first thread's.
  int64_t first_task(int64_t tasks, int owner) const {
    return (tasks * owner + threads_ - 1) / threads_;
  }

  std::atomic<int64_t>& counter(int64_t step, int owner) {
    return counters_[static_cast<size_t>(step % 3 * threads_ + owner)].value;
  }

  const int threads_;
  std::vector<Counter> counters_;
  Counter arrived_;
  std::atomic<bool> failed_{false};
  std::exception_ptr failure_;
};

}  // namespace

struct Plan::Call {
  const float* const* inputs;
  float* const* outputs;
  int threads;
  Workspace& workspace;
  Team& team;
  std::vector<StepTime>* times;
};

std::unique_ptr<Plan::Workspace> Plan::take_workspace(int threads) {
  std::unique_ptr<Workspace> workspace;
  {
    const std::lock_guard<std::mutex> lock(pool_mutex_);
    if (!pool_.empty()) {
      workspace = std::move(pool_.back());
      pool_.pop_back();
    }
  }
  if (!workspace) {
    workspace = std::make_unique<Workspace>();
    if (joint_floats_) workspace->joint = FloatBuffer(joint_floats_ + 2 * kReadSlack);
  }
  const size_t images = batch_ > 1 ? static_cast<size_t>(threads) : 1;
  while (workspace->images.size() < images) {
    workspace->images.emplace_back(image_floats_ + 2 * kReadSlack);
  }
  while (workspace->scratch.size() < static_cast<size_t>(threads)) {
    workspace->scratch.emplace_back(scratch_floats_);
  }
  return workspace;
}

void Plan::fill_idle_arenas(float value) {
  const std::lock_guard<std::mutex> lock(pool_mutex_);
  for (const std::unique_ptr<Workspace>& workspace : pool_) {
    for (FloatBuffer& b : workspace->images) std::fill_n(b.data(), b.size(), value);
    for (FloatBuffer& b : workspace->scratch) std::fill_n(b.data(), b.size(), value);
    if (workspace->joint.size()) {
      std::fill_n(workspace->joint.data(), workspace->joint.size(), value);
    }
  }
}

void Plan::run(const float* const* inputs, float* const* outputs, int threads,
               std::vector<StepTime>* times) {
  threads = std::max(1, threads);
  std::unique_ptr<Workspace> workspace = take_workspace(threads);
  if (threads == 1) {
    Team team(1);
    Call call{inputs, outputs, 1, *workspace, team, times};
    worker(call, 0);
    team.rethrow();
  } else {
    // The runtime may grant fewer threads than asked for; the team is what there really is.
    std::unique_ptr<Team> team;
    std::unique_ptr<Call> call;
    std::once_flag once;
    run_team(threads, [&](int thread, int granted) {
      std::call_once(once, [&] {
        team = std::make_unique<Team>(granted);
        call.reset(new Call{inputs, outputs, granted, *workspace, *team, times});
      });
      worker(*call, thread);
    });
    team->rethrow();
  }
  const std::lock_guard<std::mutex> lock(pool_mutex_);
  pool_.push_back(std::move(workspace));
}

// What every thread does: whole images while there is one for each thread, then a share of every
// operation of the remaining images, then a share of every joint operation.
void Plan::worker(Call& call, int thread) const {
  Workspace& space = call.workspace;
  float* scratch = space.scratch[static_cast<size_t>(thread)].data();
  float* joint = joint_floats_ ? space.joint.data() + kReadSlack : nullptr;
  int64_t step = 0;
  size_t timed = 0;
  const auto share_op = [&](const Op& op, const Frame& frame) {
    const double begin = call.times ? seconds_now(call.threads) : 0.0;
    const int64_t tasks = op.tasks(frame);
    if (call.threads == 1) {
      for (int64_t i = 0; i < tasks; ++i) op.run(frame, i, tasks, scratch);
    } else {
      call.team.share(step++, tasks, thread,
                      [&](int64_t i) { op.run(frame, i, tasks, scratch); });
    }
    if (call.times && thread == 0) {
      const double seconds = seconds_now(call.threads) - begin;
      if (timed == call.times->size()) call.times->push_back({op.name, 0.0});
      (*call.times)[timed++].seconds += seconds;
    }
  };
  for (int64_t begin = 0; begin < batch_; begin += chunk_) {
    const int64_t count = std::min(chunk_, batch_ - begin);
    Frame frame{values_.data(), space.image(0), joint, call.inputs, call.outputs, begin, 0, count,
                call.threads};
    const int64_t alone =
        call.threads > 1 && !call.times ? count / call.threads * call.threads : 0;
    if (alone > 0) {
      call.team.share(step++, alone, thread, [&](int64_t i) {
        Frame own = frame;
        own.image_arena = space.image(static_cast<size_t>(thread));
        own.image = begin + i;
        own.staged = i;
        own.threads = 1;
        for (const auto& op : image_ops_) {
          const int64_t tasks = op->tasks(own);
          for (int64_t task = 0; task < tasks; ++task) op->run(own, task, tasks, scratch);
        }
      });
    }
    for (int64_t i = alone; i < count; ++i) {
      frame.image = begin + i;
      frame.staged = i;
      timed = 0;
      for (const auto& op : image_ops_) share_op(*op, frame);
    }
    frame.image = begin;
    frame.staged = 0;
    timed = image_ops_.size();
    for (const auto& op : joint_ops_) share_op(*op, frame);
  }
}

}  // namespace aerogel
