// Packing weights into strands (the format is in gemv.h), and cutting the work into tasks.
#include "gemv.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>

#include "kernels.h"
#include "layers.h"
#include "parallel.h"
#include "scratch.h"

namespace aerogel {
namespace {

constexpr int64_t kTileRows = 512, kLeastTileRows = 64;
constexpr int64_t kTiles = 8;  // wanted at least
constexpr int64_t kSlabCols = 3072;  // 12 KiB of activations; the weights pass through the same cache
constexpr int32_t kLongestGap = 255;

// Stored columns of one output that follow each other closely: `count` of them, from column index
// `from` on, of the row that begins at index `row_from`.
struct Strand {
  int64_t row, from, count;
};

class StrandPacker {
 public:
  StrandPacker(const BlockRows& rows, const StoredValues& values, std::vector<GemvGroup>* groups,
               std::vector<uint8_t>* gaps, std::vector<uint8_t>* packed)
      : rows_(rows), values_(values), width_(value_bytes(values.type)), groups_(groups),
        gaps_(gaps), packed_(packed) {}

  // Columns [k_begin, k_end) of outputs [first, last).
  void pack(int64_t first, int64_t last, int64_t k_begin, int64_t k_end) {
    std::vector<Strand> strands = collect(first, last, k_begin, k_end);
    while (!strands.empty()) {
      // Stable, so that equal outputs stay in order.
      std::stable_sort(strands.begin(), strands.end(),
                       [](const Strand& a, const Strand& b) { return a.count > b.count; });
      std::vector<Strand> rest;
      for (size_t i = 0; i < strands.size(); i += kGemvStrands) {
        const size_t n = std::min<size_t>(kGemvStrands, strands.size() - i);
        const int64_t steps = strands[i + n - 1].count;
        emit(&strands[i], n, steps, first, last, k_begin);
        for (size_t s = i; s < i + n; ++s) {
          const Strand& strand = strands[s];
          if (strand.count > steps) {
            rest.push_back({strand.row, strand.from + steps, strand.count - steps});
          }
        }
      }
      strands.swap(rest);
    }
  }

 private:
  int64_t full() const { return rows_.rows / rows_.block; }
  int64_t block_row(int64_t row) const {
    const int64_t whole = full() * rows_.block;
    return row < whole ? row / rows_.block : full() + (row - whole);
  }
  // The number of the value that output `row` has at column index i.
  int64_t value_at(int64_t row, int64_t i) const {
    if (row < full() * rows_.block) return i * rows_.block + row % rows_.block;
    return rows_.row_ptr[full()] * (rows_.block - 1) + i;
  }

  std::vector<Strand> collect(int64_t first, int64_t last, int64_t k_begin, int64_t k_end) const {
    std::vector<Strand> strands;
    for (int64_t row = first; row < last; ++row) {
      const int64_t r = block_row(row);
      const int32_t* begin = rows_.columns + rows_.row_ptr[r];
      const int32_t* end = rows_.columns + rows_.row_ptr[r + 1];
      const int64_t from = std::lower_bound(begin, end, k_begin) - rows_.columns;
      const int64_t to = std::lower_bound(begin, end, k_end) - rows_.columns;
      for (int64_t start = from, i = from + 1; start < to; ++i) {
        if (i == to || rows_.columns[i] - rows_.columns[i - 1] > kLongestGap) {
          strands.push_back({row, start, i - start});
          start = i;
        }
      }
    }
    return strands;
  }

  void emit(const Strand* strands, size_t n, int64_t steps, int64_t first, int64_t last,
            int64_t k_begin) {
    GemvGroup group{};
    group.steps = static_cast<int32_t>(steps);
    for (size_t l = 0; l < kGemvStrands; ++l) {
      group.output[l] = static_cast<uint16_t>((l < n ? strands[l].row : last) - first);
      if (l < n) {
        group.first[l] = static_cast<uint16_t>(rows_.columns[strands[l].from] - k_begin);
      }
    }
    groups_->push_back(group);
    const size_t entry = gaps_->size();
    gaps_->resize(entry + steps * kGemvStrands);
    packed_->resize(packed_->size() + steps * kGemvStrands * width_);
    for (size_t l = 0; l < n; ++l) {
      for (int64_t s = 0; s < steps; ++s) place(strands[l], s, entry + s * kGemvStrands + l);
    }
  }

  void place(const Strand& strand, int64_t step, size_t at) {
    const int64_t i = strand.from + step;
    if (step > 0) {
      (*gaps_)[at] = static_cast<uint8_t>(rows_.columns[i] - rows_.columns[i - 1]);
    }
    std::memcpy(packed_->data() + at * width_,
                static_cast<const uint8_t*>(values_.data) + value_at(strand.row, i) * width_,
                width_);
  }

