// How a plan runs: one parallel region per call, in which every thread has a share of each operation's
// tasks and helps the others when it is done. Who has nothing to do until an operation is over spins
// briefly, then yields, then sleeps. A foreign process that takes a core away costs the task it
// interrupts and the end of the region, not a stand-off at every operation.
#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
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

// How far a thread has come: the step it is at, and all tasks up to that step's end.
struct Progress {
  int64_t step = 0, due = 0;
};

// Shared by the threads of one run. All of them pass through the same sequence of steps. In each, a
// thread takes tasks from its own share first, because neighbouring tasks touch neighbouring data and
// what a core wrote in one step is likely to be what it reads in the next; then it helps the others.
// A step is over when its tasks are done, whoever did them: nobody waits for a thread that has lost its
// core, unless it holds a task, and such a thread passes by what was done without it.
class Team {
 public:
  // timed_steps: how many steps there are if they are to be timed, else 0.
  Team(int threads, int64_t timed_steps)
      : threads_(threads),
        taken_(static_cast<size_t>(threads)),
        finished_(static_cast<size_t>(timed_steps)) {}

  // Every thread of the team calls it for the same steps; returns when the step is over.
  template <class Task>
  void share(Progress* progress, int64_t tasks, int thread, Task&& task) {
    const int64_t step = progress->step++, due = progress->due += tasks;
    for (int helped = 0; helped < threads_ && !over(due); ++helped) {
      const int owner = (thread + helped) % threads_;
      const int64_t begin = first_task(tasks, owner), count = first_task(tasks, owner + 1) - begin;
      for (int64_t i; (i = take(step, owner, count)) < count;) {
        guard([&] { task(begin + i); });
        if (!finished_.empty()) stamp(step);
        done_.value.fetch_add(1, std::memory_order_acq_rel);
      }
    }
    for (Patience patience; !over(due);) patience.wait();
  }

  // When the last task of a timed step was done. A thread's own view would not do: one that comes late
  // may find a step done by the others.
  double finished(int64_t step) const {
    return finished_[static_cast<size_t>(step)].load(std::memory_order_relaxed);
  }

  // An exception may neither leave a parallel region nor keep a thread from its tasks.
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
  static constexpr int kStepShift = 32;  // a counter holds its step above the tasks taken in it

  // A single task is the first thread's.
  int64_t first_task(int64_t tasks, int owner) const {
    return (tasks * owner + threads_ - 1) / threads_;
  }

  bool over(int64_t due) const { return done_.value.load(std::memory_order_acquire) >= due; }

  // The number of a task of this step in the owner's share, or `count` if none is left.
  int64_t take(int64_t step, int owner, int64_t count) {
    std::atomic<int64_t>& taken = taken_[static_cast<size_t>(owner)].value;
    const int64_t none = step << kStepShift;
    int64_t seen = taken.load(std::memory_order_relaxed);
    for (;;) {
      const int64_t now = std::max(seen, none);
      if (now - none >= count) return count;  // all are taken, or the step is long over
      if (taken.compare_exchange_weak(seen, now + 1, std::memory_order_relaxed)) return now - none;
    }
  }

  void stamp(int64_t step) {
    std::atomic<double>& last = finished_[static_cast<size_t>(step)];
    const double now = seconds_now(threads_);
    double seen = last.load(std::memory_order_relaxed);
    while (seen < now && !last.compare_exchange_weak(seen, now, std::memory_order_relaxed)) {
    }
  }

  const int threads_;
  std::vector<Counter> taken_;
  std::vector<std::atomic<double>> finished_;
  Counter done_;
  std::atomic<bool> failed_{false};
  std::exception_ptr failure_;
};

}  // namespace

struct Plan::Call {
  const float* const* inputs;
  float* const* outputs;
  int threads;
  Sharing sharing;
  Workspace& workspace;
  Team& team;
  std::vector<StepTime>* times;
  double begin;  // of timed steps; others may have done the first one before a thread comes
};

