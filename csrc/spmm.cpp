// Packing weights into streams, and cutting the work into tasks.
#include "spmm.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace aerogel {
namespace {

constexpr int64_t kLineFloats = 16;
constexpr size_t kStreamSlack = 16;   // kernels load weights four at a time
constexpr int64_t kTileRows = 8;      // tiles begin at multiples of a transposed block's side
constexpr int64_t kTasksPerThread = 4;
constexpr int32_t kMaxColumnTiles = 1024;
constexpr int32_t kSmallGroups = 4;  // block rows, walked together only if equally long

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

std::string quoted(const char* name, int64_t value) {
  return std::string(name) + "=" + std::to_string(value);
}

int64_t block_rows(const BlockRows& w) { return w.rows / w.block + w.rows % w.block; }

// First output row of block row r; the block rows of one come after the full ones.
int64_t first_output(const BlockRows& w, int64_t r) {
  const int64_t full = w.rows / w.block;
  return r < full ? r * w.block : full * w.block + (r - full);
}

int32_t block_of(const BlockRows& w, int64_t r) { return r < w.rows / w.block ? w.block : 1; }

// The number of the first value of stored column `index`, which is one of block row r.
int64_t value_of(const BlockRows& w, int64_t r, int64_t index) {
  const int64_t full = w.rows / w.block;
  if (r < full) return index * w.block;
  return w.row_ptr[full] * w.block + (index - w.row_ptr[full]);
}

}  // namespace

void spmm_check_source(const BlockRows& w) {
  if (w.block != 1 && w.block != 2 && w.block != 4) {
    fail(quoted("block", w.block) + ": expected 1, 2 or 4");
  }
  if (w.rows < 0 || w.cols < 0) fail("weight shape: expected non-negative sizes");
  const int64_t count = block_rows(w);
  if (w.row_ptr[0] != 0) fail("row_ptr: expected 0 at the beginning");
  for (int64_t r = 0; r < count; ++r) {
    if (w.row_ptr[r + 1] < w.row_ptr[r]) fail("row_ptr: expected ascending values");
    for (int64_t i = w.row_ptr[r]; i < w.row_ptr[r + 1]; ++i) {
      if (w.columns[i] < 0 || w.columns[i] >= w.cols) {
        fail(quoted("columns", w.columns[i]) + ": expected 0 <= column < " +
             std::to_string(w.cols));
      }
      if (i > w.row_ptr[r] && w.columns[i] <= w.columns[i - 1]) {
        fail("columns: expected strictly ascending columns in every row");
      }
    }
  }
  const int64_t values = value_of(w, count, w.row_ptr[count]);
  if (values > std::numeric_limits<int32_t>::max()) {
    fail(quoted("values", values) + ": expected fewer than 2^31");
  }
  for (int64_t i = 0; w.order && i < values; ++i) {
    if (w.order[i] < 0 || w.order[i] >= values) {
      fail(quoted("order", w.order[i]) + ": expected 0 <= number < " + std::to_string(values));
    }
  }
}

namespace {

void check_variant(const SpmmVariant& v, int32_t block, bool scratch, const SpmmKernels& kernels) {
  const int32_t widest = kernels.max_vectors(v.groups, block);
  if (widest == 0 || (v.groups > kSmallGroups && !scratch)) {
    const std::string lockstep = scratch && block == 1 ? ", " + std::to_string(kernels.lockstep) : "";
    fail(quoted("groups", v.groups) + ": expected one of 1, 2, 4" + lockstep);
  }
  if (v.vectors < 1 || v.vectors > widest) {
    fail(quoted("vectors", v.vectors) + ": expected 1 to " + std::to_string(widest) + " with " +
         quoted("groups", v.groups) + ", " + quoted("block", block));
  }
  if (v.k_blocks < 1) fail(quoted("k_blocks", v.k_blocks) + ": expected at least 1");
  if (v.row_tiles < 1) fail(quoted("row_tiles", v.row_tiles) + ": expected at least 1");
  if (v.column_tiles < 1 || v.column_tiles > kMaxColumnTiles) {
    fail(quoted("column_tiles", v.column_tiles) + ": expected 1 to " +
         std::to_string(kMaxColumnTiles));
  }
}

}  // namespace

