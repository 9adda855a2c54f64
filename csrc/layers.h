// The dense layers between the sparse ones: what a plan calls inside its own parallel region.
//
// Activations are planar float32: channel c of one image starts at x + c * ld. "Padded" planes come
// from a plan's arena (plan.h): their rows may be written up to the next whole cache line, and read
// kReadSlack floats beyond either end of the tensor. Every kernel handles a slice of its work chosen
// by the caller and slices never overlap, so a result does not depend on the number of threads.
//
// Plain data and function pointers only: the files compiled once per instruction set include this one.
#pragma once

#include <stdint.h>

#include "epilogue.h"

namespace aerogel {

constexpr int64_t kReadSlack = 128;
constexpr int64_t kConvDepthBlock = 256;  // k per pass: its panel of columns stays in L1

// The sliding window of a convolution or pooling layer.
struct Window {
  int64_t in_h, in_w, out_h, out_w;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

// Outputs [first, last) of one tap that read inside the input.
struct TapRange {
  int64_t first, last;
};

// A row of the product that a convolution stands for: an input channel under one tap.
struct WindowTap {
  int32_t channel, ky, kx;
};

// One image's planes and the window that slides over them.
struct WindowInput {
  const Window* window;
  const TapRange* taps_x;  // [kernel_w]
  const TapRange* taps_y;  // [kernel_h]
  const float* x;
  int64_t ldx;
  const float* x_end;  // nothing at or beyond this address is read
};

// The widest panel that is gathered, in vectors.
constexpr int64_t kWidestWindow = 3;

// Windows of stride 1 read most inputs several times. The rows of a channel that a panel needs are
// first copied side by side with their padding (a strip), so that a tap is a plain copy out of it.
// A panel no wider than an output row has kernel_h strip rows for each row it touches; a wider one
// takes whole rows, shared by its taps unless they lie far apart.
struct StripShape {
  int64_t rows, pitch;  // floats from row to row
  bool narrow, shared;
};

__attribute__((always_inline)) constexpr StripShape strip_shape(const Window& w, int64_t columns,
                                                                int64_t out_rows) {
  const bool narrow = columns <= w.out_w;
  const int64_t apart = out_rows * w.kernel_h;
  const int64_t span = (out_rows - 1) * w.stride_h + (w.kernel_h - 1) * w.dilation_h + 1;
  const bool shared = !narrow && span <= apart;
  return {shared ? span : apart,
          (narrow ? columns : w.out_w) + (w.kernel_w - 1) * w.dilation_w, narrow, shared};
}

// Floats of one strip; its last row is written and read in whole vectors.
__attribute__((always_inline)) constexpr int64_t strip_size(const StripShape& shape) {
  return (shape.rows * shape.pitch + 15) / 16 * 16 + 16;
}

// Floats of both strips of any panel up to `columns` wide.
int64_t strip_floats(const Window& window, int64_t columns);

// Convolutions of few channels are multiplied straight from input rows (layers_direct.inl): so many
// output rows at a time, from `in_rows` rows of each channel, each split into stride_w phases of
// `pitch` floats that begin with `front` of padding.
struct DirectShape {
  int64_t rows, in_rows, front, pitch, floats;
};

__attribute__((always_inline)) constexpr DirectShape direct_shape_of(const Window& w,
                                                                     int64_t channels,
                                                                     int64_t rows) {
  const int64_t in_rows = (rows - 1) * w.stride_h + (w.kernel_h - 1) * w.dilation_h + 1;
  const int64_t front = ((w.pad_w + w.stride_w - 1) / w.stride_w + 15) / 16 * 16;
  const int64_t reach = front + (w.kernel_w - 1) * w.dilation_w / w.stride_w;
  const int64_t pitch = ((w.out_w + 15) / 16 * 16 + reach + 15) / 16 * 16;
  return {rows, in_rows, front, pitch, channels * in_rows * w.stride_w * pitch};
}

// As many rows as stay in L1; 0 if not even one does.
__attribute__((always_inline)) constexpr DirectShape direct_shape(const Window& w,
                                                                  int64_t channels) {
  constexpr int64_t kMostRows = 4, kMostFloats = 8192;
  DirectShape shape = direct_shape_of(w, channels, kMostRows);
  while (shape.rows > 0 && shape.floats > kMostFloats) {
    shape = direct_shape_of(w, channels, shape.rows - 1);
  }
  return shape;
}

// Register tile of the dense product: `rows` output channels x up to `vectors` vectors of columns.
struct DenseTile {
  int64_t rows, vectors, lanes;
  __attribute__((always_inline)) constexpr int64_t width() const { return vectors * lanes; }
};

// Weights packed as [group][depth block][row block][depth in block][tile.rows], bias as
// [group][row block][tile.rows]; rows beyond a group's last one are zero.
struct ConvLayer {
  Window window;
  int64_t groups, group_inputs, group_outputs, depth, row_blocks;
  const float* weight;
  const float* bias;
  const TapRange* taps_x;  // [kernel_w]
  const TapRange* taps_y;  // [kernel_h]
  const WindowTap* depths;  // [depth], channels count within the group
  bool pointwise;          // 1x1, stride 1, no padding: columns are columns, whatever their shape
};

struct ConvArgs {
  const ConvLayer* layer;
  const float* x;
  int64_t ldx;
  const float* x_end;  // nothing at or beyond this address is read
  float* y;            // padded
  int64_t ldy;
  const float* residual;  // padded, or null
  int64_t ldr;
  int64_t columns;  // out_h * out_w; of a pointwise layer any number
  Activation activation;
};

// The columns are cut into panels of whole vectors and nearly equal width, at most a tile's. The
// cut depends on nothing else, because it decides the order of some sums.
__attribute__((always_inline)) constexpr int64_t conv_panels(int64_t columns,
                                                             const DenseTile& tile) {
  return (columns + tile.width() - 1) / tile.width();
}

// A piece of a convolution: panels [first_panel, last_panel) x row blocks of one group.
struct ConvSlice {
  int64_t first_panel, last_panel, group, first_block, last_block;
};

struct DepthwiseTile {
  int64_t start;      // first output column of the vector
  const float* mask;  // [kernel_w][lanes], all bits set or none; null away from the borders
};

struct DepthwiseLayer {
  Window window;
  int64_t multiplier;   // output channels per input channel
  const float* weight;  // [out_channels][kernel_h][kernel_w]
  const float* bias;    // [out_channels]
  const TapRange* taps_x;
  const TapRange* taps_y;
  const DepthwiseTile* tiles;  // vectors of one output row; null: only the general kernel fits
  int64_t tile_count;
  const float* zeros;  // stands in for the rows above and below the plane
};

// Output rows of a register tile. Seven divide the usual planes; with stride 2 four already amortise
// the input rows.
__attribute__((always_inline)) constexpr int64_t depthwise_tile_rows(const Window& w) {
  const bool seven = w.out_h % 7 == 0 || w.out_h > 16;
  return seven && (w.stride_h == 1 || w.out_h % 4 != 0) ? 7 : 4;
}

struct DepthwiseArgs {
  const DepthwiseLayer* layer;
  const float* x;  // padded
  int64_t ldx;
  float* y;  // padded
  int64_t ldy;
  Activation activation;
};

enum class Pool : int32_t { kMax = 0, kAverage, kAverageValid /* padding is not counted */ };

struct PoolArgs {
  Pool kind;
  Window window;
  const TapRange* taps_x;
  const TapRange* taps_y;
  const float* x;
  int64_t ldx;
  float* y;
  int64_t ldy;
};

enum class Binary : int32_t { kAdd = 0, kMultiply };

// z = act(x op y). If y_columns is 1, a channel's single y meets all its columns.
struct BinaryArgs {
  Binary kind;
  Activation activation;
  const float* x;
  int64_t ldx;
  const float* y;
  int64_t ldy;
  int64_t y_columns;
  float* z;
  int64_t ldz;
  int64_t columns;
};

// y[n] = act(weight[n, :] . x + bias[n] (+ residual[n])). The weights lie in the order in which they
// are read: [outputs / kGemvRows][depth / kGemvChunk][kGemvRows][kGemvChunk], padded with zeros.
constexpr int64_t kGemvRows = 4, kGemvChunk = 16;

struct GemvArgs {
  const float* weight;
  const float* bias;
  const float* x;
  int64_t depth;
  const float* residual;  // or null
  float* y;
  int64_t outputs;
  Activation activation;
};

struct LayerKernels {
  DenseTile tile;
  // `scratch`: (kConvDepthBlock + 1) * tile.width() floats and the strip, aligned.
  void (*conv)(const ConvArgs& args, const ConvSlice& slice, float* scratch);
  // Output rows [first, last) of all channels: one group, at most kConvDepthBlock deep, for which
  // direct_shape has rows. `scratch`: its floats.
  void (*conv_direct)(const ConvArgs& args, int64_t first, int64_t last, float* scratch);
  // Blocks of kGemvRows outputs [first, last); the last one may be incomplete.
  void (*gemv)(const GemvArgs& args, int64_t first, int64_t last);
  // Output rows [first_row, last_row) of channels [first, last).
  void (*depthwise)(const DepthwiseArgs& args, int64_t first, int64_t last, int64_t first_row,
                    int64_t last_row);
  // How many output rows are best made together.
  int64_t (*depthwise_rows)(const Window& window, Activation activation);
  void (*pool)(const PoolArgs& args, int64_t first, int64_t last, int64_t first_row,
               int64_t last_row);
  // All of the following handle channels [first, last).
  void (*binary)(const BinaryArgs& args, int64_t first, int64_t last);
  void (*channel_mean)(const float* x, int64_t ldx, int64_t columns, float* y, int64_t ldy,
                       int64_t first, int64_t last);
  void (*activate)(Activation activation, const float* x, float* y, int64_t count);
  // y[c * ldy + r] = x[r * ldx + c] for r < rows, c < columns.
  void (*transpose)(const float* x, int64_t ldx, float* y, int64_t ldy, int64_t rows,
                    int64_t columns);
};

}  // namespace aerogel
