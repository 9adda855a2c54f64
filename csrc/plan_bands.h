// Operations that run one after the other on bands of rows: what one of them makes of a band, the next
// one takes from the second-level cache, and no value between them is ever a whole plane. Each keeps
// the last rows of its band that the next one's window will need again.
#pragma once

#include "plan.h"

namespace aerogel {

// A chain of operations of one input each, every one the only reader of the one before it.
class BandOp : public Op {
 public:
  // Values between the stages lie in scratch, at most `budget` bytes if bands can be as short; their
  // channels get the distance of a band in *values.
  BandOp(Ops stages, int64_t budget, std::vector<Value>* values);

  void prepare(const std::vector<Value>& values, const KernelTable& table) override;
  int64_t scratch_floats() const override;
  int64_t tasks(const Frame& frame) const override;
  void run(const Frame& frame, int64_t task, int64_t tasks, float* scratch) const override;
  const Ops* stages() const override { return &stages_; }
  void run_timed(const Frame& frame, int64_t task, int64_t tasks, float* scratch,
                 std::vector<double>* seconds) const override;

  // Rows of the last output from the whole input, unless the last stage makes several together.
  RowReach row_reach() const override;
  void run_rows(const Frame& frame, const RowPlaces& places, float* scratch) const override;
  bool writes_once() const override { return stages_.back()->writes_once(); }

 private:
  // Rows of a stage's output: which are in its buffer, and where.
  struct Rows {
    int64_t first = 0, end = 0;
    float* data = nullptr;  // where row 0 would be
  };
  // How a stage's output is kept: the last one's is a whole value.
  struct Buffer {
    RowReach reach;
    int64_t channels, height, width, rows, ld, offset;
  };

  void run_band(const Frame& frame, const RowPlaces& places, int64_t end, std::vector<Rows>* made,
                float* scratch) const;
  void make_room(size_t stage, float* scratch, std::vector<Rows>* made) const;

  Ops stages_;
  std::vector<Buffer> buffers_;
  int64_t height_, band_rows_, buffer_floats_ = 0;
};

// Replaces chains of operations on large planes by BandOps.
void band_operations(Ops* ops, std::vector<Value>* values, const Bands& bands);

}  // namespace aerogel