struct SpmmWeight::Storage {
  std::vector<SpmmRun> runs;
  std::vector<int32_t> rows;
  std::vector<float> weights;
  std::vector<int32_t> sources;  // the number of the value that each weight is, if updatable
  std::vector<int32_t> offsets;
  std::vector<SpmmSegment> segments;
  std::vector<int64_t> tile_rows;
  std::vector<int64_t> slab_cols;
};

namespace {

// Block rows [first, last) of one tile.
struct Span {
  int64_t first, last;
};

class Packer {
 public:
  Packer(const BlockRows& source, const SpmmVariant& variant, const std::vector<int32_t>& places,
         std::vector<SpmmRun>* runs, std::vector<int32_t>* rows, std::vector<int32_t>* sources,
         std::vector<int32_t>* offsets)
      : source_(source), variant_(variant), places_(places), runs_(runs), rows_(rows),
        sources_(sources), offsets_(offsets) {}

  // Tiles of about equal work that begin at multiples of kTileRows outputs.
  std::vector<Span> tiles() const {
    const int64_t count = block_rows(source_);
    const int64_t quantum = std::max<int64_t>(kTileRows / source_.block, 1);
    const int64_t wanted = std::max<int64_t>(1, variant_.row_tiles);
    std::vector<Span> spans;
    int64_t begin = 0;
    for (int64_t t = 1; t <= wanted && begin < count; ++t) {
      const int64_t target = work_before(count) * t / wanted;
      int64_t end = begin;
      while (end < count && (end == begin || work_before(end) < target)) {
        end = std::min(count, end + quantum);
      }
      if (t == wanted) end = count;
      spans.push_back({begin, end});
      begin = end;
    }
    if (spans.empty()) spans.push_back({0, count});
    return spans;
  }

  // zeros: the place of those that padded steps read.
  void pack_segment(Span tile, int64_t k_begin, int64_t k_end, bool keep_empty_rows,
                    int32_t zeros) {
    zeros_ = zeros;
    members_.clear();
    for (int64_t r = tile.first; r < tile.last; ++r) {
      const int32_t* begin = source_.columns + source_.row_ptr[r];
      const int32_t* end = source_.columns + source_.row_ptr[r + 1];
      const int64_t from = std::lower_bound(begin, end, k_begin) - source_.columns;
      const int64_t to = std::lower_bound(begin, end, k_end) - source_.columns;
      if (to > from || keep_empty_rows) members_.push_back({r, from, to - from});
    }
    // Stable, so that equal rows stay in address order.
    std::stable_sort(members_.begin(), members_.end(), [this](const Member& a, const Member& b) {
      const int32_t block_a = block_of(source_, a.row), block_b = block_of(source_, b.row);
      return block_a != block_b ? block_a > block_b : a.count > b.count;
    });
    size_t i = 0;
    if (variant_.groups > kSmallGroups) i = pack_lockstep();
    while (i < members_.size()) i = pack_bucket(i);
  }

 private:
  struct Member {
    int64_t row, from, count;
  };

  // A row costs its stored columns and about two more for its beginning and end.
  int64_t work_before(int64_t r) const { return source_.row_ptr[r] + 2 * r; }

  // Emits all members with the same block and count as member i; returns the first of the rest.
  size_t pack_bucket(size_t i) {
    size_t end = i;
    const int32_t block = block_of(source_, members_[i].row);
    while (end < members_.size() && members_[end].count == members_[i].count &&
           block_of(source_, members_[end].row) == block) {
      ++end;
    }
    for (int32_t width = std::min(variant_.groups, kSmallGroups); width >= 1; width /= 2) {
      const size_t groups = (end - i) / width;
      if (groups == 0) continue;
      runs_->push_back({static_cast<int32_t>(members_[i].count), static_cast<int32_t>(groups),
                        width, block});
      for (size_t g = 0; g < groups; ++g, i += width) pack_group(i, width, block);
    }
    return end;
  }

