#include "plan_arena.h"

#include <algorithm>
#include <utility>

namespace aerogel {

namespace {

constexpr int64_t kPartsApart = 1024;  // floats: prefetchers stay within a page

// A stretch of memory and the steps [first, last] during which it is in use.
struct Block {
  int64_t floats, first, last, offset;
};

bool lower(const Block* a, const Block* b) { return a->offset < b->offset; }

// Greedy by size: large blocks first, each at the lowest offset free during its whole life. `fixed`
// ones have their places.
int64_t pack_blocks(std::vector<Block>* blocks, std::vector<Block> fixed = {}) {
  std::vector<Block*> order, placed;
  for (Block& b : *blocks) order.push_back(&b);
  std::stable_sort(order.begin(), order.end(),
                   [](const Block* a, const Block* b) { return a->floats > b->floats; });
  int64_t total = 0;
  for (Block& b : fixed) {
    placed.push_back(&b);
    total = std::max(total, b.offset + b.floats);
  }
  std::stable_sort(placed.begin(), placed.end(), lower);
  for (Block* block : order) {
    int64_t offset = 0;
    for (const Block* other : placed) {  // by offset
      if (other->last < block->first || block->last < other->first) continue;
      if (offset + block->floats <= other->offset) break;
      offset = std::max(offset, other->offset + other->floats);
    }
    block->offset = offset;
    total = std::max(total, offset + block->floats);
    placed.insert(std::upper_bound(placed.begin(), placed.end(), block, lower), block);
  }
  return total;
}

// The input of the output's own form whose place the output may take, or -1. Another input in the
// same place would be overwritten while it is read.
int replaced_value(const Op& op, const std::vector<Value>& values) {
  const int i = op.replaced_input();
  if (i < 0) return -1;
  const int in = op.inputs[static_cast<size_t>(i)];
  const Value& from = values[static_cast<size_t>(in)];
  // Whole vectors of an image's result run over into the next image, whose input is still needed.
  if (from.place == Place::kGroup && !op.on_group) return -1;
  const Value& out = values[static_cast<size_t>(op.output)];
  if (from.ld != out.ld || from.channels != out.channels) return -1;
  if (from.parts != out.parts || from.lead != out.lead) return -1;
  if (from.part_floats < out.part_floats) return -1;
  if (i > 0 && std::count(op.inputs.begin(), op.inputs.end(), in) > 1) return -1;
  return in;
}

// The places of all values that operations make in one arena.
class Arena {
 public:
  Arena(const Ops& ops, Place place, std::vector<Value>* values)
      : place_(place), values_(*values), last_use_(values->size(), -1),
        block_of_(values->size(), -1) {
    for (size_t i = 0; i < ops.size(); ++i) {
      for (int v : ops[i]->inputs) last_use_[v] = static_cast<int64_t>(i);
    }
    if (place == Place::kGroup) add_made_before(ops);
    for (size_t i = 0; i < ops.size(); ++i) add(*ops[i], static_cast<int64_t>(i));
  }

  int64_t lay_out() {
    const int64_t floats = pack_blocks(&parts_), stride = floats + kPartsApart;
    std::vector<Block> fixed;
    for (size_t v = 0; v < values_.size(); ++v) {
      Value& value = values_[v];
      if (block_of_[v] < 0 || value.parts == 1) continue;
      const Block& block = parts_[block_of_[v]];
      value.offset = block.offset;
      value.part_stride = stride;
      value.odd_shift = floats - 2 * block.offset - block.floats;
      for (int64_t part = 0; part < value.parts; ++part) {
        Block own = block;
        own.offset += value.part_offset(part);
        fixed.push_back(own);
      }
    }
    const int64_t total = pack_blocks(&blocks_, std::move(fixed));
    for (size_t v = 0; v < values_.size(); ++v) {
      Value& value = values_[v];
      if (block_of_[v] >= 0 && value.parts == 1) value.offset = blocks_[block_of_[v]].offset;
    }
    return total;
  }

 private:
  // What the operations before these leave for a group, image by image: all of it at the same time.
  void add_made_before(const Ops& ops) {
    std::vector<bool> made(values_.size(), false);
    for (const std::unique_ptr<Op>& op : ops) made[op->output] = true;
    for (size_t v = 0; v < values_.size(); ++v) {
      if (made[v] || values_[v].place != place_) continue;
      block_of_[v] = static_cast<int>(blocks_.size());
      blocks_.push_back({round_up(values_[v].floats(), kLineFloats), -1, last_use_[v], 0});
    }
  }

  void add(const Op& op, int64_t step) {
    const Value& out = values_[op.output];
    if (out.place != place_) return;
    std::vector<Block>& blocks = out.parts > 1 ? parts_ : blocks_;
    const int64_t last = std::max(step, last_use_[op.output]);
    if (const int in = replaced_value(op, values_); in >= 0) {
      if (block_of_[in] >= 0 && last_use_[in] == step) {
        Block& block = blocks[block_of_[in]];
        block_of_[op.output] = block_of_[in];
        block.last = std::max(block.last, last);
        return;
      }
    }
    block_of_[op.output] = static_cast<int>(blocks.size());
    const int64_t floats = out.parts > 1 ? out.part_floats : out.floats();
    blocks.push_back({round_up(floats, kLineFloats), step, last, 0});
  }

  const Place place_;
  std::vector<Value>& values_;
  std::vector<int64_t> last_use_;
  std::vector<int> block_of_;  // of a value, among those of its kind
  std::vector<Block> blocks_, parts_;
};

}  // namespace

int64_t lay_out_arena(const Ops& ops, Place place, std::vector<Value>* values) {
  return Arena(ops, place, values).lay_out();
}

}  // namespace aerogel
