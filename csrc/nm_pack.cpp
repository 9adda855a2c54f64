// Cutting a weight into tiles that stay in the first cache while both ways read them, and finding
// where what they keep goes.
//
// Reading order: the structure of packed weights -> where outputs go -> one way of one tile -> all.
#include "nm_pack.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace aerogel {
namespace {

// A tile, which stays in the second cache while both ways read it.
constexpr int64_t kTileRows = 128, kTileCols = 512;
static_assert(kTileRows <= kNmPackInputs);

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

void check_pattern(int64_t n, int64_t m) {
  if (n < 1 || n > m || m > kNmPackLongest) {
    fail("n=" + std::to_string(n) + ", m=" + std::to_string(m) +
         ": expected 1 <= n <= m <= " + std::to_string(kNmPackLongest));
  }
}

// Kept of the first k inputs, which end with a group or the last input.
int64_t kept_before(int64_t k, int64_t n, int64_t m) { return k / m * n + std::min(n, k % m); }

void check_packed(const SpmmWeight& weight, int64_t rows, int64_t cols, int64_t n, int64_t m) {
  const SpmmStream& s = weight.stream();
  bool fits = weight.variant().pack && s.rows_total == rows && s.cols_total == cols;
  for (int64_t segment = 0; fits && segment < s.tiles * s.slabs; ++segment) {
    const int64_t slab = segment % s.slabs, tile = segment / s.slabs;
    const int64_t begin = s.slab_cols[slab], end = s.slab_cols[slab + 1];
    const int64_t steps = kept_before(end, n, m) - kept_before(begin, n, m);
    int64_t outputs = 0;
    fits = begin % m == 0;
    for (int64_t r = s.segments[segment].run; r < s.segments[segment + 1].run; ++r) {
      fits = fits && s.runs[r].steps == steps && s.runs[r].block == 1;
      outputs += static_cast<int64_t>(s.runs[r].groups) * s.runs[r].width;
    }
    fits = fits && outputs == s.tile_rows[tile + 1] - s.tile_rows[tile];
  }
  if (!fits) {
    fail("packed: expected a packing variant of " + std::to_string(rows) + " x " +
         std::to_string(cols) + ", single rows, and " + std::to_string(n) + " of every " +
         std::to_string(m) + " inputs in slabs of whole groups");
  }
}

// One way of the whole weight.
struct Way {
  SpmmWeight* packed;
  uint8_t* mask;
  bool neighbours;  // the outputs of its product lie side by side

  bool wanted() const { return packed || mask; }
};

// The slab that holds an input.
int64_t slab_of(const SpmmStream& s, int64_t input) {
  return std::upper_bound(s.slab_cols, s.slab_cols + s.slabs, input) - s.slab_cols - 1;
}

// The tile that holds an output.
int64_t tile_of(const SpmmStream& s, int64_t output) {
  return std::upper_bound(s.tile_rows, s.tile_rows + s.tiles, output) - s.tile_rows - 1;
}

// Where outputs [begin, end) have their entries of a slab, piece by piece of `most` at most.
void find_lanes(const SpmmStream& s, int64_t slab, int64_t begin, int64_t end, int64_t most,
                NmPackLanes* to) {
  // The stream's memory belongs to a weight that the caller lets us change.
  const auto weights = const_cast<float*>(s.weights);
  const auto offsets = const_cast<int32_t*>(s.offsets);
  int64_t tile = tile_of(s, begin);
  for (; begin < end; ++tile) {
    SpmmSegment at = s.segments[tile * s.slabs + slab];
    int64_t output = s.tile_rows[tile];  // the first of a run
    const int64_t last = std::min(end, s.tile_rows[tile + 1]);
    for (; begin < last; ++at.run) {
      const SpmmRun& run = s.runs[at.run];
      const int64_t entries = static_cast<int64_t>(run.steps) * run.width;
      const int64_t stored = (entries + 3) & ~int64_t{3};
      const int64_t next = output + static_cast<int64_t>(run.groups) * run.width;
      int64_t group = 0, lane = 0;
      if (begin > output) {
        group = (begin - output) / run.width;
        lane = (begin - output) % run.width;
      }
      for (const int64_t behind = std::min(last, next); begin < behind;) {
        const int64_t count = std::min({run.width - lane, most, last - begin});
        *to++ = {weights + at.weight + group * stored + lane,
                 offsets + at.offset + group * entries + lane, run.width, count};
        begin += count;
        lane += count;
        if (lane == run.width) {
          lane = 0;
          ++group;
        }
      }
      output = next;
      at.weight += run.groups * stored;
      at.offset += run.groups * entries;
    }
  }
}

struct Tile {
  int64_t row, rows, col, cols;
};

// Pieces of a tile are so short, and their rows so far apart, that no hardware prefetcher sees them
// coming: what is read or written next is asked for here.
void fetch(const void* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) {
    __builtin_prefetch(static_cast<const char*>(from) + at, 0, 2);
  }
}

