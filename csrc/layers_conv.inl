// Dense convolution as a tiled product. A panel of output columns is gathered (im2col) into
// scratch that stays in L1, one block of depth at a time, and every row block of the weights is
// multiplied with it on a register tile of kDenseTile.rows x (1 .. kDenseTile.vectors) vectors.

namespace aerogel::AEROGEL_ISA {
namespace {

// 12 accumulators, 3 inputs and 1 weight fill 16 registers; with 32 the tile is twice as tall.
constexpr int kRows = kRegisters >= 32 ? 8 : 4;
constexpr int kVectors = 3;
constexpr DenseTile kDenseTile = {kRows, kVectors, kLanes};
static_assert(kDenseTile.width() <= kWidestGather);

// What of the input one panel needs: columns [column, column + count), rows of depth [k0, k1).
struct PanelPart {
  int64_t column, count, group, k0, k1;
  int64_t width;  // floats of a panel row
};

void gather_panel(const ConvArgs& a, const PanelPart& part, float* strip, float* panel) {
  const ConvLayer& l = *a.layer;
  const float* x = a.x + part.group * l.group_inputs * a.ldx;
  gather_taps({&l.window, l.taps_x, l.taps_y, x, a.ldx, a.x_end}, {part.column, part.count},
              l.depths + part.k0, l.depths + part.k1, strip, panel, part.width);
}

AEROGEL_NOINLINE void gather_pointwise(const ConvArgs& a, const PanelPart& part, float* panel) {
  const float* from = a.x + (part.group * a.layer->group_inputs + part.k0) * a.ldx + part.column;
  for (int64_t k = part.k0; k < part.k1; ++k, from += a.ldx, panel += part.width) {
    fill_copy(from, a.x_end, panel, part.count);
  }
}

// One register tile: `rows` <= kRows output rows, kWide vectors of columns, one block of depth.
struct TileArgs {
  const float* weight;
  int64_t depth;
  const float* bias;  // null: continue the sums in y
  const float* residual;
  int64_t ldr;
  float* y;
  int64_t ldy;
  int64_t rows;
  int64_t tail;           // lanes of the last vector that are written
  Activation activation;  // kNone until the last block of depth
};

// A gathered panel, row by row of depth.
template <int kWide>
struct PanelRows {
  const float* data;

  AEROGEL_INLINE const float* operator()(int64_t k) const { return data + k * kWide * kLanes; }
};

// `rows`: k -> the input vectors under depth k.
template <int kWide, class Rows>
AEROGEL_INLINE void conv_tile(const TileArgs& t, const Rows& rows) {
  // A single vector per row leaves too few independent sums: even and odd depth get their own.
  constexpr int kChains = kWide == 1 ? 2 : 1;
  Vec acc[kChains][kRows][kWide];
  // Unrolled by hand: an accumulator that is indexed by a variable lives in memory.
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kWide; ++v) {
#pragma GCC unroll 2
      for (int chain = 1; chain < kChains; ++chain) acc[chain][r][v] = zero();
      if (t.bias) {
        acc[0][r][v] = broadcast(t.bias[r]);
      } else {
        acc[0][r][v] = r < t.rows ? load(t.y + r * t.ldy + v * kLanes) : zero();
      }
    }
  }
  const float* weight = t.weight;
  const auto step = [&](Vec(&sums)[kRows][kWide], int64_t k) {
    const float* from = rows(k);
    Vec x[kWide];
#pragma GCC unroll 3
    for (int v = 0; v < kWide; ++v) x[v] = load(from + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec w = broadcast(weight[r]);
#pragma GCC unroll 3
      for (int v = 0; v < kWide; ++v) sums[r][v] = fma(w, x[v], sums[r][v]);
    }
    weight += kRows;
  };
  int64_t k = 0;
  for (; k + kChains <= t.depth; k += kChains) {
#pragma GCC unroll 2
    for (int chain = 0; chain < kChains; ++chain) step(acc[chain], k + chain);
  }
  for (; k < t.depth; ++k) step(acc[0], k);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    if (r >= t.rows) break;
#pragma GCC unroll 3
    for (int v = 0; v < kWide; ++v) {
      Vec sum = acc[0][r][v];
#pragma GCC unroll 2
      for (int chain = 1; chain < kChains; ++chain) sum = add(sum, acc[chain][r][v]);
      if (t.residual) sum = add(sum, load(t.residual + r * t.ldr + v * kLanes));
      sum = activate_cheaply(sum, t.activation);
      store_upto(t.y + r * t.ldy + v * kLanes, sum, v == kWide - 1 ? t.tail : kLanes);
    }
  }
}

