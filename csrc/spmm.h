// Sparse weights x dense activations, float32: y = act(W x + bias (+ residual)).
//
// Activations are planar, x[K][ldx] -> y[N][ldy] (the [C, H*W] planes of one image), or token-major,
// x[T][ldx] -> y[T][ldy] with a token's K features side by side. `columns` counts pixels or tokens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "epilogue.h"
#include "layers.h"
#include "strips.h"

namespace aerogel {

struct SpmmKernels;
struct KernelTable;

// How one weight is executed. All variants of one weight give the same bits.
struct SpmmVariant {
  int32_t vectors = 8;   // widest register tile, in vectors of the instruction set
  int32_t groups = 1;    // block rows walked together: 1, 2, 4 or the kernels' `lockstep`
  int32_t k_blocks = 1;  // the input features are walked in so many slabs, to keep them in L1
  int32_t row_tiles = 1;  // the outputs are cut into at least so many tiles of equal work
  int32_t pack = 0;      // 1: slabs are copied to aligned scratch (misaligned or power-of-two rows)
  int32_t column_tiles = 1;  // register tiles side by side in a panel: their weights are read once
};

// The portable form, borrowed: block row r covers output rows r * block ... and holds columns
// row_ptr[r] .. row_ptr[r + 1], each with `block` weights. The last rows % block rows follow as
// block rows of one.
struct BlockRows {
  const float* values;
  const int32_t* columns;
  const int64_t* row_ptr;  // rows / block + rows % block + 1 entries
  int64_t rows;
  int64_t cols;
  int32_t block;
  const int32_t* order = nullptr;  // value i is values[order[i]]; null: values[i]
};

// Throws std::invalid_argument if the parts do not describe a weight matrix.
void spmm_check_source(const BlockRows& source);

// Rows of one tile whose columns lie in one slab: runs of groups with equal step counts, so that
// the loop's end is predictable. Small groups are of rows with as many columns each; the shorter
// rows of a lockstep group are padded with steps that change nothing: -0.0 times a row of zeros.
struct SpmmRun {
  int32_t steps;   // columns per block row
  int32_t groups;  // how many groups of `width` block rows follow
  int32_t width;   // block rows per group
  int32_t block;   // output rows per block row
};

// Where one (tile, slab) begins in the streams.
struct SpmmSegment {
  int64_t run, row, weight, offset;
};

// Kernels look so many block rows ahead.
constexpr int kSpmmRowsBeyond = 16;

// What the kernels read: plain pointers, valid as long as the SpmmWeight lives.
struct SpmmStream {
  const SpmmRun* runs;
  const int32_t* rows;      // first output row of each block row, the last one repeated
                            // kSpmmRowsBeyond times
  const float* weights;     // per group: [steps][width][block], start padded to 4 floats
  const int32_t* offsets;   // per group: [steps][width], byte offset of the activation row, or
                            // of a row of zeros behind the slab
  const SpmmSegment* segments;  // [tile][slab], and one past the end
  const int64_t* tile_rows;     // first output row of each tile, tiles + 1 entries
  const int64_t* slab_cols;     // first input feature of each slab, slabs + 1 entries
  int64_t tiles, slabs, rows_total, cols_total;
};

// Where a product finds its activations, slab by slab, in bytes from an origin that the caller sets
// for each slab.
struct SpmmPlaces {
  std::vector<int32_t> columns;    // of every input feature
  std::vector<int64_t> slab_cols;  // first input feature of each slab, slabs + 1 entries
  std::vector<int32_t> zeros;      // of the zeros that padded steps read, for each slab
};

// One weight packed for one variant, one row stride and the instruction set active at the time.
// Threads share it; only `update` changes it.
class SpmmWeight {
 public:
  // ldx: distance of activation rows in floats (ignored if the variant packs). updatable: keep the
  // number of every value, for `update`. Throws std::invalid_argument for malformed input or a row
  // stride too large for 32-bit byte offsets.
  SpmmWeight(const BlockRows& source, const SpmmVariant& variant, int64_t ldx,
             bool updatable = false);
  // Activations that the caller puts into scratch.
  SpmmWeight(const BlockRows& source, const SpmmVariant& variant, const SpmmPlaces& places);
  ~SpmmWeight();
  SpmmWeight(const SpmmWeight&) = delete;
  SpmmWeight& operator=(const SpmmWeight&) = delete;

