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

// `count` floats, `stride` apart, to `to`, and zeros up to a whole vector: rows are written in
// ascending order, and what stays zero is padding.
AEROGEL_INLINE void copy_strided(const float* from, int64_t stride, float* to, int64_t count) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; i += kLanes) store(to + i, load_upto(from + i, count - i));
  } else if (stride == 2) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const int64_t left = 2 * (count - i) - 1;
      const Vec low = load_upto(from + 2 * i, left);
      const Vec high = left > kLanes ? load_upto(from + 2 * i + kLanes, left - kLanes) : zero();
      store(to + i, split_order(even_of(low, high)));
    }
  } else {
    int64_t i = 0;
    for (; i < count; ++i) to[i] = from[i * stride];
    for (; i % kLanes; ++i) to[i] = 0.0f;
  }
}

AEROGEL_INLINE Vec clamp_inline(Vec v, Activation activation) {
  if (activation == Activation::kNone) return v;
  v = relu(v);
  return activation == Activation::kRelu6 ? min(broadcast(6.0f), v) : v;
}

// Division of non-negative numbers, almost always by one or two.
AEROGEL_INLINE int64_t divide(int64_t x, int64_t by) {
  return by == 1 ? x : by == 2 ? x >> 1 : x / by;
}

AEROGEL_NOINLINE void copy_channel(const Window& w, const Strips& s, const StripPanel& p,
                                   const float* plane, float* to) {
  const int64_t top = p.oy * w.stride_h - w.pad_h, left = p.ox * w.stride_w - w.pad_w;
  for (int64_t i = 0; i < s.row_phase_count; ++i) {
    for (int64_t j = 0; j < s.column_phase_count; ++j, to += s.plane) {
      // Element x of a row comes from column left + phase + x * stride.
      const int64_t column = left + s.column_phases[j];
      const int64_t first = column < 0 ? divide(w.stride_w - 1 - column, w.stride_w) : 0;
      const int64_t room = w.in_w - column;
      const int64_t inside = room > 0 ? divide(room - 1, w.stride_w) + 1 : 0;
      const int64_t count = smaller(inside, s.pitch) - first;
      if (count <= 0) continue;
      const float* from = plane + column + first * w.stride_w;
      for (int64_t r = 0, iy = top + s.row_phases[i]; r < s.plane_rows; ++r, iy += s.row_step) {
        if (iy < 0 || iy >= w.in_h) continue;
        copy_strided(from + iy * w.in_w, w.stride_w, to + r * s.pitch + first, count);
      }
    }
  }
}

// Output channels [begin, end) from the grid to their rows, with residual and activation.
AEROGEL_NOINLINE void unpack_grid(const SpmmPanel& p, const StripPanel& panel, const float* grid,
                                  int64_t begin, int64_t end) {
  const SpmmArgs& a = *p.args;
  const Strips& s = *a.window->strips;
  const int64_t out_w = a.window->window->out_w;
  const bool in_registers = is_inline_activation(a.activation);
  const Activation cheap = in_registers ? a.activation : Activation::kNone;
  for (int64_t row = begin; row < end; ++row, grid += s.grid()) {
    for (int64_t r = 0; r < panel.rows; ++r) {
      const float* from = grid + r * s.pitch;
      float* y = p.y + row * a.ldy + (panel.oy + r) * out_w + panel.ox;
      const float* residual =
          p.residual ? p.residual + row * a.ldr + (panel.oy + r) * out_w + panel.ox : nullptr;
      for (int64_t i = 0; i < panel.columns; i += kLanes) {
        const int64_t n = panel.columns - i;
        Vec v = load(from + i);
        if (residual) v = add(v, load_upto(residual + i, n));
        v = in_registers ? clamp_inline(v, cheap) : activate(v, a.activation);
        store_upto(y + i, v, n);
      }
    }
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
  f.width = (bottom - top) * w.in_w * static_cast<int64_t>(sizeof(float));
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
    for (int64_t i = first; i < last; ++i) {
      copy_channel(*window.window, strips, panel, p.x + window.channels[i] * a.ldx,
                   p.scratch + (i - first) * strips.channel);
    }
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

}  // namespace
}  // namespace aerogel::AEROGEL_ISA
