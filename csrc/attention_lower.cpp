#include "attention_lower.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "attention.h"

namespace nb = nanobind;

namespace aerogel {
namespace {

template <class T>
void copy_all(const std::vector<T>& from, T* to) {
  if (to && !from.empty()) std::memcpy(to, from.data(), from.size() * sizeof(T));
}

}  // namespace

Lowered::Row Lowered::row_of(const LowerShape& shape, int64_t row) const {
  const int64_t tile = row % shape.tiles(), head = row / shape.tiles() % shape.heads;
  Row r{};
  r.first = shape.q_offset + tile * shape.block_q;
  r.last = shape.q_offset + std::min((tile + 1) * shape.block_q, shape.q_len) - 1;
  r.window = shape.window ? shape.window[head] : 0;
  r.end = shape.causal ? std::clamp<int64_t>(r.last + 1, 0, shape.k_len) : shape.k_len;
  r.begin = r.window > 0
                ? std::max<int64_t>(0, window_begin(r.first, r.window, shape.window_block))
                : 0;
  return r;
}

void Lowered::add_tiles(const LowerShape& shape, const Row& row, Range range, bool windowed,
                        int64_t source) {
  windowed = windowed && row.window > 0;
  for (int64_t begin = range.begin; begin < range.end; begin += kStepKeys) {
    const int64_t end = std::min(begin + kStepKeys, range.end);
    const bool late = shape.causal && end - 1 > row.first;
    const bool early =
        windowed && begin < window_begin(row.last, row.window, shape.window_block);
    uint8_t kind = 0;
    if (late || early) kind = early ? kTileEdge : kTileEdge | kTileNoWindow;
    kind_.push_back(kind);
    start_.push_back(static_cast<int32_t>(begin));
    length_.push_back(static_cast<int16_t>(end - begin));
    source_.push_back(static_cast<int32_t>(source));
  }
}

void Lowered::add_row(const LowerShape& shape, const LowerRanges& ranges, int64_t r) {
  const Row row = row_of(shape, r);
  merged_.clear();
  int64_t before = -1;
  for (int64_t i = ranges.ptr[r]; i < ranges.ptr[r + 1]; ++i) {
    const int64_t start = ranges.start[i] * ranges.unit;
    const int64_t length = ranges.length ? ranges.length[i] : ranges.fixed_length;
    if (start < before || start < 0 || length < 0) {
      throw std::invalid_argument("row " + std::to_string(r) + ": range at " +
                                  std::to_string(start) + " of " + std::to_string(length) +
                                  " keys after one at " + std::to_string(before) +
                                  ", expected ascending starts");
    }
    before = start;
    const Range range{std::max(start, row.begin), std::min(start + length, row.end)};
    if (range.begin >= range.end) continue;
    if (ranges.separate) {
      if (!merged_.empty() && range.begin < merged_.back().end) {
        throw std::invalid_argument("row " + std::to_string(r) + ": range at " +
                                    std::to_string(start) +
                                    " overlaps the one before, which tiles with a bias must not");
      }
      add_tiles(shape, row, range, true, i);
      merged_.push_back(range);
    } else if (!merged_.empty() && range.begin <= merged_.back().end) {
      merged_.back().end = std::max(merged_.back().end, range.end);
    } else {
      merged_.push_back(range);
    }
  }
  if (!ranges.separate) {
    for (const Range& range : merged_) add_tiles(shape, row, range, true, -1);
  }
  if (ranges.token) add_tokens(shape, ranges, row, r);
}

// Tokens outside the ranges of their row, in tiles of their own.
void Lowered::add_tokens(const LowerShape& shape, const LowerRanges& ranges, const Row& row,
                         int64_t r) {
  const size_t first_gather = gather_.size();
  size_t range = 0;
  int64_t before = -1;
  for (int64_t i = ranges.token_ptr[r]; i < ranges.token_ptr[r + 1]; ++i) {
    const int64_t token = ranges.token[i];
    if (token <= before) {
      throw std::invalid_argument("row " + std::to_string(r) + ": token " + std::to_string(token) +
                                  " after " + std::to_string(before) + ", expected ascending ones");
    }
    before = token;
    while (range < merged_.size() && merged_[range].end <= token) ++range;
    const bool covered = range < merged_.size() && token >= merged_[range].begin;
    if (covered || token < row.begin || token >= row.end) continue;
    gather_.push_back(static_cast<int32_t>(token));
  }
  for (size_t at = first_gather; at < gather_.size(); at += kStepKeys) {
    const size_t end = std::min(at + kStepKeys, gather_.size());
    const bool late = shape.causal && gather_[end - 1] > row.first;
    const bool early = row.window > 0 && gather_[at] < window_begin(row.last, row.window,
                                                                    shape.window_block);
    kind_.push_back(late || early ? kTileGather | kTileEdge : kTileGather);
    start_.push_back(static_cast<int32_t>(at));
    length_.push_back(static_cast<int16_t>(end - at));
    source_.push_back(-1);
  }
}

// What the window cuts for some query of the tile stands in tiles of its own; all other keys are
// subject to the causal rule alone.
void Lowered::add_span(const LowerShape& shape, const LowerSpans& spans, int64_t r) {
  const int64_t head = r / shape.tiles() % shape.heads;
  Row row = row_of(shape, r);
  row.begin = 0;
  const int64_t unit = spans.by_block ? spans.block : 1;
  std::vector<Range>& always = merged_;
  always.clear();
  Range cut{row.end, row.end};
  if (spans.dense[head]) {
    always.push_back({0, row.end});
  } else {
    if (spans.sink[head] > 0) always.push_back({0, std::min(spans.sink[head] * unit, row.end)});
    const int64_t stride = spans.stride[head];
    if (stride > 0) {
      const int64_t phase = (spans.phase[head] % stride + stride) % stride;
      for (int64_t b = (stride - phase) % stride; b * spans.block < row.end; b += stride) {
        always.push_back({b * spans.block, std::min((b + 1) * spans.block, row.end)});
      }
    }
    if (spans.window[head] > 0) {
      const int64_t window = spans.window[head];
      cut.begin = std::clamp<int64_t>(window_begin(row.first, window, unit), 0, row.end);
      cut.end = std::clamp<int64_t>(window_begin(row.last, window, unit), 0, row.end);
      always.push_back({cut.end, row.end});
    }
    std::sort(always.begin(), always.end(),
              [](const Range& x, const Range& y) { return x.begin < y.begin; });
  }
  const auto add_cut = [&](int64_t end) {  // up to `end`
    const int64_t upto = std::min(end, cut.end);
    if (cut.begin < upto) add_tiles(shape, row, {cut.begin, upto}, true, -1);
  };
  Range open{0, 0};
  const auto close = [&] {
    if (open.begin >= open.end) return;
    add_cut(open.begin);
    add_tiles(shape, row, open, false, -1);
    cut.begin = std::max(cut.begin, open.end);
  };
  for (const Range& range : always) {
    if (range.begin <= open.end) {
      open.end = std::max(open.end, range.end);
    } else {
      close();
      open = range;
    }
  }
  close();
  add_cut(row.end);
}

Lowered::Lowered(const LowerShape& shape, const LowerRanges& ranges) {
  const int64_t rows = shape.batches * shape.heads * shape.tiles();
  for (int64_t r = 0; r < rows; ++r) {
    add_row(shape, ranges, r);
    tile_ptr_.push_back(tiles());
  }
}

Lowered::Lowered(const LowerShape& shape, const LowerSpans& spans) {
  const int64_t rows = shape.batches * shape.heads * shape.tiles();
  for (int64_t r = 0; r < rows; ++r) {
    add_span(shape, spans, r);
    tile_ptr_.push_back(tiles());
  }
}

void Lowered::copy(int64_t* tile_ptr, uint8_t* kind, int32_t* start, int16_t* length,
                   int32_t* gather, int32_t* source) const {
  copy_all(tile_ptr_, tile_ptr);
  copy_all(kind_, kind);
  copy_all(start_, start);
  copy_all(length_, length);
  copy_all(gather_, gather);
  copy_all(source_, source);
}

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Whether so many pointers begin at 0, never fall and end at `last`.
bool rises(const int64_t* ptr, int64_t count, int64_t last) {
  return ptr[0] == 0 && ptr[count - 1] == last && std::is_sorted(ptr, ptr + count);
}

LowerShape shape_of(int64_t batches, int64_t heads, int64_t block_q, int64_t q_len, int64_t k_len,
                    int64_t q_offset, bool causal, uintptr_t window, int64_t window_block) {
  return {batches, heads, block_q, q_len, k_len, q_offset, causal,
          pointer<const int64_t>(window), window_block};
}

}  // namespace

