// The sparse product under a sliding window: a panel's input is copied into strips (strips.h), slab of
// channels by slab, and multiplied from there. Where the strips' grid has gaps, sums are kept on the
// grid in scratch and copied to the output's rows at the end, with the rest of the epilogue.
#pragma once

#include "layers_simd.inl"
#include "simd_math.h"
#include "spmm.h"
#include "strips.h"

namespace aerogel::AEROGEL_ISA {
namespace {

// One column phase of one row phase of a panel's input: for every channel the same rows of the image,
// the same part of each, and the same place among the strips.
struct PhaseRows {
  int64_t from, from_step;  // floats from the beginning of a plane; from row to row
  int64_t to, to_step;      // floats from the beginning of a channel's strips, likewise
  int64_t rows, count;      // of this phase that lie in the image; floats of each
  int64_t whole;            // of its rows, those that may be followed by zeros up to a whole vector
};

// The next kLanes of `left` floats, Stride apart.
template <int Stride>
AEROGEL_INLINE Vec load_strided(const float* from, int64_t left) {
  static_assert(Stride == 1 || Stride == 2);
  if (Stride == 1) return load_upto(from, left);
  left = 2 * left - 1;
  const Vec low = load_upto(from, left);
  const Vec high = left > kLanes ? load_upto(from + kLanes, left - kLanes) : zero();
  return split_order(even_of(low, high));
}

// A channel's rows, of which the first `whole` are written in whole vectors: in ascending order, and
// what stays zero is padding. Vectors: how many a row takes, or 0 for any number.
template <int Stride, int Vectors>
AEROGEL_INLINE void copy_rows(const PhaseRows& p, const float* from, float* to) {
  int64_t r = 0;
  for (; r < p.whole; ++r, from += p.from_step, to += p.to_step) {
    if constexpr (Vectors > 0) {
      constexpr int kLast = (Vectors - 1) * kLanes;
#pragma GCC unroll 4
      for (int64_t i = 0; i < kLast; i += kLanes) {
        store(to + i, load_strided<Stride>(from + Stride * i, kLanes));
      }
      store(to + kLast, load_strided<Stride>(from + Stride * kLast, p.count - kLast));
    } else {
      for (int64_t i = 0; i < p.count; i += kLanes) {
        store(to + i, load_strided<Stride>(from + Stride * i, p.count - i));
      }
    }
  }
  for (; r < p.rows; ++r, from += p.from_step, to += p.to_step) {
    for (int64_t i = 0; i < p.count; i += kLanes) {
      store_upto(to + i, load_strided<Stride>(from + Stride * i, p.count - i), p.count - i);
    }
  }
}

// Division of non-negative numbers, almost always by one or two.
AEROGEL_INLINE int64_t divide(int64_t x, int64_t by) {
  return by == 1 ? x : by == 2 ? x >> 1 : x / by;
}

PhaseRows phase_rows(const Window& w, const Strips& s, const StripPanel& p, int64_t i, int64_t j) {
  const int64_t row = p.oy * w.stride_h - w.pad_h + s.row_phases[i];
  const int64_t column = p.ox * w.stride_w - w.pad_w + s.column_phases[j];
  // Element x of row r comes from (row + r * row_step, column + x * stride_w).
  const int64_t top = row < 0 ? divide(s.row_step - 1 - row, s.row_step) : 0;
  const int64_t left = column < 0 ? divide(w.stride_w - 1 - column, w.stride_w) : 0;
  const int64_t down = w.in_h > row ? divide(w.in_h - row - 1, s.row_step) + 1 : 0;
  const int64_t across = w.in_w > column ? divide(w.in_w - column - 1, w.stride_w) + 1 : 0;
  PhaseRows rows;
  rows.from = (row + top * s.row_step) * w.in_w + column + left * w.stride_w;
  rows.from_step = s.row_step * w.in_w;
  rows.to = (i * s.column_phase_count + j) * s.plane + top * s.pitch + left;
  rows.to_step = s.pitch;
  rows.rows = smaller(down, s.plane_rows) - top;
  rows.count = smaller(across, s.pitch) - left;
  if (rows.rows <= 0 || rows.count <= 0) rows.rows = rows.count = 0;
  // Behind the last rows of a plane is the next one, or the next channel.
  const int64_t room = s.plane - top * s.pitch - left - (rows.count + kLanes - 1) / kLanes * kLanes;
  rows.whole = room < 0 ? 0 : smaller(rows.rows, room / s.pitch + 1);
  return rows;
}

struct Channels {
  const int32_t* numbers;
  int64_t count;
  const float* x;
  int64_t ldx;
  float* strips;
  int64_t strip_floats;  // of a channel
};

// One phase of every channel.
template <int Stride, int Vectors>
AEROGEL_NOINLINE void copy_phase(const Channels& channels, const PhaseRows& phase) {
  const Channels c = channels;  // copies that stores to the strips cannot alias
  const PhaseRows rows = phase;
  const float* const x = c.x + rows.from;
  float* to = c.strips + rows.to;
  for (int64_t i = 0; i < c.count; ++i, to += c.strip_floats) {
    copy_rows<Stride, Vectors>(rows, x + c.numbers[i] * c.ldx, to);
  }
}

AEROGEL_NOINLINE void copy_phase_strided(const Channels& c, const PhaseRows& p, int64_t stride) {
  for (int64_t i = 0; i < c.count; ++i) {
    const float* from = c.x + c.numbers[i] * c.ldx + p.from;
    float* to = c.strips + i * c.strip_floats + p.to;
    for (int64_t r = 0; r < p.rows; ++r, from += p.from_step, to += p.to_step) {
      for (int64_t k = 0; k < p.count; ++k) to[k] = from[k * stride];
    }
  }
}

template <int Stride>
AEROGEL_INLINE void copy_phase_by_width(const Channels& channels, const PhaseRows& rows) {
  switch ((rows.count + kLanes - 1) / kLanes) {
    case 1: return copy_phase<Stride, 1>(channels, rows);
    case 2: return copy_phase<Stride, 2>(channels, rows);
    case 3: return copy_phase<Stride, 3>(channels, rows);
    case 4: return copy_phase<Stride, 4>(channels, rows);
    default: return copy_phase<Stride, 0>(channels, rows);
  }
}

// Channels [first, last) of a slab, phase by phase: what all channels have in common is worked out
// once, and the image's rows, which several phases read, stay in the first cache.
void copy_slab(const SpmmPanel& p, const StripPanel& panel, int64_t first, int64_t last) {
  const SpmmWindow& window = *p.args->window;
  const Window& w = *window.window;
  const Strips& s = *window.strips;
  const Channels channels = {window.channels + first, last - first, p.x, p.args->ldx,
                             p.scratch,               s.channel};
  for (int64_t i = 0; i < s.row_phase_count; ++i) {
    for (int64_t j = 0; j < s.column_phase_count; ++j) {
      const PhaseRows rows = phase_rows(w, s, panel, i, j);
      if (rows.rows == 0) continue;
      if (w.stride_w == 1) {
        copy_phase_by_width<1>(channels, rows);
      } else if (w.stride_w == 2) {
        copy_phase_by_width<2>(channels, rows);
      } else {
        copy_phase_strided(channels, rows, w.stride_w);
      }
    }
  }
}

// One row of a panel, from the grid to its place. `finish` is the activation.
template <class Finish>
AEROGEL_INLINE void unpack_row(const float* from, const float* residual, float* y, int64_t columns,
                               const Finish& finish) {
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) {
    Vec v = load(from + i);
    if (residual) v = add(v, load(residual + i));
    store(y + i, finish(v));
  }
  if (i == columns) return;
  Vec v = load(from + i);
  if (residual) v = add(v, load_n(residual + i, columns - i));
  store_n(y + i, finish(v), columns - i);
}

template <class Finish>
AEROGEL_INLINE void unpack_channels(const SpmmPanel& p, const StripPanel& panel, const float* grid,
                                    int64_t begin, int64_t end, const Finish& finish) {
  const SpmmArgs& a = *p.args;
  const int64_t out_w = a.window->window->out_w, ldy = a.ldy, ldr = a.ldr;
  const int64_t pitch = a.window->strips->pitch, channel = a.window->strips->grid();
  const int64_t first = panel.oy * out_w + panel.ox, columns = panel.columns;
  // What the hardware does not guess: the beginnings of the channels' rows.
  constexpr int64_t kAhead = 4, kLine = kLineBytes / static_cast<int64_t>(sizeof(float));
  const int64_t span = (panel.rows - 1) * out_w + columns;
  for (int64_t row = begin; row < end; ++row, grid += channel) {
    float* y = p.y + row * ldy + first;
    const float* residual = p.residual ? p.residual + row * ldr + first : nullptr;
    if (row + kAhead < end) {
      for (int64_t i = 0; i < span; i += kLine) __builtin_prefetch(y + kAhead * ldy + i, 1, 3);
    }
    for (int64_t r = 0; r < panel.rows; ++r) {
      const float* added = residual ? residual + r * out_w : nullptr;
      unpack_row(grid + r * pitch, added, y + r * out_w, columns, finish);
    }
  }
}

// Output channels [begin, end) from the grid to their rows, with residual and activation.
AEROGEL_NOINLINE void unpack_grid(const SpmmPanel& p, const StripPanel& panel, const float* grid,
                                  int64_t begin, int64_t end) {
  const Activation activation = p.args->activation;
  if (activation == Activation::kNone) {
    unpack_channels(p, panel, grid, begin, end, [](Vec v) { return v; });
  } else if (activation == Activation::kRelu) {
    unpack_channels(p, panel, grid, begin, end, [](Vec v) { return relu(v); });
  } else {
    unpack_channels(p, panel, grid, begin, end,
                    [activation](Vec v) { return activate(v, activation); });
  }
}

// Register tiles that each lie in one row of the grid; those below each other share the weights.
AEROGEL_INLINE void run_row_tiles(const RunContext& context, const SpmmPanel& p,
                                  const StripPanel& panel, int64_t segment, PanelPrefetch& ahead) {
  const SpmmStream& s = *p.stream;
  const int64_t pitch = p.args->window->strips->pitch;
  const int64_t vectors = (panel.columns + kLanes - 1) / kLanes;
  const int64_t parts = (vectors + p.variant->vectors - 1) / p.variant->vectors;
  RunContext c = context;
  c.tiles = panel.rows;
  c.x_step = pitch * static_cast<int64_t>(sizeof(float));
  c.y_step = pitch;
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t first = vectors * i / parts, count = vectors * (i + 1) / parts - first;
    c.x = context.x + first * kLanes * static_cast<int64_t>(sizeof(float));
    c.y = context.y + first * kLanes;
    c.residual = context.residual ? context.residual + first * kLanes : nullptr;
    c.tail = i + 1 == parts ? context.tail : kLanes;
    run_segment(c, s, segment, static_cast<int>(count), false, ahead);
  }
}