  const SpmmVariant& variant() const { return variant_; }
  const SpmmStream& stream() const { return stream_; }
  const SpmmKernels& kernels() const { return *kernels_; }
  int64_t ldx() const { return ldx_; }
  int64_t nbytes() const;

  // Other values at the same places, in the order of the source's; nobody may be multiplying
  // meanwhile. Throws std::invalid_argument unless the weight is updatable.
  void update(const float* values);

 private:
  struct Storage;
  void pack(const BlockRows& source, const SpmmPlaces& places, bool updatable);

  SpmmVariant variant_;
  const SpmmKernels* kernels_;
  int64_t ldx_;
  std::unique_ptr<Storage> storage_;
  SpmmStream stream_{};
};

// Makes a product a convolution: instead of rows of x, each slab takes strips of these channels.
struct SpmmWindow {
  const Window* window;
  const Strips* strips;
  const int32_t* channels;       // of x, in the order of the strips
  const int64_t* slab_channels;  // first of each slab, an index of `channels`, slabs + 1 entries
  int64_t slab_floats;           // of the longest slab
};

struct SpmmArgs {
  const SpmmWeight* weight = nullptr;
  const float* bias = nullptr;  // [N] or null
  const float* x = nullptr;
  int64_t ldx = 0;  // must be the weight's ldx unless its variant packs
  float* y = nullptr;
  int64_t ldy = 0;
  const float* residual = nullptr;  // laid out like y, or null; may be y itself
  int64_t ldr = 0;
  int64_t columns = 0;
  Activation activation = Activation::kNone;
  bool padded = false;  // planar rows of x, y and residual are allocated up to a whole 64-byte line
  bool tokens = false;  // token-major x, y and residual; needs a packing variant
  int64_t batch = 1;    // images, one after the other
  int64_t x_stride = 0, y_stride = 0, residual_stride = 0;  // floats from image to image
  const SpmmWindow* window = nullptr;  // of a convolution, or null
  // Wide enough for threads to share columns: what the layers around make of the same columns then
  // stays in one core's cache. Narrower ones share outputs, so that every core streams its own weights.
  int64_t shared_columns = 128;
};

// Throws std::invalid_argument if the arguments contradict each other or the weight.
void spmm_check(const SpmmArgs& args);

// images x panels x tile ranges: independent tasks, in any order, on any thread.
int64_t spmm_task_count(const SpmmArgs& args, int threads);
void spmm_run_task(const SpmmArgs& args, int64_t task, int64_t tasks);

// All of it on `threads` threads.
void spmm_run(const SpmmArgs& args, int threads);

__attribute__((always_inline)) constexpr int64_t spmm_panel_vectors(const SpmmVariant& v) {
  return static_cast<int64_t>(v.vectors) * v.column_tiles;
}

// One panel of columns against tiles [tile_begin, tile_end): what every instruction set provides.
struct SpmmPanel {
  const SpmmStream* stream;
  const SpmmVariant* variant;
  const SpmmArgs* args;
  const float* x;  // of this image
  float* y;
  const float* residual;
  int64_t panel;          // its number
  int64_t column, width;  // first column, number of columns (not of a window)
  int64_t tile_begin, tile_end;
  float* scratch;  // spmm_scratch_floats(...) floats, 64-byte aligned
};

struct SpmmKernels {
  int32_t lanes;
  int32_t lockstep;  // rows in a group of many; needs activations in scratch (packed or gathered)
  // The widest register tile, in vectors, of so many groups and block rows; 0: no such groups.
  int32_t (*max_vectors)(int32_t groups, int32_t block);
  void (*run_panel)(const SpmmPanel& panel);
};

}  // namespace aerogel
