// The input of a sliding window, row by row of the product it stands for (im2col): what dense and
// sparse convolutions gather into scratch, a panel of output columns at a time.
#include "layers.h"

namespace aerogel::AEROGEL_ISA {
namespace {

// A run of columns that lies in one output row.
struct Segment {
  int64_t oy, ox, count;
};

// The widest panel of any kernel, in columns: each may be an output row of its own.
constexpr int64_t kWidestGather = 12 * kLanes;

// Columns [column, column + count) of a window's output, cut at the ends of its rows.
struct Segments {
  Segment list[kWidestGather];
  int count = 0;

  AEROGEL_INLINE Segments(const Window& w, int64_t column, int64_t columns) {
    for (int64_t c = column, end = column + columns; c < end; ++count) {
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

}  // namespace
}  // namespace aerogel::AEROGEL_ISA
