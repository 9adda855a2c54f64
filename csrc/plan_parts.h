// Planes that several threads share, row by row: each thread's rows lie together, apart from those of
// the others. In one plane, a channel's rows are a few cache lines, and the half of another thread
// begins in the middle of them: what the prefetchers of one core fetch beyond its own half is taken
// from the core that is writing there, again and again. Rows that a window needs beyond its own part
// are copied from the neighbours first. Operations that want planes whole put the parts together.
#pragma once

#include "plan.h"

namespace aerogel {

// An operation whose output, or an input, is in parts: a task makes the rows of one part.
class PartOp : public Op {
 public:
  PartOp(std::unique_ptr<Op> made, int64_t parts);

  int replaced_input() const override { return op_->replaced_input(); }
  void prepare(const std::vector<Value>& values, const KernelTable& table) override {
    op_->prepare(values, table);
  }
  int64_t scratch_floats() const override { return op_->scratch_floats(); }
  int64_t tasks(const Frame&) const override { return parts_; }
  void run(const Frame& frame, int64_t task, int64_t tasks, float* scratch) const override;
  const Ops* stages() const override { return op_->stages(); }
  void run_timed(const Frame& frame, int64_t task, int64_t tasks, float* scratch,
                 std::vector<double>* seconds) const override;

 private:
  std::unique_ptr<Op> op_;
  int64_t parts_;
};

// Channels [first, last) of a value that lies in parts, in one piece: each `ld` floats from the next.
void join_parts(const Frame& frame, int value, Span channels, float* to, int64_t ld);

// Puts the planes of one image that are made and read by rows in parts, and wraps the operations
// around them.
void part_planes(Ops* ops, std::vector<Value>* values, int64_t parts);

}  // namespace aerogel
