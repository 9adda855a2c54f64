// The input of a sliding window, row by row of the product it stands for (im2col): what dense
// convolutions gather into scratch, a panel of output columns at a time.
#pragma once

#include "layers.h"
#include "layers_simd.inl"

namespace aerogel::AEROGEL_ISA {
namespace {

// A run of columns that lies in one output row.
struct Segment {
  int64_t oy, ox, count;
};

// The widest panel, in columns: each may be an output row of its own.
constexpr int64_t kWidestGather = kWidestWindow * kLanes;

// Columns [first, first + width) of a window's output.
struct Columns {
  int64_t first, width;
};

// The same, cut at the ends of the output's rows.
struct Segments {
  Segment list[kWidestGather];
  int count = 0;

  AEROGEL_INLINE Segments(const Window& w, Columns columns) {
    for (int64_t c = columns.first, end = columns.first + columns.width; c < end; ++count) {
      const int64_t ox = c % w.out_w;
      list[count] = {c / w.out_w, ox, smaller(w.out_w - ox, end - c)};
      c += list[count].count;
    }
  }
};

// Fillers write whole vectors, beyond `count`: panels are filled in ascending order and have slack.
AEROGEL_INLINE void fill_zero(float* to, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) store(to + i, zero());
}

AEROGEL_INLINE void fill_copy(const float* from, const float* end, float* to, int64_t count) {
  int64_t i = 0;
  for (; i < count && from + i + kLanes <= end; i += kLanes) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = from[i];
}

AEROGEL_INLINE void fill_strided(const float* from, int64_t stride, const float* end, float* to,
                                 int64_t count) {
  int64_t i = 0;
  if (stride == 1) return fill_copy(from, end, to, count);
  if (stride == 2) {
    for (; i < count && from + 2 * (i + kLanes) <= end; i += kLanes) {
      const float* p = from + 2 * i;
      store(to + i, split_order(even_of(load(p), load(p + kLanes))));
    }
  }
  for (; i < count; ++i) to[i] = from[i * stride];
}

// One row of a panel: a channel's plane under one tap, zero in the padding.
AEROGEL_INLINE void gather_tap(const WindowInput& in, WindowTap at, const Segments& segments,
                               float* to) {
  const Window& w = *in.window;
  const TapRange rx = in.taps_x[at.kx], ry = in.taps_y[at.ky];
  const float* tap = in.x + at.channel * in.ldx + (at.ky * w.dilation_h - w.pad_h) * w.in_w +
                     at.kx * w.dilation_w - w.pad_w;
  const Segment* const end = segments.list + segments.count;
  for (const Segment* s = segments.list; s < end; to += s->count, ++s) {
    if (s->oy < ry.first || s->oy >= ry.last) {
      fill_zero(to, s->count);
      continue;
    }
    const int64_t stop = s->ox + s->count;
    const int64_t first = smaller(larger(rx.first, s->ox), stop);
    const int64_t last = larger(smaller(rx.last, stop), first);
    fill_zero(to, first - s->ox);
    fill_strided(tap + s->oy * w.stride_h * w.in_w + first * w.stride_w, w.stride_w, in.x_end,
                 to + first - s->ox, last - first);
    fill_zero(to + last - s->ox, stop - last);
  }
}

// The rows of one channel that a panel of a window of stride 1 needs (layers.h, StripShape), and
// where each vector of the panel lies in them.
class Strip {
 public:
  AEROGEL_INLINE Strip(const WindowInput& input, Columns columns, const Segments& segments,
                       float* data)
      : in_(input), segments_(segments),
        shape_(strip_shape(*input.window, columns.width, segments.count)),
        size_(strip_size(shape_)), data_(data) {
    const Window& w = *in_.window;
    row_of_ky_ = shape_.narrow ? 1 : shape_.shared ? w.dilation_h : segments.count;
    int64_t to = 0;
    for (int s = 0; s < segments.count; ++s) {
      const Segment& it = segments.list[s];
      const int64_t row = shape_.narrow ? s * w.kernel_h : shape_.shared ? s * w.stride_h : s;
      const int64_t from = row * shape_.pitch + (shape_.narrow ? 0 : it.ox);
      for (int64_t i = 0; i < it.count; i += kLanes) {
        pieces_[piece_count_++] = {static_cast<int32_t>(from + i), static_cast<int32_t>(to + i)};
      }
      to += it.count;
    }
    fill_zero(data, 2 * size_);  // what stays zero is the padding
  }

  // Channels alternate between two strips: loads that straddle two stores wait for both, so a strip
  // is written well before it is read.
  AEROGEL_INLINE void turn() { turned_ = size_ - turned_; }

  // Rows come in ascending order: the zeros behind one do not reach into a finished one.
  AEROGEL_NOINLINE void take_channel(int64_t channel) {
    const Window& w = *in_.window;
    const float* plane = in_.x + channel * in_.ldx;
    float* to = data_ + (size_ - turned_);
    const Segment& first = segments_.list[0];
    if (shape_.shared) {
      const int64_t top = first.oy * w.stride_h - w.pad_h;
      for (int64_t r = 0; r < shape_.rows; ++r, to += shape_.pitch) take_row(plane, top + r, 0, to);
      return;
    }
    const int64_t outer = shape_.narrow ? segments_.count : w.kernel_h;
    const int64_t inner = shape_.narrow ? w.kernel_h : segments_.count;
    for (int64_t i = 0; i < outer; ++i) {
      for (int64_t j = 0; j < inner; ++j, to += shape_.pitch) {
        const int64_t s = shape_.narrow ? i : j, ky = shape_.narrow ? j : i;
        const int64_t iy = (first.oy + s) * w.stride_h + ky * w.dilation_h - w.pad_h;
        take_row(plane, iy, shape_.narrow ? segments_.list[s].ox : 0, to);
      }
    }
  }