template <typename T>
void fetch(const T* matrix, int64_t ld, const Tile& part) {
  if (!matrix) return;
  for (int64_t r = part.row; r < part.row + part.rows; ++r) {
    fetch(matrix + r * ld + part.col, part.cols * static_cast<int64_t>(sizeof(T)));
  }
}

// A part of a tile that is small enough, slab by slab, and a shorter last group by itself.
bool pack_part(const NmPackArgs& a, const Way& way, const Tile& tile,
               const NmPackKernels& kernels) {
  NmPackLanes lanes[kNmPackOutputs];
  const int64_t output = way.neighbours ? tile.col : tile.row;
  const int64_t outputs = way.neighbours ? tile.cols : tile.rows;
  int64_t input = way.neighbours ? tile.row : tile.col;
  const int64_t end = input + (way.neighbours ? tile.rows : tile.cols);
  while (input < end) {
    int64_t left = end - input;
    int32_t row_bytes = 0;
    if (way.packed) {
      const SpmmStream& s = way.packed->stream();
      const int64_t slab = slab_of(s, input);
      left = std::min(end, s.slab_cols[slab + 1]) - input;
      row_bytes = way.packed->variant().vectors * way.packed->kernels().lanes * 4;
      find_lanes(s, slab, output, output + outputs, kernels.lanes, lanes);
      const int64_t step = (input - s.slab_cols[slab]) / a.m * a.n;
      for (int64_t i = 0, l = 0; l < outputs; l += lanes[i++].count) {
        lanes[i].weights += step * lanes[i].stride;
        lanes[i].offsets += step * lanes[i].stride;
        const int64_t bytes = left / a.m * a.n * lanes[i].stride * 4;
        fetch(lanes[i].weights, bytes);
        fetch(lanes[i].offsets, bytes);
      }
    }
    const int64_t inputs = left < a.m ? left : left / a.m * a.m;
    const int64_t place = way.neighbours ? input * a.cols + output : output * a.cols + input;
    const NmPackTask task{a.weight + place,
                          way.mask ? way.mask + place : nullptr,
                          a.cols,
                          way.neighbours,
                          outputs,
                          inputs,
                          a.cols - (way.neighbours ? output : input),
                          std::min(a.n, inputs),
                          std::min(a.m, inputs),
                          a.given,
                          static_cast<int32_t>(input),
                          row_bytes,
                          way.packed ? lanes : nullptr};
    if (!kernels.pack(task)) return false;
    input += inputs;
  }
  return true;
}

