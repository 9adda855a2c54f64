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
    workspace->groups.emplace_back(group_floats_ + 2 * kReadSlack);
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
    for (FloatBuffer& b : workspace->groups) std::fill_n(b.data(), b.size(), value);
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
    const size_t ops = image_ops_.size() + group_ops_.size() + joint_ops_.size();
    const size_t steps = times ? batch_ * ops : 0;
    Team team(threads, static_cast<int64_t>(steps));
    Call call{inputs, outputs, threads, sharing, *workspace, team, times, started};
    run_team(threads, [&](int thread, int) { worker(call, thread); });
    team.rethrow();
  }
  const std::lock_guard<std::mutex> lock(pool_mutex_);
  pool_.push_back(std::move(workspace));
}

// What every thread does: whole groups of images while there is an image for each thread, unless
// operations are to be shared; then a share of every operation of the remaining images, and of every
// joint operation.
class Plan::Worker {
 public:
  Worker(const Plan& plan, Call& call, int thread)
      : plan_(plan), call_(call), thread_(thread),
        scratch_(call.workspace.scratch[static_cast<size_t>(thread)].data()), begin_(call.begin) {}

  void run() {
    for (int64_t first = 0; first < plan_.batch_; first += plan_.chunk_) {
      run_chunk(first, std::min(plan_.chunk_, plan_.batch_ - first));
    }
  }

 private:
  // Images of one chunk, from number `first` of the batch on.
  void run_chunk(int64_t first, int64_t count) {
    Workspace& space = call_.workspace;
    Frame frame{};
    frame.values = plan_.values_.data();
    frame.joint_arena = plan_.joint_floats_ ? space.joint.data() + kReadSlack : nullptr;
    frame.inputs = call_.inputs;
    frame.outputs = call_.outputs;
    frame.image = first;
    frame.joint_count = count;
    frame.threads = 1;
    const bool apart = call_.threads > 1 && call_.sharing == Sharing::kImages;
    const int64_t alone = apart ? count / call_.threads * call_.threads : 0;
    if (alone > 0) {
      frame.image_arena = space.image(static_cast<size_t>(thread_));
      frame.group_arena = space.group(static_cast<size_t>(thread_));
      const int64_t groups = call_.threads * groups_of(alone / call_.threads);
      call_.team.share(&progress_, groups, thread_, [&](int64_t i) {
        run_group(frame, {alone * i / groups, alone * (i + 1) / groups},
                  [this](const Op& op, const Frame& of) { run_alone(op, of); });
      });
    }
    frame.image_arena = space.image(0);
    frame.group_arena = space.group(0);
    frame.threads = call_.threads;
    const int64_t rest = count - alone, groups = groups_of(rest);
    const auto share = [this](const Op& op, const Frame& of) { share_op(op, of); };
    for (int64_t i = 0; i < groups; ++i) {
      run_group(frame, {alone + rest * i / groups, alone + rest * (i + 1) / groups}, share);
    }
    for (const auto& op : plan_.joint_ops_) share_op(*op, frame);
  }

  int64_t groups_of(int64_t images) const { return (images + plan_.group_ - 1) / plan_.group_; }

  // All operations but the joint ones for some images of a chunk. `frame` is that of its first image.
  template <class Run>
  void run_group(const Frame& frame, Span images, const Run& run) {
    const int64_t count = images.last - images.first;
    const auto at = [&](int64_t slot) {
      Frame of = frame;
      of.image += images.first + slot;
      of.staged = images.first + slot;
      of.slot = slot;
      return of;
    };
    for (int64_t slot = 0; slot < count; ++slot) {
      const Frame of = at(slot);
      timed_ = 0;
      for (const auto& op : plan_.image_ops_) run(*op, of);
    }
    for (const auto& op : plan_.group_ops_) {
      Frame all = at(0);
      all.slots = count;
      if (op->on_group) {
        run(*op, all);
        continue;
      }
      const size_t timed = timed_;
      for (int64_t slot = 0; slot < count; ++slot) {
        timed_ = timed;
        run(*op, at(slot));
      }
    }
  }

  void run_alone(const Op& op, const Frame& frame) const {
    const int64_t tasks = op.tasks(frame);
    for (int64_t i = 0; i < tasks; ++i) op.run(frame, i, tasks, scratch_);
  }

  void share_op(const Op& op, const Frame& frame) {
    if (call_.times) return time_op(op, frame);
    if (call_.threads == 1) return run_alone(op, frame);
    const int64_t tasks = op.tasks(frame);
    call_.team.share(&progress_, tasks, thread_,
                     [&](int64_t i) { op.run(frame, i, tasks, scratch_); });
  }

  void time_op(const Op& op, const Frame& frame) {
    const int64_t tasks = op.tasks(frame);
    const Ops* stages = op.stages();
    std::vector<double> seconds(stages ? stages->size() : 0);
    call_.team.share(&progress_, tasks, thread_, [&](int64_t i) {
      stages ? op.run_timed(frame, i, tasks, scratch_, &seconds)
             : op.run(frame, i, tasks, scratch_);
    });
    if (thread_ != 0) return;
    const double end =
        call_.threads == 1 ? seconds_now(1) : call_.team.finished(progress_.step - 1);
    if (stages) {  // in proportion to what this thread saw of each
      double all = 0.0;
      for (double each : seconds) all += each;
      for (size_t i = 0; i < seconds.size(); ++i) {
        const double part = all > 0.0 ? seconds[i] / all : 1.0 / seconds.size();
        book((*stages)[i]->name, part * (end - begin_));
      }
    } else {
      book(op.name, end - begin_);
    }
    begin_ = end;
  }

  void book(const std::string& name, double seconds) {
    if (timed_ == call_.times->size()) call_.times->push_back({name, 0.0});
    (*call_.times)[timed_++].seconds += seconds;
  }

  const Plan& plan_;
  Call& call_;
  const int thread_;
  float* const scratch_;
  Progress progress_;
  size_t timed_ = 0;  // steps of this image or group that are booked
  double begin_;      // of the step to be timed
};

void Plan::worker(Call& call, int thread) const { Worker(*this, call, thread).run(); }

}  // namespace aerogel
