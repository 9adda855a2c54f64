// Sparse weight x one to a few activation vectors: y[t] = act(W x[t] + bias (+ residual[t])). The
// weight comes from memory once and sets the time, so that it is stored as tightly as the loop can
// still read it; values are float32, bfloat16 or int8 (stored_values.h).
//
// The format. Outputs are cut into tiles, inputs into slabs whose activations stay in the first
// cache. In each (tile, slab) the stored columns of one output, in ascending order, are a *strand*;
// a gap of more than 255 columns ends a strand and begins another. Four strands of equal length
// walk together as the lanes of a *group*: strands are sorted by length, four neighbours are cut to
// the shortest of them, and what is left of the others are strands again. So no lane is padded, no
// row waits for a longer one, and loops end predictably.
//
//   gaps    uint8 [step][4]   from the lane's previous column; 0 in the first step
//   values  [step][4]         as stored
//   groups  steps, and for each lane its first column (in the slab) and its output (in the tile)
//
// That is 5, 3 or 2 bytes a non-zero. Where fewer than four strands are left, the idle lanes
// multiply zeros into an output that nobody reads: infinities and NaN reach only outputs that store
// their column.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "epilogue.h"
#include "spmm.h"
#include "stored_values.h"

namespace aerogel {

struct GemvKernels;

constexpr int kGemvStrands = 4;  // lanes of a group

struct GemvGroup {
  int32_t steps;
  uint16_t first[kGemvStrands];
  uint16_t output[kGemvStrands];  // idle lanes: the tile's number of outputs
};

// Where one (tile, slab) begins in the streams; entries are counted in strands, four a step.
struct GemvPart {
  int64_t group, entry;
};

// What the kernels read: plain pointers, valid as long as the GemvWeight lives.
struct GemvStream {
  const GemvGroup* groups;
  const uint8_t* gaps;
  const void* values;
  const float* scales;  // [rows] or null
  const GemvPart* parts;     // [tile][slab], and one past the end
  const int64_t* tile_rows;  // first output of each tile, tiles + 1 entries
  const int64_t* slab_cols;  // first input of each slab, slabs + 1 entries
  int64_t tiles, slabs, rows, cols;
  int64_t tallest_tile;  // in outputs
  ValueType type;
};

// One weight as a stream. Immutable: threads share it.
class GemvWeight {
 public:
  // Copies everything; `rows.values` and `rows.order` are not read, the values are `values`. Throws
  // std::invalid_argument as SpmmWeight.
  GemvWeight(const BlockRows& rows, const StoredValues& values);
  GemvWeight(const GemvWeight&) = delete;
  GemvWeight& operator=(const GemvWeight&) = delete;

  const GemvStream& stream() const { return stream_; }
  int64_t nbytes() const;

 private:
  std::vector<GemvGroup> groups_;
  std::vector<uint8_t> gaps_, values_;
  std::vector<float> scales_;
  std::vector<GemvPart> parts_;
  std::vector<int64_t> tile_rows_, slab_cols_;
  GemvStream stream_{};
};

// Vectors lie one after the other, `ld` floats apart.
template <class Weight>
struct VectorProduct {
  const Weight* weight = nullptr;
  const float* bias = nullptr;  // [rows] or null
  const float* x = nullptr;
  int64_t ldx = 0;
  float* y = nullptr;
  int64_t ldy = 0;
  const float* residual = nullptr;  // or null; must not be y
  int64_t ldr = 0;
  int64_t tokens = 1;
  Activation activation = Activation::kNone;
};

// The same from one of its vectors on.
template <class Weight>
VectorProduct<Weight> from_token(VectorProduct<Weight> p, int64_t token) {
  p.x += token * p.ldx;
  p.y += token * p.ldy;
  if (p.residual) p.residual += token * p.ldr;
  return p;
}

using GemvProduct = VectorProduct<GemvWeight>;

// All of it on `threads` threads; the result does not depend on them. The weight is read once for
// every `lanes` vectors. Throws std::invalid_argument if strides contradict the weight.
void gemv_run(const GemvProduct& product, int threads);

// One tile for one vector: a plan's task. `scratch`: gemv_scratch_floats(weight, 1) floats.
void gemv_run_tile(const GemvProduct& product, int64_t tile, float* scratch);
int64_t gemv_scratch_floats(const GemvWeight& weight, int64_t tokens);

// One tile for up to `lanes` vectors: what every instruction set provides.
struct GemvTask {
  const GemvStream* stream;
  const GemvProduct* product;  // its first vector is the first of these
  const float* x;  // the vector, or several of them side by side: [cols][width]
  int64_t tokens;
  int64_t width;  // 1, kGemvStrands or all lanes of a vector register
  int64_t tile;
  float* scratch;
};

struct GemvKernels {
  int64_t lanes;
  void (*run_tile)(const GemvTask& task);
};

}  // namespace aerogel