// Brings the input of the next slab, or of the next panel, from memory while this one is multiplied.
PanelPrefetch next_strips(const SpmmPanel& p, int64_t slab) {
  const SpmmStream& s = *p.stream;
  const SpmmWindow& window = *p.args->window;
  const Window& w = *window.window;
  PanelPrefetch f;
  const bool turn = slab + 1 == s.slabs;
  const int64_t number = p.panel + turn, next = turn ? 0 : slab + 1;
  if (number == window.strips->panels(w)) return f;
  const StripPanel panel = strip_panel(*window.strips, w, number);
  const int64_t top = larger(0, panel.oy * w.stride_h - w.pad_h);
  const int64_t bottom = smaller(w.in_h, (panel.oy + panel.rows - 1) * w.stride_h - w.pad_h +
                                             (w.kernel_h - 1) * w.dilation_h + 1);
  const int64_t first = window.slab_channels[next];
  f.rows = window.slab_channels[next + 1] - first;
  if (f.rows == 0 || bottom <= top) return PanelPrefetch{};
  f.next = reinterpret_cast<const char*>(p.x + window.channels[first] * p.args->ldx + top * w.in_w);
  f.row_bytes = p.args->ldx * static_cast<int64_t>(sizeof(float));
  const int64_t image_row = w.in_w * static_cast<int64_t>(sizeof(float));
  const int64_t reach = (w.kernel_h - 1) * w.dilation_h + 1;
  f.width = (bottom - top) * image_row;
  if (reach < w.stride_h) {  // rows between those that are read
    f.pieces = (bottom - top - 1) / w.stride_h + 1;
    f.piece_bytes = w.stride_h * image_row;
    f.width = smaller(reach, bottom - top) * image_row;
  }
  int64_t runs = 0;
  for (int64_t range = p.tile_begin; range < p.tile_end; ++range) {
    const SpmmSegment* at = s.segments + range * s.slabs + slab;
    runs += at[1].run - at[0].run;
  }
  f.per_run = (f.rows + runs - 1) / larger(runs, 1);
  return f;
}

