// Dense convolution of few channels, such as a network's first: output rows are multiplied straight
// from the input rows they need, without im2col. A few rows at a time are copied to scratch with
// their padding, column i * stride + p going to phase row p, so that under every tap neighbouring
// outputs read neighbouring floats. Each input is copied once or twice instead of once per tap.

namespace aerogel::AEROGEL_ISA {
namespace {

// Where the input under tap k begins, in floats from the scratch row of an output row.
struct TapRows {
  const float* base;
  const int32_t* offsets;

  AEROGEL_INLINE const float* operator()(int64_t k) const { return base + offsets[k]; }
};

void find_offsets(const ConvLayer& layer, const DirectShape& shape, int32_t* offsets) {
  const Window& w = layer.window;
  const int64_t front = shape.front * w.stride_w;
  for (int64_t k = 0; k < layer.depth; ++k) {
    const WindowTap at = layer.depths[k];
    const int64_t row = at.channel * shape.in_rows + at.ky * w.dilation_h;
    const int64_t column = front + at.kx * w.dilation_w - w.pad_w;
    offsets[k] = static_cast<int32_t>((row * w.stride_w + column % w.stride_w) * shape.pitch +
                                      column / w.stride_w);
  }
}

// Whole vectors of both phases of a stride of two; returns how many columns were taken.
AEROGEL_INLINE int64_t split_pairs(const float* row, int64_t columns, float* even, float* odd) {
  int64_t x = 0;
  for (; x + 2 * kLanes <= columns; x += 2 * kLanes) {
    const Vec low = load(row + x), high = load(row + x + kLanes);
    store(even + x / 2, split_order(even_of(low, high)));
    store(odd + x / 2, split_order(odd_of(low, high)));
  }
  return x;
}

// The phases of one input row, zeros on either side.
void split_row(const Window& w, const float* row, const DirectShape& shape, float* to) {
  const int64_t stride = w.stride_w, pitch = shape.pitch;
  const int64_t columns = smaller(w.in_w, (pitch - shape.front) * stride);
  const int64_t whole = columns / stride / kLanes * kLanes;  // elements that every phase has
  for (int64_t phase = 0; phase < stride; ++phase) {
    fill_zero(to + phase * pitch, shape.front);
    fill_zero(to + phase * pitch + shape.front + whole, pitch - shape.front - whole);
  }
  to += shape.front;
  int64_t x = 0;
  if (stride == 1) {
    for (; x < whole; x += kLanes) store(to + x, load(row + x));
  } else if (stride == 2) {
    x = split_pairs(row, columns, to, to + pitch);
  }
  for (; x < columns; ++x) to[x % stride * pitch + x / stride] = row[x];
}

void split_rows(const ConvArgs& a, const DirectShape& shape, int64_t first_row, float* to) {
  const Window& w = a.layer->window;
  const int64_t size = w.stride_w * shape.pitch;
  for (int64_t c = 0; c < a.layer->group_inputs; ++c) {
    const float* plane = a.x + c * a.ldx;
    for (int64_t r = 0; r < shape.in_rows; ++r, to += size) {
      const int64_t iy = first_row * w.stride_h - w.pad_h + r;
      if (iy < 0 || iy >= w.in_h) {
        fill_zero(to, size);
      } else {
        split_row(w, plane + iy * w.in_w, shape, to);
      }
    }
  }
}

// One output row of one block of channels.
AEROGEL_NOINLINE void direct_row(const ConvArgs& a, int64_t block, int64_t oy,
                                 const TapRows& rows) {
  const ConvLayer& layer = *a.layer;
  const int64_t out_w = layer.window.out_w, row = block * kRows, column = oy * out_w;
  const bool in_registers = is_cheap(a.activation);
  TileArgs t;
  t.weight = layer.weight + row * layer.depth;
  t.depth = layer.depth;
  t.bias = layer.bias + row;
  t.ldr = a.ldr;
  t.ldy = a.ldy;
  t.rows = smaller(kRows, layer.group_outputs - row);
  t.activation = in_registers ? a.activation : Activation::kNone;
  const int64_t vectors = (out_w + kLanes - 1) / kLanes;
  const int64_t tiles = (vectors + kVectors - 1) / kVectors;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t first = vectors * i / tiles, count = vectors * (i + 1) / tiles - first;
    const int64_t at = first * kLanes;
    t.y = a.y + row * a.ldy + column + at;
    t.residual = a.residual ? a.residual + row * a.ldr + column + at : nullptr;
    t.tail = smaller(kLanes, out_w - at - (count - 1) * kLanes);
    const TapRows x = {rows.base + at, rows.offsets};
    count == 3 ? conv_tile<3>(t, x) : count == 2 ? conv_tile<2>(t, x) : conv_tile<1>(t, x);
  }
  if (in_registers) return;
  for (int64_t r = 0; r < t.rows; ++r) {
    float* y = a.y + (row + r) * a.ldy + column;
    activate_span(a.activation, y, y, out_w);
  }
}

void direct_rows(const ConvArgs& a, int64_t first_row, int64_t last_row, float* scratch) {
  const ConvLayer& layer = *a.layer;
  const Window& w = layer.window;
  int32_t offsets[kConvDepthBlock];
  for (int64_t oy = first_row; oy < last_row;) {
    const int64_t count = smaller(direct_shape(w, layer.group_inputs).rows, last_row - oy);
    const DirectShape shape = direct_shape_of(w, layer.group_inputs, count);
    find_offsets(layer, shape, offsets);
    split_rows(a, shape, oy, scratch);
    const int64_t row = w.stride_h * w.stride_w * shape.pitch;
    for (int64_t block = 0; block < layer.row_blocks; ++block) {
      for (int64_t r = 0; r < count; ++r) {
        direct_row(a, block, oy + r, {scratch + r * row, offsets});
      }
    }
    oy += count;
  }
}

}  // namespace
}  // namespace aerogel::AEROGEL_ISA