  // Groups of many rows in lockstep, whatever their counts: the shorter ones are padded.
  size_t pack_lockstep() {
    const size_t width = static_cast<size_t>(variant_.groups);
    size_t i = 0;
    for (; i + width <= members_.size(); i += width) {
      const auto steps = static_cast<int32_t>(members_[i].count);
      if (i == 0 || runs_->back().steps != steps) {
        runs_->push_back({steps, 0, variant_.groups, 1});
      }
      ++runs_->back().groups;
      pack_group(i, variant_.groups, 1);
    }
    return i;
  }

  void pack_group(size_t i, int32_t width, int32_t block) {
    for (int32_t g = 0; g < width; ++g) {
      rows_->push_back(static_cast<int32_t>(first_output(source_, members_[i + g].row)));
    }
    for (int64_t s = 0; s < members_[i].count; ++s) {
      for (int32_t g = 0; g < width; ++g) {
        const Member& member = members_[i + g];
        if (s >= member.count) {
          sources_->push_back(-1);
          offsets_->push_back(zeros_);
          continue;
        }
        const int64_t value = value_of(source_, member.row, member.from + s);
        for (int32_t b = 0; b < block; ++b) {
          const int64_t number = value + b;
          sources_->push_back(source_.order ? source_.order[number]
                                            : static_cast<int32_t>(number));
        }
        offsets_->push_back(places_[static_cast<size_t>(source_.columns[member.from + s])]);
      }
    }
    sources_->resize((sources_->size() + 3) / 4 * 4);  // with value 0, which nothing multiplies
  }

  const BlockRows& source_;
  const SpmmVariant& variant_;
  const std::vector<int32_t>& places_;
  std::vector<SpmmRun>* runs_;
  std::vector<int32_t>* rows_;
  std::vector<int32_t>* sources_;
  std::vector<int32_t>* offsets_;
  std::vector<Member> members_;
  int32_t zeros_ = 0;
};

void gather(const float* values, const std::vector<int32_t>& sources, float* to) {
  // A padded step adds -0.0 * 0.0, which changes no sum, not even the sign of zero.
  for (size_t i = 0; i < sources.size(); ++i) to[i] = sources[i] < 0 ? -0.0f : values[sources[i]];
}

}  // namespace

SpmmWeight::SpmmWeight(const BlockRows& source, const SpmmVariant& variant, int64_t ldx,
                       bool updatable)
    : variant_(variant), kernels_(active_table().spmm), ldx_(variant.pack ? 0 : ldx),
      storage_(std::make_unique<Storage>()) {
  spmm_check_source(source);
  check_variant(variant, source.block, variant.pack, *kernels_);
  const int64_t row_floats = variant.pack ? variant.vectors * kernels_->lanes : ldx;
  if (row_floats < 1 || (source.cols + 2) * row_floats > std::numeric_limits<int32_t>::max() / 4) {
    fail(quoted("ldx", row_floats) + ": expected a positive stride whose " +
         std::to_string(source.cols) + " rows span less than 2 GiB");
  }
  SpmmPlaces places;
  const auto row = [&](int64_t k) { return static_cast<int32_t>(k * row_floats * 4); };
  for (int64_t k = 0; k < source.cols; ++k) places.columns.push_back(row(k));
  const int64_t slabs = std::clamp<int64_t>(variant.k_blocks, 1, std::max<int64_t>(source.cols, 1));
  for (int64_t s = 0; s <= slabs; ++s) places.slab_cols.push_back(source.cols * s / slabs);
  places.zeros.assign(static_cast<size_t>(slabs), row(source.cols));
  pack(source, places, updatable);
}

SpmmWeight::SpmmWeight(const BlockRows& source, const SpmmVariant& variant,
                       const SpmmPlaces& places)
    : variant_(variant), kernels_(active_table().spmm), ldx_(0),
      storage_(std::make_unique<Storage>()) {
  spmm_check_source(source);
  check_variant(variant, source.block, true, *kernels_);
  pack(source, places, false);
}