AEROGEL_NOINLINE void run_window_panel(const SpmmPanel& p) {
  const SpmmStream& s = *p.stream;
  const SpmmArgs& a = *p.args;
  const SpmmWindow& window = *a.window;
  const Strips& strips = *window.strips;
  const StripPanel panel = strip_panel(strips, *window.window, p.panel);
  const int64_t row_begin = s.tile_rows[p.tile_begin], row_end = s.tile_rows[p.tile_end];

  SpmmPanel flat = p;  // the grid as one row
  flat.column = panel.oy * window.window->out_w + panel.ox;
  flat.width = (panel.rows - 1) * strips.pitch + panel.columns;
  const ColumnTiles tiles(flat);
  float* const sums = p.scratch + window.slab_floats + strips.grid();
  clear(p.scratch, window.slab_floats + strips.grid());  // padding, and what padded steps read

  RunContext c{};
  c.bias = a.bias;
  c.activation = Activation::kNone;
  c.tail = kLanes;
  c.y = sums - row_begin * strips.grid();
  c.ldy = strips.grid();
  if (strips.bare) {
    if (is_inline_activation(a.activation)) c.activation = a.activation;
    c.tail = (flat.width - 1) % kLanes + 1;
    c.y = p.y + flat.column;
    c.ldy = a.ldy;
    c.residual = p.residual ? p.residual + flat.column : nullptr;
    c.ldr = a.ldr;
  }
  for (int64_t slab = 0; slab < s.slabs; ++slab) {
    const int64_t first = window.slab_channels[slab], last = window.slab_channels[slab + 1];
    copy_slab(p, panel, first, last);
    PanelPrefetch ahead = next_strips(p, slab);
    c.x = reinterpret_cast<const char*>(p.scratch - first * strips.channel);
    c.first = slab == 0;
    c.last = slab == s.slabs - 1;
    for (int64_t range = p.tile_begin; range < p.tile_end; ++range) {
      const int64_t segment = range * s.slabs + slab;
      if (strips.linear) {
        run_tiles(c, s, segment, tiles, {0, 0}, false, ahead);
      } else {
        run_row_tiles(c, p, panel, segment, ahead);
      }
    }
  }
  if (!strips.bare) {
    unpack_grid(p, panel, sums, row_begin, row_end);
  } else if (!is_inline_activation(a.activation)) {
    finish_rows(flat, row_begin, row_end);
  }
}