  AEROGEL_INLINE void give_tap(WindowTap tap, float* to) const {
    const float* from =
        data_ + turned_ + tap.ky * row_of_ky_ * shape_.pitch + tap.kx * in_.window->dilation_w;
    for (int i = 0; i < piece_count_; ++i) store(to + pieces_[i].to, load(from + pieces_[i].from));
  }

 private:
  struct Piece {
    int32_t from, to;
  };

  AEROGEL_INLINE void take_row(const float* plane, int64_t iy, int64_t ox, float* to) const {
    const Window& w = *in_.window;
    if (iy < 0 || iy >= w.in_h) return;
    const int64_t left = ox - w.pad_w;
    const int64_t first = larger(left, 0), last = smaller(left + shape_.pitch, w.in_w);
    const float* from = plane + iy * w.in_w + first;
    to += first - left;
    for (int64_t i = 0, n = last - first; i < n; i += kLanes) {
      store(to + i, load_upto(from + i, n - i));
    }
  }

  const WindowInput in_;
  const Segments& segments_;
  const StripShape shape_;
  const int64_t size_;
  float* const data_;
  int64_t turned_ = 0;
  int64_t row_of_ky_;
  int piece_count_ = 0;
  Piece pieces_[kWidestGather];
};

// Windows of stride 1 over rows as long as those they give. Under any tap, a panel is one run of the
// plane, but for what lies in the padding: lanes that are masked away.
class FlatWindow {
 public:
  static constexpr int64_t kLongestSide = 16;

  static AEROGEL_INLINE bool fits(const Window& w) {
    return w.stride_h == 1 && w.stride_w == 1 && w.in_w == w.out_w &&
           w.kernel_h <= kLongestSide && w.kernel_w <= kLongestSide;
  }

  AEROGEL_INLINE FlatWindow(const WindowInput& input, Columns columns, const Segments& segments)
      : in_(input), first_(columns.first), vectors_((columns.width + kLanes - 1) / kLanes) {
    const Window& w = *in_.window;
    for (int64_t ky = 0; ky < w.kernel_h; ++ky) {
      fill(rows_[ky], columns.width);
      const TapRange inside = in_.taps_y[ky];
      int64_t at = 0;
      for (int s = 0; s < segments.count; at += segments.list[s++].count) {
        const Segment& it = segments.list[s];
        if (it.oy < inside.first || it.oy >= inside.last) hide(rows_[ky], at, at + it.count);
      }
    }
    for (int64_t kx = 0; kx < w.kernel_w; ++kx) {
      fill(columns_[kx], columns.width);
      const TapRange inside = in_.taps_x[kx];
      int64_t at = 0;
      for (int s = 0; s < segments.count; at += segments.list[s++].count) {
        const Segment& it = segments.list[s];
        const int64_t stop = it.ox + it.count;
        hide(columns_[kx], at, at + smaller(inside.first, stop) - it.ox);
        hide(columns_[kx], at + larger(inside.last, it.ox) - it.ox, at + it.count);
      }
    }
  }

  AEROGEL_INLINE void give_tap(WindowTap at, float* to) const {
    const Window& w = *in_.window;
    const float* from = in_.x + at.channel * in_.ldx + first_ +
                        (at.ky * w.dilation_h - w.pad_h) * w.in_w + at.kx * w.dilation_w - w.pad_w;
    const uint32_t* const rows = rows_[at.ky];
    const uint32_t* const columns = columns_[at.kx];
    for (int64_t v = 0; v < vectors_; ++v) {
      store(to + v * kLanes, load_where(from + v * kLanes, rows[v], columns[v]));
    }
  }

 private:
  using Lanes = uint32_t[kWidestWindow];  // a bit for each lane of each vector

  static AEROGEL_INLINE void fill(Lanes& lanes, int64_t count) {
    for (int64_t v = 0; v * kLanes < count; ++v) {
      const int64_t left = count - v * kLanes;
      lanes[v] = (1u << (left < kLanes ? left : kLanes)) - 1u;
    }
  }
  static AEROGEL_INLINE void hide(Lanes& lanes, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) lanes[i / kLanes] &= ~(1u << i % kLanes);
  }

  const WindowInput in_;
  const int64_t first_, vectors_;
  Lanes rows_[kLongestSide], columns_[kLongestSide];
};

// The input under each of the taps [first, last), zero in the padding: rows of a panel, `stride`
// floats apart. `strip`: strip_floats() of scratch.
AEROGEL_NOINLINE void gather_taps(const WindowInput& input, Columns columns, const WindowTap* first,
                                  const WindowTap* last, float* strip, float* panel,
                                  int64_t stride) {
  const Segments segments(*input.window, columns);
  if (FlatWindow::fits(*input.window)) {
    const FlatWindow flat(input, columns, segments);
    for (; first < last; ++first, panel += stride) flat.give_tap(*first, panel);
    return;
  }
  if (input.window->stride_w != 1) {
    for (; first < last; ++first, panel += stride) gather_tap(input, *first, segments, panel);
    return;
  }
  Strip rows(input, columns, segments, strip);
  if (first < last) rows.take_channel(first->channel);
  while (first < last) {
    const WindowTap* next = first;
    while (next < last && next->channel == first->channel) ++next;
    rows.turn();
    if (next < last) rows.take_channel(next->channel);
    for (; first < next; ++first, panel += stride) rows.give_tap(*first, panel);
  }
}

}  // namespace
}  // namespace aerogel::AEROGEL_ISA