void bind_attention_lowering(nb::module_& m) {
  nb::class_<LowerShape>(m, "LowerShape").def_static("of", &shape_of);
  nb::class_<Lowered>(m, "Lowered")
      .def_prop_ro("tiles", &Lowered::tiles)
      .def_prop_ro("gathers", &Lowered::gathers)
      .def("copy", [](const Lowered& self, uintptr_t tile_ptr, uintptr_t kind, uintptr_t start,
                      uintptr_t length, uintptr_t gather, uintptr_t source) {
        self.copy(pointer<int64_t>(tile_ptr), pointer<uint8_t>(kind), pointer<int32_t>(start),
                  pointer<int16_t>(length), pointer<int32_t>(gather), pointer<int32_t>(source));
      });
  m.def("rises", [](uintptr_t ptr, int64_t count, int64_t last) {
    return rises(pointer<const int64_t>(ptr), count, last);
  });
  m.def(
      "lower_ranges",
      [](const LowerShape& shape, uintptr_t ptr, uintptr_t start, uintptr_t length, int64_t unit,
         int64_t fixed_length, uintptr_t token_ptr, uintptr_t token, bool separate) {
        return new Lowered(shape, {pointer<const int64_t>(ptr), pointer<const int32_t>(start),
                                   pointer<const int32_t>(length), unit, fixed_length,
                                   pointer<const int64_t>(token_ptr),
                                   pointer<const int32_t>(token), separate});
      },
      nb::rv_policy::take_ownership, nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "lower_spans",
      [](const LowerShape& shape, uintptr_t sink, uintptr_t window, uintptr_t stride,
         uintptr_t phase, uintptr_t dense, int64_t block, bool by_block) {
        return new Lowered(shape, {pointer<const int64_t>(sink), pointer<const int64_t>(window),
                                   pointer<const int64_t>(stride), pointer<const int64_t>(phase),
                                   pointer<const uint8_t>(dense), block, by_block});
      },
      nb::rv_policy::take_ownership, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace aerogel
