#include "plan_parts.h"

#include <algorithm>
#include <cstring>

namespace aerogel {

namespace {

// Of a part, and floats of a row. Smaller ones would be mostly borders; kernels that take small planes
// as a whole sum up in another order, and results do not depend on the number of threads.
constexpr int64_t kLeastRows = 3, kLeastWidth = 7;
constexpr int64_t kQuad = 4;  // floats that are copied at a time
static_assert(kQuad <= kLeastWidth);

Span part_rows(int64_t height, int64_t part, int64_t parts) {
  return {height * part / parts, height * (part + 1) / parts};
}

Span needed_rows(const RowReach& reach, Span rows) {
  return {first_needed(reach, rows.first), end_needed(reach, rows.last)};
}

// Output rows of a part may need input rows of another one.
bool looks_beyond(const RowReach& reach) { return reach.kernel > 1 || reach.stride > 1; }

Operand part_of(const Frame& frame, int id, int64_t part) {
  const Value& v = frame.values[id];
  Operand operand = frame.operand(id);
  if (v.parts > 1) {
    const int64_t first = part_rows(v.height, part, v.parts).first;
    operand.data += v.part_offset(part) + v.lead - first * v.width;
  }
  return operand;
}

// Where a part keeps copies of its last `above` rows and its first `below` ones, channel by channel.
struct Edges {
  float *last, *first;
};

Edges edges_of(const Frame& frame, int id, int64_t part) {
  const Value& v = frame.values[id];
  float* const last = frame.operand(id).data + v.part_offset(part) + v.channels * v.ld;
  return {last, last + v.channels * v.above * v.width};
}

// Of every channel so many floats, none or at least kQuad: a call of memcpy for each would take longer.
void copy_rows(const float* from, int64_t from_ld, float* to, int64_t to_ld, int64_t channels,
               int64_t floats) {
  if (floats == 0) return;
  const int64_t last = floats - kQuad;
  for (int64_t c = 0; c < channels; ++c, from += from_ld, to += to_ld) {
    for (int64_t i = 0; i < last; i += kQuad) std::memcpy(to + i, from + i, kQuad * sizeof(float));
    std::memcpy(to + last, from + last, kQuad * sizeof(float));
  }
}

// Once a part is made: the rows that its neighbours need, in one piece. They would have to read them
// from cache lines that this part's thread writes to.
void give_edges(const Frame& frame, int id, int64_t part) {
  const Value& v = frame.values[id];
  const Span rows = part_rows(v.height, part, v.parts);
  const float* const own = part_of(frame, id, part).data;
  const Edges edges = edges_of(frame, id, part);
  const int64_t last = v.above * v.width, first = v.below * v.width;
  if (part + 1 < v.parts) {
    copy_rows(own + rows.last * v.width - last, v.ld, edges.last, last, v.channels, last);
  }
  if (part > 0) copy_rows(own + rows.first * v.width, v.ld, edges.first, first, v.channels, first);
}

void take_edges(const Frame& frame, int id, int64_t part) {
  const Value& v = frame.values[id];
  const Span rows = part_rows(v.height, part, v.parts);
  float* const own = part_of(frame, id, part).data;
  const int64_t last = v.above * v.width, first = v.below * v.width;
  if (part > 0) {
    copy_rows(edges_of(frame, id, part - 1).last, last, own + rows.first * v.width - last, v.ld,
              v.channels, last);
  }
  if (part + 1 < v.parts) {
    copy_rows(edges_of(frame, id, part + 1).first, first, own + rows.last * v.width, v.ld,
              v.channels, first);
  }
}

}  // namespace

void join_parts(const Frame& frame, int id, Span channels, float* to, int64_t ld) {
  const Value& v = frame.values[id];
  for (int64_t part = 0; part < v.parts; ++part) {
    const Span rows = part_rows(v.height, part, v.parts);
    const int64_t first = rows.first * v.width;
    copy_rows(part_of(frame, id, part).data + channels.first * v.ld + first, v.ld, to + first, ld,
              channels.last - channels.first, rows.last * v.width - first);
  }
}

PartOp::PartOp(std::unique_ptr<Op> made, int64_t parts) : op_(std::move(made)), parts_(parts) {
  name = op_->name;
  inputs = op_->inputs;
  output = op_->output;
  op_->keep_outputs_together();
}

void PartOp::run(const Frame& frame, int64_t task, int64_t tasks, float* scratch) const {
  run_timed(frame, task, tasks, scratch, nullptr);
}

void PartOp::run_timed(const Frame& frame, int64_t task, int64_t, float* scratch,
                       std::vector<double>* seconds) const {
  const Value &from = frame.values[inputs[0]], &to = frame.values[output];
  RowPlaces places;
  places.rows = part_rows(to.height, task, parts_);
  if (from.parts > 1 && looks_beyond(op_->row_reach())) take_edges(frame, inputs[0], task);
  places.x = part_of(frame, inputs[0], task);
  places.y = part_of(frame, output, task);
  places.residual = inputs.size() > 1 ? part_of(frame, inputs[1], task) : Operand{};
  places.spare = to.parts > 1;
  places.part = task;
  places.parts = parts_;
  places.seconds = seconds;
  op_->run_rows(frame, places, scratch);
  if (to.parts > 1) give_edges(frame, output, task);
}

namespace {

class Parting {
 public:
  Parting(const Ops& ops, std::vector<Value>* values, int64_t parts)
      : ops_(ops), values_(*values), parts_(parts), split_(values->size(), false) {
    find_fitting();
    for (bool dropped = true; dropped;) {
      dropped = false;
      for (const std::unique_ptr<Op>& op : ops_) {
        if (writes_well(*op)) continue;
        for (int v : op->inputs) {
          dropped = dropped || split_[v];
          split_[v] = false;
        }
      }
    }
    for (size_t v = 0; v < values_.size(); ++v) {
      if (split_[v]) lay_out(static_cast<int>(v));
    }
  }

