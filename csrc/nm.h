// N:M weight x one to a few activation vectors: y[t] = act(W x[t] + bias (+ residual[t])), where of
// every m consecutive inputs (4 or 8) an output reads at most n (1 or 2). As gemv.h, this is a way
// from memory; knowing the pattern makes it shorter: an index takes 2 or 3 bits instead of a byte.
//
// The format. `lanes` outputs are a block, one a lane. A group of m activations is one load for all
// of them, from which each lane takes its own with a permutation, so nothing is gathered.
//
//   values   [block][group][slot][lanes]    as stored
//   indices  [block][word][lanes]           uint32; 16 slots of 2 bits (m = 4), 10 of 3 (m = 8)
//
// Blocks and words are filled up with zeros. A slot that its group does not need repeats the column
// of another in the group, or reads the group's first: infinities and NaN of activations reach only
// outputs that store something in that group.
#pragma once

#include <cstdint>
#include <vector>

#include "gemv.h"
#include "spmm.h"
#include "stored_values.h"

namespace aerogel {

constexpr int nm_index_bits(int m) { return m == 4 ? 2 : 3; }
constexpr int nm_slots(int m) { return 32 / nm_index_bits(m); }  // of an index word
constexpr int64_t kNmTokens = 8;                                // vectors that share a pass

struct NmStream {
  const void* values;
  const uint32_t* indices;
  const float* scales;  // [rows] or null
  int64_t rows, cols, blocks;
  int64_t groups;  // with those that fill up the last word
  int64_t lanes;
  int n, m;
  ValueType type;

  int64_t words() const { return groups * n / nm_slots(m); }
  int64_t inputs() const { return groups * m; }  // columns and what fills them up
};

// One weight as a stream. Immutable: threads share it.
class NmWeight {
 public:
  // Copies everything; `rows.values` and `rows.order` are not read, the values are `values`. For the
  // instruction set in use. Throws std::invalid_argument as SpmmWeight, for blocks of rows, another
  // n or m, or a group that holds more than n.
  NmWeight(const BlockRows& rows, const StoredValues& values, int n, int m);
  NmWeight(const NmWeight&) = delete;
  NmWeight& operator=(const NmWeight&) = delete;

  const NmStream& stream() const { return stream_; }
  int64_t nbytes() const;

 private:
  std::vector<uint8_t> values_;
  std::vector<uint32_t> indices_;
  std::vector<float> scales_;
  NmStream stream_{};
};

using NmProduct = VectorProduct<NmWeight>;

// All of it on `threads` threads; the result does not depend on them. The weight is read once for
// every kNmTokens vectors. Throws std::invalid_argument if the weight was packed for another
// instruction set.
void nm_run(const NmProduct& product, int threads);

// A plan's tasks: some blocks for one vector. `scratch`: nm_scratch_floats(weight) floats.
int64_t nm_tiles(const NmWeight& weight);
int64_t nm_scratch_floats(const NmWeight& weight);
void nm_run_tile(const NmProduct& product, int64_t tile, float* scratch);

// Blocks [first, last) for up to kNmTokens vectors: what every instruction set provides.
struct NmTask {
  const NmStream* stream;
  const NmProduct* product;  // its first vector is the first of these
  const float* x;            // [tokens][ldx], readable for inputs() floats each
  int64_t ldx;
  int64_t tokens;
  int64_t first, last;
};

struct NmKernels {
  int64_t lanes;
  void (*run_blocks)(const NmTask& task);
};

}  // namespace aerogel