void SpmmWeight::pack(const BlockRows& source, const SpmmPlaces& places, bool updatable) {
  Storage& out = *storage_;
  out.slab_cols = places.slab_cols;
  const int64_t slabs = static_cast<int64_t>(places.slab_cols.size()) - 1;
  Packer packer(source, variant_, places.columns, &out.runs, &out.rows, &out.sources,
                &out.offsets);
  const auto mark = [&out] {
    out.segments.push_back({static_cast<int64_t>(out.runs.size()),
                            static_cast<int64_t>(out.rows.size()),
                            static_cast<int64_t>(out.sources.size()),
                            static_cast<int64_t>(out.offsets.size())});
  };
  for (const Span& tile : packer.tiles()) {
    out.tile_rows.push_back(tile.first < block_rows(source) ? first_output(source, tile.first)
                                                            : source.rows);
    for (int64_t s = 0; s < slabs; ++s) {
      mark();
      packer.pack_segment(tile, out.slab_cols[s], out.slab_cols[s + 1], s == 0 || s == slabs - 1,
                          places.zeros[static_cast<size_t>(s)]);
    }
  }
  mark();
  out.tile_rows.push_back(source.rows);
  if (!out.rows.empty()) out.rows.insert(out.rows.end(), kSpmmRowsBeyond, out.rows.back());
  out.weights.resize(out.sources.size() + kStreamSlack);
  gather(source.values, out.sources, out.weights.data());
  if (!updatable) std::vector<int32_t>().swap(out.sources);
  out.offsets.resize(out.offsets.size() + kStreamSlack);
  stream_ = {out.runs.data(), out.rows.data(), out.weights.data(), out.offsets.data(),
             out.segments.data(), out.tile_rows.data(), out.slab_cols.data(),
             static_cast<int64_t>(out.tile_rows.size()) - 1, slabs, source.rows, source.cols};
}

SpmmWeight::~SpmmWeight() = default;

void SpmmWeight::update(const float* values) {
  Storage& s = *storage_;
  if (s.sources.empty() && s.weights.size() > kStreamSlack) {
    fail("weight: expected one that was packed as updatable");
  }
  gather(values, s.sources, s.weights.data());
}

int64_t SpmmWeight::nbytes() const {
  const Storage& s = *storage_;
  return static_cast<int64_t>(s.runs.size() * sizeof(SpmmRun) + s.rows.size() * 4 +
                              s.weights.size() * 4 + s.sources.size() * 4 +
                              s.offsets.size() * 4 +
                              s.segments.size() * sizeof(SpmmSegment));
}

namespace {

// Whether panels are rows of a convolution's outputs; else they are columns, whatever these are.
bool on_grid(const SpmmArgs& a) { return a.window && !a.window->strips->masks; }

// Panels of a whole number of vectors and nearly equal widths, at most the variant's.
int64_t panel_count(const SpmmArgs& a) {
  if (on_grid(a)) return a.window->strips->panels(*a.window->window);
  const int64_t lanes = a.weight->kernels().lanes;
  const int64_t vectors = (a.columns + lanes - 1) / lanes;
  const int64_t widest = spmm_panel_vectors(a.weight->variant());
  return (vectors + widest - 1) / widest;
}

struct Range {
  int64_t begin, end;
};

Range panel_columns(const SpmmArgs& a, int64_t panel, int64_t panels) {
  const int64_t lanes = a.weight->kernels().lanes;
  const int64_t vectors = (a.columns + lanes - 1) / lanes;
  return {vectors * panel / panels * lanes,
          std::min(a.columns, vectors * (panel + 1) / panels * lanes)};
}

// A slab of strips, zeros, and sums unless they go to the output at once.
int64_t window_floats(const SpmmWindow& window, int64_t outputs) {
  const Strips& s = *window.strips;
  return window.slab_floats + s.grid() * (1 + (s.bare ? 0 : outputs)) + kLineFloats;
}

int64_t scratch_floats(const SpmmArgs& a) {
  const SpmmStream& s = a.weight->stream();
  if (!a.weight->variant().pack) return 0;
  const int64_t width = spmm_panel_vectors(a.weight->variant()) * a.weight->kernels().lanes;
  int64_t rows = s.cols_total + 1;
  if (a.tokens) {
    int64_t tallest = 0;
    for (int64_t t = 0; t < s.tiles; ++t) {
      tallest = std::max(tallest, s.tile_rows[t + 1] - s.tile_rows[t]);
    }
    rows += tallest;
  }
  return rows * width;
}

}  // namespace