// Channels [first, last) of a slab, for images side by side.
AEROGEL_NOINLINE void copy_shifted(const SpmmPanel& p, int64_t first, int64_t last) {
  const SpmmWindow& window = *p.args->window;
  const Strips s = *window.strips;  // a copy that stores to the strips cannot alias
  const int64_t ldx = p.args->ldx, width = p.width;
  float* to = p.scratch;
  for (int64_t i = first; i < last; ++i) {
    const float* x = p.x + window.channels[i] * ldx + p.column;
    const float* mask = s.masks + p.column;
    for (int64_t tap = 0; tap < s.taps; ++tap, to += s.plane, mask += s.mask_row) {
      const float* from = x + s.shifts[tap];
      for (int64_t j = 0; j < width; j += kLanes) {
        store(to + j, keep(load(from + j), load(mask + j)));
      }
    }
  }
}

// A panel of columns of images side by side.
AEROGEL_NOINLINE void run_shifted_panel(const SpmmPanel& p) {
  const SpmmStream& s = *p.stream;
  const SpmmArgs& a = *p.args;
  const SpmmWindow& window = *a.window;
  const Strips& strips = *window.strips;
  const ColumnTiles tiles(p);
  clear(p.scratch + window.slab_floats, strips.grid());  // what padded steps read

  RunContext c{};
  c.bias = a.bias;
  c.activation = is_inline_activation(a.activation) ? a.activation : Activation::kNone;
  c.tail = a.padded ? kLanes : (p.width - 1) % kLanes + 1;
  c.y = p.y + p.column;
  c.ldy = a.ldy;
  c.residual = p.residual ? p.residual + p.column : nullptr;
  c.ldr = a.ldr;
  PanelPrefetch ahead;
  for (int64_t slab = 0; slab < s.slabs; ++slab) {
    const int64_t first = window.slab_channels[slab];
    copy_shifted(p, first, window.slab_channels[slab + 1]);
    c.x = reinterpret_cast<const char*>(p.scratch - first * strips.channel);
    c.first = slab == 0;
    c.last = slab == s.slabs - 1;
    for (int64_t range = p.tile_begin; range < p.tile_end; ++range) {
      run_tiles(c, s, range * s.slabs + slab, tiles, {0, 0}, false, ahead);
    }
  }
  if (!is_inline_activation(a.activation)) {
    finish_rows(p, s.tile_rows[p.tile_begin], s.tile_rows[p.tile_end]);
  }
}

}  // namespace
}  // namespace aerogel::AEROGEL_ISA