std::unique_ptr<Plan::Workspace> Plan::take_workspace(int threads, Sharing sharing) {
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
  const bool own = batch_ > 1 && sharing == Sharing::kImages;
  const size_t images = own ? static_cast<size_t>(threads) : 1;
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

void Plan::run(const float* const* inputs, float* const* outputs, int threads, Sharing sharing,
               std::vector<StepTime>* times) {
  threads = std::max(1, threads);
  if (times) sharing = Sharing::kOperations;
  const double started = times ? seconds_now(threads) : 0.0;
  std::unique_ptr<Workspace> workspace = take_workspace(threads, sharing);
  if (threads == 1) {
    Team team(1, 0);
    Call call{inputs, outputs, 1, sharing, *workspace, team, times, started};
    worker(call, 0);
    team.rethrow();
  } else {
    // The runtime may grant fewer threads than asked for: the others then do their shares.
    const size_t steps = times ? batch_ * (image_ops_.size() + joint_ops_.size()) : 0;
    Team team(threads, static_cast<int64_t>(steps));
    Call call{inputs, outputs, threads, sharing, *workspace, team, times, started};
    run_team(threads, [&](int thread, int) { worker(call, thread); });
    team.rethrow();
  }
  const std::lock_guard<std::mutex> lock(pool_mutex_);
  pool_.push_back(std::move(workspace));
}

// What every thread does: whole images while there is one for each thread, unless operations are to be
// shared; then a share of every operation of the remaining images, and of every joint operation.
void Plan::worker(Call& call, int thread) const {
  Workspace& space = call.workspace;
  float* scratch = space.scratch[static_cast<size_t>(thread)].data();
  float* joint = joint_floats_ ? space.joint.data() + kReadSlack : nullptr;
  Progress progress;
  size_t timed = 0, image_times = 0;  // of every image
  double begin = call.begin;
  const auto share_op = [&](const Op& op, const Frame& frame) {
    const int64_t tasks = op.tasks(frame);
    const Ops* timed_stages = call.times ? op.stages() : nullptr;
    std::vector<double> stage_seconds(timed_stages ? timed_stages->size() : 0);
    if (timed_stages) {
      call.team.share(&progress, tasks, thread, [&](int64_t i) {
        op.run_timed(frame, i, tasks, scratch, &stage_seconds);
      });
    } else if (call.threads == 1) {
      for (int64_t i = 0; i < tasks; ++i) op.run(frame, i, tasks, scratch);
    } else {
      call.team.share(&progress, tasks, thread,
                      [&](int64_t i) { op.run(frame, i, tasks, scratch); });
    }
    if (call.times && thread == 0) {
      const double end = call.threads == 1 ? seconds_now(1) : call.team.finished(progress.step - 1);
      const auto book = [&](const std::string& name, double seconds) {
        if (timed == call.times->size()) call.times->push_back({name, 0.0});
        (*call.times)[timed++].seconds += seconds;
      };
      if (timed_stages) {  // in proportion to what this thread saw of each
        const size_t stages = stage_seconds.size();
        double all = 0.0;
        for (double seconds : stage_seconds) all += seconds;
        for (size_t i = 0; i < stages; ++i) {
          const double part = all > 0.0 ? stage_seconds[i] / all : 1.0 / stages;
          book((*timed_stages)[i]->name, part * (end - begin));
        }
      } else {
        book(op.name, end - begin);
      }
      begin = end;
    }
  };
  for (int64_t begin = 0; begin < batch_; begin += chunk_) {
    const int64_t count = std::min(chunk_, batch_ - begin);
    Frame frame{values_.data(), space.image(0), joint, call.inputs, call.outputs, begin, 0, count,
                call.threads};
    const int64_t alone =
        call.threads > 1 && call.sharing == Sharing::kImages ? count / call.threads * call.threads
                                                             : 0;
    if (alone > 0) {
      call.team.share(&progress, alone, thread, [&](int64_t i) {
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
      image_times = timed;
    }
    frame.image = begin;
    frame.staged = 0;
    timed = image_times;
    for (const auto& op : joint_ops_) share_op(*op, frame);
  }
}

}  // namespace aerogel
