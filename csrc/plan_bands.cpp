#include "plan_bands.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <limits>

namespace aerogel {

namespace {

constexpr int64_t kFloatBytes = sizeof(float);
// Rows of the last output: shorter bands spend their time on the rows that windows keep.
constexpr int64_t kLeastRows = 4;

// An odd number of lines, so that channels do not fall into the same cache sets, and a vector more
// than the rows: kernels write whole ones.
int64_t band_row(int64_t floats) {
  return (round_up(floats + 2 * kLineFloats, kLineFloats) / kLineFloats | 1) * kLineFloats;
}

double seconds_now() {
  const auto since = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double>(since).count();
}

}  // namespace

BandOp::BandOp(Ops stages, int64_t budget, std::vector<Value>* values) : stages_(std::move(stages)) {
  name = stages_.front()->name;
  inputs = stages_.front()->inputs;
  output = stages_.back()->output;
  height_ = (*values)[output].height;
  for (const std::unique_ptr<Op>& op : stages_) {
    const Value& v = (*values)[op->output];
    op->keep_outputs_together();
    buffers_.push_back({op->row_reach(), v.channels, v.height, v.width, 0, v.ld, 0});
  }
  // The most rows of the last output for which all bands fit.
  const int64_t tile = buffers_.back().reach.tile;
  const int64_t least = round_up(kLeastRows, tile);
  for (band_rows_ = round_up(height_, tile);;
       band_rows_ = std::max(least, round_up(band_rows_ / 2, tile))) {
    int64_t rows = std::min(band_rows_, height_), floats = 0;
    for (size_t i = stages_.size() - 1; i > 0; --i) {
      const RowReach& reach = buffers_[i].reach;
      Buffer& buffer = buffers_[i - 1];
      rows = (rows - 1) * reach.stride + reach.kernel + buffer.reach.tile - 1;
      rows = std::min(rows, buffer.height);
      buffer.rows = rows;
      buffer.ld = band_row(rows * buffer.width);
      buffer.offset = floats + kReadSlack;
      floats += round_up(buffer.channels * buffer.ld, kLineFloats) + 2 * kReadSlack;
    }
    buffer_floats_ = round_up(floats, kLineFloats);
    if (band_rows_ <= least || floats * kFloatBytes <= budget) break;
  }
  for (size_t i = 0; i + 1 < stages_.size(); ++i) (*values)[stages_[i]->output].ld = buffers_[i].ld;
}

void BandOp::prepare(const std::vector<Value>& values, const KernelTable& table) {
  for (const std::unique_ptr<Op>& op : stages_) op->prepare(values, table);
}

int64_t BandOp::scratch_floats() const {
  int64_t own = 0;
  for (const std::unique_ptr<Op>& op : stages_) own = std::max(own, op->scratch_floats());
  return buffer_floats_ + own;
}

int64_t BandOp::tasks(const Frame& frame) const {
  return std::min<int64_t>(std::max(frame.threads, 1), (height_ + band_rows_ - 1) / band_rows_);
}

void BandOp::run(const Frame& frame, int64_t task, int64_t tasks, float* scratch) const {
  run_timed(frame, task, tasks, scratch, nullptr);
}

void BandOp::run_timed(const Frame& frame, int64_t task, int64_t tasks, float* scratch,
                       std::vector<double>* seconds) const {
  const int64_t tile = buffers_.back().reach.tile, tiles = (height_ + tile - 1) / tile;
  RowPlaces places;
  places.x = frame.operand(inputs[0]);
  places.y = frame.operand(output);
  places.rows = {tiles * task / tasks * tile,
                 std::min(tiles * (task + 1) / tasks * tile, height_)};
  places.seconds = seconds;
  run_rows(frame, places, scratch);
}

RowReach BandOp::row_reach() const {
  if (buffers_.back().reach.tile > 1) return {};
  return {1, 1, 0, std::numeric_limits<int64_t>::max(), 1};
}

// By themselves: what the rows before them shared is made again.
void BandOp::run_rows(const Frame& frame, const RowPlaces& places, float* scratch) const {
  const Span rows = places.rows;
  std::vector<Rows> made(stages_.size());
  int64_t first = rows.first;
  for (size_t i = stages_.size(); i-- > 0;) {
    made[i].first = made[i].end = first;
    first = first_needed(buffers_[i].reach, first);
  }
  made.back().data = places.y.data;
  for (int64_t end = rows.first; end < rows.last;) {
    end = std::min(end + band_rows_, rows.last);
    run_band(frame, places, end, &made, scratch);
  }
}

// All stages up to row `end` of the last one.
void BandOp::run_band(const Frame& frame, const RowPlaces& places, int64_t end,
                      std::vector<Rows>* made, float* scratch) const {
  std::vector<double>* const seconds = places.seconds;
  std::vector<int64_t> ends(stages_.size());
  for (size_t i = stages_.size(); i-- > 0;) {
    end = std::min(round_up(end, buffers_[i].reach.tile), buffers_[i].height);
    ends[i] = std::max(end, (*made)[i].end);
    end = end_needed(buffers_[i].reach, ends[i]);
  }
  for (size_t i = 0; i < stages_.size(); ++i) {
    const Op& op = *stages_[i];
    const double begin = seconds ? seconds_now() : 0.0;
    Rows& rows = (*made)[i];
    if (ends[i] > rows.end) {
      const bool last = i + 1 == stages_.size();
      if (!last) make_room(i, scratch, made);
      Operand x = i > 0 ? frame.operand(op.inputs[0]) : places.x, y = frame.operand(op.output);
      if (i > 0) x.data = (*made)[i - 1].data;
      y.data = rows.data;
      op.run_rows(frame, {x, y, {}, {rows.end, ends[i]}}, scratch + buffer_floats_);
      rows.end = ends[i];
    }
    if (seconds) (*seconds)[i] += seconds_now() - begin;
  }
}

// Moves the rows that the next stage still needs to the front, new ones begin with a cache line.
void BandOp::make_room(size_t stage, float* scratch, std::vector<Rows>* made) const {
  const Buffer& buffer = buffers_[stage];
  Rows& rows = (*made)[stage];
  const RowReach& reach = buffers_[stage + 1].reach;
  const int64_t keep = std::min(rows.end, first_needed(reach, (*made)[stage + 1].end));
  const int64_t kept = (rows.end - std::max(keep, rows.first)) * buffer.width;
  const int64_t lead = round_up(kept, kLineFloats) - kept;
  float* const begin = scratch + buffer.offset;
  if (kept > 0) {
    const float* from = rows.data + (rows.end * buffer.width - kept);
    for (int64_t c = 0; c < buffer.channels; ++c) {
      std::memmove(begin + c * buffer.ld + lead, from + c * buffer.ld, kept * sizeof(float));
    }
  }
  rows.first = rows.end - kept / buffer.width;
  rows.data = begin + lead - rows.first * buffer.width;
}

namespace {

int64_t bytes_of(const Value& v) { return v.floats() * kFloatBytes; }

}  // namespace

// Floats of all bands of a chain of operations [first, end) that makes the fewest rows at a time.
int64_t least_floats(const Ops& ops, size_t first, size_t end, const std::vector<Value>& values) {
  int64_t rows = round_up(kLeastRows, ops[end - 1]->row_reach().tile), floats = 0;
  for (size_t i = end - 1; i > first; --i) {
    const RowReach reach = ops[i]->row_reach();
    const Value& v = values[ops[i]->inputs[0]];
    rows = (rows - 1) * reach.stride + reach.kernel + ops[i - 1]->row_reach().tile - 1;
    rows = std::min(rows, v.height);
    floats += v.channels * band_row(rows * v.width);
  }
  return floats;
}

void band_operations(Ops* ops, std::vector<Value>* values, const Bands& bands) {
  std::vector<int> readers(values->size(), 0);
  for (const std::unique_ptr<Op>& op : *ops) {
    for (int v : op->inputs) ++readers[v];
  }
  const auto chained = [&](const Op& op, const Op& next) {
    const Value& v = (*values)[op.output];
    return op.in_bands() && next.in_bands() && op.inputs.size() == 1 && next.inputs.size() == 1 &&
           next.inputs[0] == op.output && readers[op.output] == 1 && v.place == Place::kImage &&
           v.height > 1 && bytes_of(v) >= bands.from;
  };
  Ops banded;
  for (size_t i = 0; i < ops->size();) {
    size_t end = i + 1;
    while (end < ops->size() && chained(*(*ops)[end - 1], *(*ops)[end]) &&
           least_floats(*ops, i, end + 1, *values) * kFloatBytes <= bands.budget) {
      ++end;
    }
    if (end == i + 1) {
      banded.push_back(std::move((*ops)[i]));
    } else {
      Ops stages(std::make_move_iterator(ops->begin() + i),
                 std::make_move_iterator(ops->begin() + end));
      banded.push_back(std::make_unique<BandOp>(std::move(stages), bands.budget, values));
    }
    i = end;
  }
  *ops = std::move(banded);
}

}  // namespace aerogel