  // Whether an operation runs part by part.
  bool parts(const Op& op) const {
    const bool reads =
        std::any_of(op.inputs.begin(), op.inputs.end(), [&](int v) { return split_[v]; });
    return split_[op.output] || (reads && makes_rows(op));
  }

 private:
  void find_fitting() {
    for (const std::unique_ptr<Op>& op : ops_) {
      const Value& v = values_[op->output];
      split_[op->output] = makes_rows(*op) && v.place == Place::kImage && !v.tokens;
    }
    for (const std::unique_ptr<Op>& op : ops_) {
      const bool reads = makes_rows(*op) ? op->reads_parts() : op->joins_parts();
      for (int v : op->inputs) split_[v] = split_[v] && reads;
    }
    for (size_t v = 0; v < values_.size(); ++v) {
      if (!split_[v]) continue;
      const Margins m = margins(static_cast<int>(v));
      split_[v] = std::max(m.above, m.below) <= kLeastRows;  // which are all in the next part
    }
  }

  bool makes_rows(const Op& op) const {
    const Value& v = values_[op.output];
    return op.row_reach().kernel > 0 && v.height >= kLeastRows * parts_ && v.width >= kLeastWidth;
  }

  // One that adds to its output again and again does not leave the parts.
  bool writes_well(const Op& op) const { return op.writes_once() || split_[op.output]; }

  // Most rows that readers of a part need of the parts beside it.
  struct Margins {
    int64_t above = 0, below = 0;
  };

  Margins margins(int id) const {
    const Value& v = values_[id];
    Margins most;
    for (const std::unique_ptr<Op>& op : ops_) {
      if (op->inputs[0] != id || !makes_rows(*op) || !looks_beyond(op->row_reach())) continue;
      const int64_t height = values_[op->output].height;
      for (int64_t part = 0; part < parts_; ++part) {
        const Span rows = part_rows(v.height, part, parts_);
        const Span needed = needed_rows(op->row_reach(), part_rows(height, part, parts_));
        most.above = std::max(most.above, rows.first - needed.first);
        most.below = std::max(most.below, needed.last - rows.last);
      }
    }
    return most;
  }

  void lay_out(int id) {
    Value& v = values_[id];
    const Margins most = margins(id);
    const int64_t own = (v.height + parts_ - 1) / parts_;  // rows, at most
    v.parts = parts_;
    v.above = most.above;
    v.below = most.below;
    // Own rows begin with a cache line, and whole vectors may be written behind them.
    v.lead = round_up(v.above * v.width, kLineFloats);
    v.ld = padded_row(v.lead + (own + v.below) * v.width + kLineFloats);
    v.part_floats = round_up(v.channels * (v.ld + (v.above + v.below) * v.width), kLineFloats);
  }

  const Ops& ops_;
  std::vector<Value>& values_;
  const int64_t parts_;
  std::vector<bool> split_;
};

}  // namespace

void part_planes(Ops* ops, std::vector<Value>* values, int64_t parts) {
  const Parting parting(*ops, values, parts);
  for (std::unique_ptr<Op>& op : *ops) {
    if (parting.parts(*op)) op = std::make_unique<PartOp>(std::move(op), parts);
  }
}

}  // namespace aerogel
