// The input of a sliding window as a sparse convolution reads it: instead of unfolding the image
// tap by tap, a panel of outputs copies the input rows it needs once, side by side with their
// padding, so that every tap of a channel is the same rows from another offset.
//
// Outputs of a panel lie on a grid with `pitch` floats from row to row. Where the stride is not one,
// input rows and columns are split by its phases: row y * stride_h + p, column x * stride_w + q of
// the panel's input are row y, column x of plane (p, q). Only phases that a tap meets are kept. Short
// rows have a phase for every column of taps, which then reads whole aligned vectors.
// Where taps are so far apart that their rows hardly overlap (dilation), each row of taps has rows of
// its own instead of a phase.
//
// Small planes of several images that stand side by side, and that a convolution leaves as large as
// they are, need no rows: under one tap, all columns of all images come from as many columns away.
// Each tap has a row of its own, the channel's moved by so much, in which a mask leaves out what is
// not the column's own image: such columns are padding.
//
// Plain data: the files compiled once per instruction set include this one.
#pragma once

#include <stdint.h>

#include "layers.h"

namespace aerogel {

struct Strips {
  int64_t rows, columns;  // outputs of a panel, at most
  int64_t pitch;          // floats from row to row
  int64_t plane;          // floats of one (row phase, column phase) plane
  int64_t channel;        // floats of one channel
  int64_t plane_rows;     // input rows of a plane, row_step apart in the image
  int64_t row_step;
  const int32_t* row_phases;     // first input row of each, from that under the first tap
  const int32_t* column_phases;  // first input column of each, likewise
  int64_t row_phase_count, column_phase_count;
  bool linear;  // register tiles may run over the ends of rows; else each lies in one row
  bool bare;    // the grid's rows are the output's: outputs go to their places
  // Of images side by side, else 0 and null.
  int64_t taps;
  const int64_t* shifts;   // [taps] from an output's column to the input's
  const float* masks;      // [taps][mask_row]: all bits of a column set where its image has an input
  int64_t mask_row;

  __attribute__((always_inline)) constexpr int64_t across(const Window& w) const {
    return (w.out_w + columns - 1) / columns;
  }
  __attribute__((always_inline)) constexpr int64_t panels(const Window& w) const {
    return across(w) * ((w.out_h + rows - 1) / rows);
  }
  // Floats of the grid, from one output channel to the next.
  __attribute__((always_inline)) constexpr int64_t grid() const {
    return (rows * pitch + 31) / 32 * 32 + 16;  // an odd number of cache lines
  }
};

// One panel: outputs [oy, oy + rows) x [ox, ox + columns).
struct StripPanel {
  int64_t oy, ox, rows, columns;
};

// Panels of nearly equal sizes.
__attribute__((always_inline)) constexpr StripPanel strip_panel(const Strips& strips,
                                                                const Window& w, int64_t panel) {
  const int64_t across = strips.across(w), down = strips.panels(w) / across;
  const int64_t i = panel / across, j = panel % across;
  const int64_t oy = w.out_h * i / down, ox = w.out_w * j / across;
  return {oy, ox, w.out_h * (i + 1) / down - oy, w.out_w * (j + 1) / across - ox};
}

}  // namespace aerogel