void spmm_check(const SpmmArgs& a) {
  if (!a.weight) fail("weight: expected one");
  const SpmmStream& s = a.weight->stream();
  const bool pack = a.weight->variant().pack != 0;
  if (a.columns < 0 || a.batch < 0) fail("columns, batch: expected non-negative sizes");
  if (a.tokens && !pack) fail("tokens: expected a packing variant");
  if (!pack && !a.window && a.ldx != a.weight->ldx()) {
    fail(quoted("ldx", a.ldx) + ": the weight was packed for " + std::to_string(a.weight->ldx()));
  }
  if (a.window && (a.tokens || pack)) fail("window: expected planes and a weight read in place");
  const int64_t x_row = a.tokens   ? s.cols_total
                        : a.window ? a.window->window->in_h * a.window->window->in_w
                                   : a.columns;
  const int64_t y_row = a.tokens ? s.rows_total : a.columns;
  if (a.ldx < x_row) fail(quoted("ldx", a.ldx) + ": expected at least " + std::to_string(x_row));
  if (a.ldy < y_row) fail(quoted("ldy", a.ldy) + ": expected at least " + std::to_string(y_row));
  if (a.residual && a.ldr < y_row) {
    fail(quoted("ldr", a.ldr) + ": expected at least " + std::to_string(y_row));
  }
  const int64_t line = (a.columns + kLineFloats - 1) / kLineFloats * kLineFloats;
  const bool short_x = !a.window && a.ldx < line;
  if (a.padded && (a.tokens || short_x || a.ldy < line || (a.residual && a.ldr < line))) {
    fail("padded: expected planar rows of at least " + std::to_string(line) + " floats");
  }
}

int64_t spmm_task_count(const SpmmArgs& a, int threads) {
  const int64_t panels = a.batch * panel_count(a);
  if (panels == 0 || a.weight->stream().rows_total == 0) return 0;
  if (threads <= 1) return panels;
  // Every range of rows of a convolution gathers its panel again.
  const int64_t wanted = threads * (a.window ? 1 : kTasksPerThread);
  int64_t ranges = (wanted + panels - 1) / panels;
  if (!a.window && a.columns < a.shared_columns) ranges = (ranges + threads - 1) / threads * threads;
  ranges = std::clamp<int64_t>(ranges, 1, a.weight->stream().tiles);
  return panels * ranges;
}

void spmm_run_task(const SpmmArgs& a, int64_t task, int64_t tasks) {
  thread_local Scratch scratch;
  const SpmmWeight& weight = *a.weight;
  const int64_t panels = panel_count(a);
  const int64_t ranges = tasks / (a.batch * panels);
  // Neighbouring tasks are one thread's.
  const bool by_columns = a.columns >= a.shared_columns;
  const int64_t panel = by_columns ? task / ranges % panels : task % panels;
  const int64_t image = by_columns ? task / ranges / panels : task / panels % a.batch;
  const int64_t range = by_columns ? task % ranges : task / panels / a.batch;
  const Range columns = on_grid(a) ? Range{0, 0} : panel_columns(a, panel, panels);
  SpmmPanel p;
  p.stream = &weight.stream();
  p.variant = &weight.variant();
  p.args = &a;
  p.x = a.x + image * a.x_stride;
  p.y = a.y + image * a.y_stride;
  p.residual = a.residual ? a.residual + image * a.residual_stride : nullptr;
  p.panel = panel;
  p.column = columns.begin;
  p.width = columns.end - columns.begin;
  p.tile_begin = weight.stream().tiles * range / ranges;
  p.tile_end = weight.stream().tiles * (range + 1) / ranges;
  if (a.window) {
    const int64_t* rows = weight.stream().tile_rows;
    p.scratch = scratch.at_least(window_floats(*a.window, rows[p.tile_end] - rows[p.tile_begin]));
  } else {
    p.scratch = scratch.at_least(scratch_floats(a));
  }
  weight.kernels().run_panel(p);
}

void spmm_run(const SpmmArgs& args, int threads) {
  const int64_t tasks = spmm_task_count(args, threads);
  parallel_tasks(tasks, threads, [&](int64_t task) { spmm_run_task(args, task, tasks); });
}

}  // namespace aerogel