bool pack_tile(const NmPackArgs& a, const Way& way, const Tile& tile,
               const NmPackKernels& kernels) {
  const int64_t tall = way.neighbours ? tile.rows : kNmPackTransposed;
  const int64_t wide = way.neighbours ? kNmPackOutputs : kNmPackInputs / a.m * a.m;
  const auto part = [&](int64_t row, int64_t col) {
    return Tile{tile.row + row, std::min(tall, tile.rows - row), tile.col + col,
                std::min(wide, tile.cols - col)};
  };
  for (int64_t row = 0; row < tile.rows; row += tall) {
    for (int64_t col = 0; col < tile.cols; col += wide) {
      fetch(way.mask, a.cols, part(row, col));
      // The way that comes first brings the tile into the second cache.
      if (!way.neighbours && col + wide < tile.cols) {
        fetch(a.weight, a.cols, part(row, col + wide));
      } else if (!way.neighbours && row + tall < tile.rows) {
        fetch(a.weight, a.cols, part(row + tall, 0));
      }
      if (!pack_part(a, way, part(row, col), kernels)) return false;
    }
  }
  return true;
}

}  // namespace

std::unique_ptr<SpmmWeight> nm_packed(int64_t rows, int64_t cols, int64_t n, int64_t m,
                                      const SpmmVariant& variant) {
  check_pattern(n, m);
  const int64_t kept = kept_before(cols, n, m);
  std::vector<int32_t> columns;
  columns.reserve(static_cast<size_t>(rows * kept));
  std::vector<int64_t> row_ptr{0};
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < cols; ++k) {
      if (k % m < n) columns.push_back(static_cast<int32_t>(k));
    }
    row_ptr.push_back(static_cast<int64_t>(columns.size()));
  }
  const std::vector<float> values(columns.size());
  const BlockRows source{values.data(), columns.data(), row_ptr.data(), rows, cols, 1, nullptr};
  return std::make_unique<SpmmWeight>(source, variant, 0);
}

bool nm_pack(const NmPackArgs& a, int threads) {
  check_pattern(a.n, a.m);
  const NmPackKernels& kernels = *active_table().nm_pack;
  const Way ways[] = {{a.forward.packed, a.forward.mask, false},
                      {a.backward.packed, a.backward.mask, true}};
  for (const Way& way : ways) {
    if (a.given && way.packed && !way.mask) fail("mask: expected one for what is packed");
    if (!way.packed) continue;
    const int64_t outputs = way.neighbours ? a.cols : a.rows;
    check_packed(*way.packed, outputs, a.rows + a.cols - outputs, a.n, a.m);
  }
  const int64_t tall = kTileRows / a.m * a.m, wide = kTileCols / a.m * a.m;
  const int64_t across = (a.cols + wide - 1) / wide;
  std::atomic<bool> fits{true};
  parallel_tasks((a.rows + tall - 1) / tall * across, threads, [&](int64_t t) {
    if (!fits.load(std::memory_order_relaxed)) return;
    const int64_t row = t / across * tall, col = t % across * wide;
    const Tile tile{row, std::min(tall, a.rows - row), col, std::min(wide, a.cols - col)};
    for (const Way& way : ways) {
      if (way.wanted() && !pack_tile(a, way, tile, kernels)) fits = false;
    }
  });
  return fits;
}

bool nm_holds(const SpmmWeight& packed, const float* weight, int64_t row_step, int64_t column_step,
              int64_t output) {
  const SpmmStream& s = packed.stream();
  if (output < 0 || output >= s.rows_total) fail("output=" + std::to_string(output) + ": not one");
  const int32_t row_bytes = packed.variant().vectors * packed.kernels().lanes * 4;
  for (int64_t slab = 0; slab < s.slabs; ++slab) {
    NmPackLanes at;
    find_lanes(s, slab, output, output + 1, 1, &at);
    const int64_t segment = tile_of(s, output) * s.slabs + slab;
    for (int32_t i = s.runs[s.segments[segment].run].steps; i > 0; --i) {
      const int64_t input = *at.offsets / row_bytes;
      const float* dense = weight + output * row_step + input * column_step;
      if (std::memcmp(at.weights, dense, sizeof(float)) != 0) return false;
      at.weights += at.stride;
      at.offsets += at.stride;
    }
  }
  return true;
}

}  // namespace aerogel