  const BlockRows& rows_;
  const StoredValues& values_;
  size_t width_;
  std::vector<GemvGroup>* groups_;
  std::vector<uint8_t>* gaps_;
  std::vector<uint8_t>* packed_;
};

// Tiles of about equal work, as their first outputs and the end.
std::vector<int64_t> tile_limits(const BlockRows& w) {
  const int64_t full = w.rows / w.block;
  // A row costs its stored columns and about four more for its beginning and end.
  const auto work = [&](int64_t row) {
    const int64_t whole = full * w.block;
    const int64_t r = row < whole ? row / w.block : full + (row - whole);
    return w.row_ptr[r + 1] - w.row_ptr[r] + 4;
  };
  int64_t total = 0;
  for (int64_t row = 0; row < w.rows; ++row) total += work(row);
  const int64_t wanted = std::max<int64_t>(kTiles, std::thread::hardware_concurrency());
  std::vector<int64_t> limits{0};
  int64_t done = 0;
  for (int64_t row = 0; row < w.rows; ++row) {
    done += work(row);
    const int64_t height = row + 1 - limits.back();
    if (height == kTileRows || (height >= kLeastTileRows && done >= total / wanted)) {
      limits.push_back(row + 1);
      done = 0;
    }
  }
  if (limits.back() < w.rows || limits.size() == 1) limits.push_back(w.rows);
  return limits;
}

void check_row(const char* name, int64_t stride, int64_t needed, int64_t tokens) {
  if (tokens > 1 && stride < needed) {
    throw std::invalid_argument(std::string(name) + "=" + std::to_string(stride) +
                                ": expected at least " + std::to_string(needed));
  }
}

void check(const GemvProduct& p) {
  if (!p.weight) throw std::invalid_argument("weight: expected one");
  if (p.tokens < 0) {
    throw std::invalid_argument("tokens=" + std::to_string(p.tokens) + ": expected 0 or more");
  }
  const GemvStream& s = p.weight->stream();
  check_row("ldx", p.ldx, s.cols, p.tokens);
  check_row("ldy", p.ldy, s.rows, p.tokens);
  if (p.residual) check_row("ldr", p.ldr, s.rows, p.tokens);
}

// Floats for one column of so many vectors side by side.
int64_t width_of(int64_t tokens) {
  if (tokens == 1) return 1;
  return tokens <= kGemvStrands ? kGemvStrands : active_table().gemv->lanes;
}

// [cols][width], in memory of the calling thread.
const float* side_by_side(const GemvProduct& p, int64_t tokens, int64_t width) {
  thread_local Scratch scratch;
  const int64_t cols = p.weight->stream().cols;
  float* to = scratch.at_least(cols * width);
  if (tokens < width) std::fill_n(to, cols * width, 0.0f);
  active_table().layers->transpose(p.x, p.ldx, to, width, tokens, cols);
  return to;
}

}  // namespace

GemvWeight::GemvWeight(const BlockRows& rows, const StoredValues& values) {
  spmm_check_source(rows);
  const int64_t slabs = std::max<int64_t>(1, (rows.cols + kSlabCols - 1) / kSlabCols);
  for (int64_t s = 0; s <= slabs; ++s) slab_cols_.push_back(rows.cols * s / slabs);
  tile_rows_ = tile_limits(rows);
  if (values.scales) scales_.assign(values.scales, values.scales + rows.rows);
  StrandPacker packer(rows, values, &groups_, &gaps_, &values_);
  const auto mark = [this] {
    parts_.push_back({static_cast<int64_t>(groups_.size()), static_cast<int64_t>(gaps_.size())});
  };
  const int64_t tiles = static_cast<int64_t>(tile_rows_.size()) - 1;
  int64_t tallest = 0;
  for (int64_t t = 0; t < tiles; ++t) {
    tallest = std::max(tallest, tile_rows_[t + 1] - tile_rows_[t]);
    for (int64_t s = 0; s < slabs; ++s) {
      mark();
      packer.pack(tile_rows_[t], tile_rows_[t + 1], slab_cols_[s], slab_cols_[s + 1]);
    }
  }
  mark();
  groups_.shrink_to_fit();
  gaps_.shrink_to_fit();
  values_.shrink_to_fit();
  stream_ = {groups_.data(),     gaps_.data(), values_.data(),
             scales_.empty() ? nullptr : scales_.data(),
             parts_.data(),      tile_rows_.data(),
             slab_cols_.data(),  tiles,        slabs,
             rows.rows,          rows.cols,    tallest,
             values.type};
}

int64_t GemvWeight::nbytes() const {
  return static_cast<int64_t>(groups_.size() * sizeof(GemvGroup) + gaps_.size() + values_.size() +
                              scales_.size() * sizeof(float) + parts_.size() * sizeof(GemvPart));
}

int64_t gemv_scratch_floats(const GemvWeight& weight, int64_t tokens) {
  const int64_t sums = weight.stream().tallest_tile + 1;  // and one that nobody reads
  return tokens == 1 ? sums : 2 * sums * width_of(tokens);
}

void gemv_run_tile(const GemvProduct& product, int64_t tile, float* scratch) {
  active_table().gemv->run_tile({&product.weight->stream(), &product, product.x, 1, 1, tile, scratch});
}

void gemv_run(const GemvProduct& product, int threads) {
  check(product);
  const GemvKernels& kernels = *active_table().gemv;
  const GemvStream& stream = product.weight->stream();
  for (int64_t token = 0; token < product.tokens; token += kernels.lanes) {
    const GemvProduct part = from_token(product, token);
    const int64_t tokens = std::min(kernels.lanes, product.tokens - token);
    const int64_t width = width_of(tokens);
    const float* x = width == 1 ? part.x : side_by_side(part, tokens, width);
    parallel_tasks(stream.tiles, threads, [&](int64_t tile) {
      thread_local Scratch scratch;
      float* sums = scratch.at_least(gemv_scratch_floats(*product.weight, tokens));
      kernels.run_tile({&stream, &part, x, tokens, width, tile, sums});
    });
  }
}

}  // namespace aerogel
