// From what a selector chose to the tiles that attention.h reads: ranges of keys per query tile are
// cut to what the causal rule and the window leave, merged where they touch, and cut into tiles.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <vector>

namespace aerogel {

// Query tiles: row (b * heads + h) * tiles + t of a plan holds block_q queries of one head.
struct LowerShape {
  int64_t batches, heads, block_q, q_len, k_len, q_offset;
  bool causal;
  const int64_t* window;  // per head, or null; 0 for a head without one
  int64_t window_block;

  int64_t tiles() const { return (q_len + block_q - 1) / block_q; }
};

// Per row, ranges with ascending starts; single keys besides, ascending, may be null.
struct LowerRanges {
  const int64_t* ptr;
  const int32_t* start;   // in units of `unit` keys
  const int32_t* length;  // keys, or null: all have `fixed_length`
  int64_t unit, fixed_length;
  const int64_t* token_ptr;
  const int32_t* token;
  bool separate;  // tiles keep to one range, and say which: ranges must not overlap
};

// Per head: the first `sink` units, the last `window` ones, and every stride-th block; all of them
// where `dense` is set. Units are keys, or blocks of `block` of them.
struct LowerSpans {
  const int64_t *sink, *window, *stride, *phase;
  const uint8_t* dense;
  int64_t block;
  bool by_block;
};

class Lowered {
 public:
  // Throw std::invalid_argument if ranges are out of order.
  Lowered(const LowerShape& shape, const LowerRanges& ranges);
  Lowered(const LowerShape& shape, const LowerSpans& spans);

  int64_t tiles() const { return static_cast<int64_t>(kind_.size()); }
  int64_t gathers() const { return static_cast<int64_t>(gather_.size()); }
  // Null addresses are passed over.
  void copy(int64_t* tile_ptr, uint8_t* kind, int32_t* start, int16_t* length, int32_t* gather,
            int32_t* source) const;

 private:
  struct Range {
    int64_t begin, end;
  };
  // One query tile: positions of its queries, and the keys that some query may read.
  struct Row {
    int64_t first, last, begin, end, window;
  };
  Row row_of(const LowerShape& shape, int64_t row) const;
  void add_tiles(const LowerShape& shape, const Row& row, Range range, bool windowed,
                 int64_t source);
  void add_row(const LowerShape& shape, const LowerRanges& ranges, int64_t r);
  void add_tokens(const LowerShape& shape, const LowerRanges& ranges, const Row& row, int64_t r);
  void add_span(const LowerShape& shape, const LowerSpans& spans, int64_t r);

  std::vector<int64_t> tile_ptr_{0};
  std::vector<uint8_t> kind_;
  std::vector<int32_t> start_, gather_, source_;
  std::vector<int16_t> length_;
  std::vector<Range> merged_;  // of the row at work
};

void bind_attention_lowering(nanobind::module_& m);

}  // namespace aerogel