struct ConvPanel {
  int64_t column, count;
  const float* data;  // gathered
};

// Row blocks of one panel and one block of depth.
template <int kWide>
AEROGEL_NOINLINE void multiply_panel(const ConvArgs& a, const ConvSlice& slice, int64_t k0,
                                     int64_t k1, int64_t block, const ConvPanel& panel) {
  const ConvLayer& layer = *a.layer;
  const int64_t group_rows = layer.row_blocks * kRows;
  const bool last = k1 == layer.depth;
  const bool in_registers = last && is_cheap(a.activation);
  const int64_t row = slice.group * layer.group_outputs + block * kRows;
  TileArgs t;
  t.weight = layer.weight + slice.group * group_rows * layer.depth + k0 * group_rows +
             block * kRows * (k1 - k0);
  t.depth = k1 - k0;
  t.bias = k0 == 0 ? layer.bias + slice.group * group_rows + block * kRows : nullptr;
  t.residual = last && a.residual ? a.residual + row * a.ldr + panel.column : nullptr;
  t.ldr = a.ldr;
  t.y = a.y + row * a.ldy + panel.column;
  t.ldy = a.ldy;
  t.rows = smaller(kRows, layer.group_outputs - block * kRows);
  t.tail = kLanes;
  t.activation = in_registers ? a.activation : Activation::kNone;
  conv_tile<kWide>(t, PanelRows<kWide>{panel.data});
  if (!last || in_registers) return;
  for (int64_t r = 0; r < t.rows; ++r) {
    activate_span(a.activation, t.y + r * a.ldy, t.y + r * a.ldy, panel.count);
  }
}

// A strip of panels is gathered together as far as it fits into the scratch, so that shallow
// products write long runs of each output row instead of a line here and a line there.
constexpr int64_t kStripPanels = 8;

void conv_slice(const ConvArgs& a, const ConvSlice& slice, float* scratch) {
  const ConvLayer& layer = *a.layer;
  const int64_t vectors = (a.columns + kLanes - 1) / kLanes;
  const int64_t panels = conv_panels(a.columns, kDenseTile);
  float* const strip_rows = scratch + (kConvDepthBlock + 1) * kDenseTile.width();
  const int64_t strip = larger(1, smaller(kStripPanels, kConvDepthBlock / layer.depth));
  for (int64_t begin = slice.first_panel; begin < slice.last_panel; begin += strip) {
    const int64_t count = smaller(strip, slice.last_panel - begin);
    for (int64_t k0 = 0; k0 < layer.depth; k0 += kConvDepthBlock) {
      const int64_t k1 = smaller(k0 + kConvDepthBlock, layer.depth);
      ConvPanel strips[kStripPanels];
      float* to = scratch;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t first = vectors * (begin + i) / panels * kLanes;
        const int64_t last = vectors * (begin + i + 1) / panels * kLanes;
        strips[i] = {first, smaller(last, a.columns) - first, to};
        const PanelPart part = {first, strips[i].count, slice.group, k0, k1, last - first};
        layer.pointwise ? gather_pointwise(a, part, to) : gather_panel(a, part, strip_rows, to);
        to += (k1 - k0) * (last - first);
      }
      for (int64_t block = slice.first_block; block < slice.last_block; ++block) {
        for (int64_t i = 0; i < count; ++i) {
          const auto multiply = strips[i].count > 2 * kLanes ? &multiply_panel<3>
                                : strips[i].count > kLanes   ? &multiply_panel<2>
                                                             : &multiply_panel<1>;
          multiply(a, slice, k0, k1, block, strips[i]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace aerogel::AEROGEL_ISA
