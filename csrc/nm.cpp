// Packing N:M weights (the format is in nm.h), and cutting the work into tasks.
#include "nm.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace aerogel {
namespace {

constexpr int64_t kTileRows = 128;  // outputs of a task

void check_pattern(int n, int m, const BlockRows& rows) {
  if ((n != 1 && n != 2) || (m != 4 && m != 8)) {
    throw std::invalid_argument("pattern " + std::to_string(n) + ":" + std::to_string(m) +
                                ": expected 1:4, 2:4, 1:8 or 2:8");
  }
  if (rows.block != 1) throw std::invalid_argument("N:M weights have no blocks of rows");
}

int64_t tile_blocks(const NmStream& s) { return std::max<int64_t>(2, kTileRows / s.lanes); }

// x with zeros after its columns, in memory of the calling thread; x itself if there is room.
const float* filled_up(const NmProduct& p, int64_t tokens, float* to) {
  const NmStream& s = p.weight->stream();
  for (int64_t t = 0; t < tokens; ++t) {
    std::copy_n(p.x + t * p.ldx, s.cols, to + t * s.inputs());
    std::fill_n(to + t * s.inputs() + s.cols, s.inputs() - s.cols, 0.0f);
  }
  return to;
}

const NmKernels& kernels_for(const NmStream& s) {
  const NmKernels& kernels = *active_table().nm;
  if (kernels.lanes != s.lanes) {
    throw std::invalid_argument("weight: packed for " + std::to_string(s.lanes) +
                                " lanes, the instruction set in use has " +
                                std::to_string(kernels.lanes));
  }
  return kernels;
}

}  // namespace

NmWeight::NmWeight(const BlockRows& rows, const StoredValues& values, int n, int m) {
  spmm_check_source(rows);
  check_pattern(n, m, rows);
  const int64_t lanes = active_table().nm->lanes, width = value_bytes(values.type);
  const int64_t word_groups = nm_slots(m) / n, bits = nm_index_bits(m);
  const int64_t words = (rows.cols + word_groups * m - 1) / (word_groups * m);
  const int64_t groups = words * word_groups, blocks = (rows.rows + lanes - 1) / lanes;
  values_.assign(blocks * groups * n * lanes * width, 0);
  indices_.assign(blocks * words * lanes, 0);
  if (values.scales) scales_.assign(values.scales, values.scales + rows.rows);
  const auto data = static_cast<const uint8_t*>(values.data);
  for (int64_t row = 0; row < rows.rows; ++row) {
    const int64_t block = row / lanes, lane = row % lanes;
    const auto put_index = [&](int64_t group, int64_t slot, uint32_t index) {
      uint32_t& word = indices_[(block * words + group / word_groups) * lanes + lane];
      word |= index << ((group % word_groups * n + slot) * bits);
    };
    int64_t last_group = -1, used = 0;
    uint32_t last_index = 0;
    const auto fill_group = [&] {  // slots that the group before does not need
      for (int64_t slot = used; last_group >= 0 && slot < n; ++slot) {
        put_index(last_group, slot, last_index);
      }
    };
    for (int64_t i = rows.row_ptr[row]; i < rows.row_ptr[row + 1]; ++i) {
      const int64_t column = rows.columns[i], group = column / m;
      if (group != last_group) {
        fill_group();
        last_group = group;
        used = 0;
      }
      if (used == n) {
        throw std::invalid_argument("weight: output " + std::to_string(row) + " has more than " +
                                    std::to_string(n) + " of the inputs from " +
                                    std::to_string(group * m) + " to " +
                                    std::to_string(group * m + m - 1));
      }
      last_index = static_cast<uint32_t>(column % m);
      put_index(group, used, last_index);
      const int64_t at = ((block * groups + group) * n + used) * lanes + lane;
      std::memcpy(values_.data() + at * width, data + i * width, width);
      ++used;
    }
    fill_group();
  }
  stream_ = {values_.data(), indices_.data(), scales_.empty() ? nullptr : scales_.data(),
             rows.rows,      rows.cols,       blocks,
             groups,         lanes,           n,
             m,              values.type};
}

int64_t NmWeight::nbytes() const {
  return static_cast<int64_t>(values_.size() + indices_.size() * sizeof(uint32_t) +
                              scales_.size() * sizeof(float));
}

int64_t nm_tiles(const NmWeight& weight) {
  const NmStream& s = weight.stream();
  return (s.blocks + tile_blocks(s) - 1) / tile_blocks(s);
}

int64_t nm_scratch_floats(const NmWeight& weight) {
  const NmStream& s = weight.stream();
  return s.inputs() == s.cols ? 0 : s.inputs();
}

void nm_run_tile(const NmProduct& product, int64_t tile, float* scratch) {
  const NmStream& s = product.weight->stream();
  const float* x = s.inputs() == s.cols ? product.x : filled_up(product, 1, scratch);
  const int64_t first = tile * tile_blocks(s);
  kernels_for(s).run_blocks(
      {&s, &product, x, s.inputs(), 1, first, std::min(s.blocks, first + tile_blocks(s))});
}

void nm_run(const NmProduct& product, int threads) {
  const NmStream& s = product.weight->stream();
  const NmKernels& kernels = kernels_for(s);
  thread_local Scratch scratch;
  for (int64_t token = 0; token < product.tokens; token += kNmTokens) {
    const NmProduct part = from_token(product, token);
    const int64_t tokens = std::min(kNmTokens, product.tokens - token);
    const float* x = part.x;
    int64_t ldx = part.ldx;
    if (s.inputs() != s.cols) {
      x = filled_up(part, tokens, scratch.at_least(tokens * s.inputs()));
      ldx = s.inputs();
    }
    parallel_tasks(nm_tiles(*product.weight), threads, [&](int64_t tile) {
      const int64_t first = tile * tile_blocks(s);
      kernels.run_blocks(
          {&s, &part, x, ldx, tokens, first, std::min(s.blocks, first + tile_blocks(s))});
    });
  }
}

}  // namespace aerogel
