// SpMM micro-kernels. A register tile is V vectors of columns x G block rows of B outputs each; for
// every stored column of a block row, V activation vectors are loaded once and multiplied by B
// broadcast weights. Four weights are loaded at a time (a quad), because a broadcast from memory
// would take one of the two load ports that the activations need. They are broadcast from memory in
// the largest tiles, which have no register to spare and more multiply-adds per load, and where
// spreading a quad's lanes would take a port that the multiply-adds need even more (simd.h).
//
// Reading order: one step -> one group of block rows -> one run of groups -> one panel. A panel is
// one register tile wide, so that its activations stay in the first cache; where blocks of outputs
// share every load, the second cache is near enough, and several tiles share the weights instead.
#include "activate.inl"
#include "kernels.h"
#include "simd_math.h"
#include "spmm.h"
#include "spmm_layout.inl"

namespace aerogel::AEROGEL_ISA {
namespace {

constexpr int kAccumulators = kRegisters == 32 ? 24 : 12;
constexpr int kMaxVectors = 12;
// Single rows in lockstep: where one of them has brought a row of activations into the first cache,
// others that want it soon follow. Tiles of 2 vectors (16 registers) or 3 (32) are left for each.
constexpr int kLockstep = kRegisters == 32 ? 8 : 6;
constexpr int kRowsAhead = 4;  // block rows between a row's prefetch and its sums
static_assert(2 * kLockstep <= kSpmmRowsBeyond && 4 + kRowsAhead <= kSpmmRowsBeyond);
constexpr int64_t kLineBytes = 64;
constexpr int64_t kPrefetchBytes = 256 << 10;  // activations that outgrow a second-level cache
constexpr int64_t kFollowedBytes = 1 << 10;    // of a row, from which the hardware fetches the rest

constexpr int register_tile_vectors(int groups, int block) {
  return kAccumulators / (groups * block) < kMaxVectors ? kAccumulators / (groups * block)
                                                        : kMaxVectors;
}

struct RunContext {
  const char* x;  // first column of the first tile
  float* y;
  int64_t ldy;
  const float* bias;
  const float* residual;
  int64_t ldr;
  int64_t tail;  // lanes of the last vector
  Activation activation;  // one that takes few instructions; the others follow in finish_rows
  bool first, last;       // slab: starts from the bias, applies the epilogue
  int64_t tiles;          // register tiles side by side
  int64_t x_step;         // bytes of x from tile to tile
  int64_t y_step;         // floats of y and residual from tile to tile

  AEROGEL_INLINE void advance(int64_t count) {
    x += count * x_step;
    y += count * y_step;
    if (residual) residual += count * y_step;
  }
};

template <int V, bool Masked>
AEROGEL_INLINE Vec load_x(const float* x, int v, int64_t tail) {
  if (Masked && v == V - 1) return load_n(x + v * kLanes, tail);
  return load(x + v * kLanes);
}

// One stored column of G block rows: `weights` yields weight i of the step as a vector.
template <int V, int G, int B, bool Masked, class Offsets, class Weights>
AEROGEL_INLINE void step(Vec (&acc)[G][B][V], const char* x, const Offsets& offsets, int64_t tail,
                         const Weights& weights) {
#pragma GCC unroll 16
  for (int g = 0; g < G; ++g) {
    const float* row = reinterpret_cast<const float*>(x + offsets(g));
    if constexpr (V <= B) {
      Vec values[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) values[v] = load_x<V, Masked>(row, v, tail);
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) {
        const Vec weight = weights(g * B + b);
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) acc[g][b][v] = fma(values[v], weight, acc[g][b][v]);
      }
    } else {
      Vec weight[B];
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) weight[b] = weights(g * B + b);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        const Vec value = load_x<V, Masked>(row, v, tail);
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) acc[g][b][v] = fma(value, weight[b], acc[g][b][v]);
      }
    }
  }
}

// Registers of a step that takes its weights from quads: accumulators, activations, weights, quads.
constexpr bool quads_fit(int vectors, int groups, int block) {
  const int quads = groups * block <= 4 ? 1 : groups * block / 4;
  const int operands = vectors <= block ? vectors + 1 : (block == 1 ? 1 : block + 1);
  return groups * block * vectors + operands + quads <= kRegisters;
}

AEROGEL_INLINE uint64_t load_pair(const int32_t* p) {
  uint64_t pair;
  __builtin_memcpy(&pair, p, sizeof(pair));
  return pair;
}

template <int V, int G, int B, bool Masked, bool Quads>
AEROGEL_INLINE void all_steps(Vec (&acc)[G][B][V], const char* x, const float* weights,
                              const int32_t* offsets, int32_t steps, int64_t tail) {
  constexpr int kStep = G * B;
  constexpr bool kFromQuads = Quads && quads_fit(V, G, B);
  // Whole quads. Single rows of blocks whose weights need no registers take two steps at a time: the
  // end of a loop of half the length is foreseen more often, and two offsets are one load.
  constexpr bool kPairs = kRegisters == 32 && !kFromQuads && G == 1 && B == 4;
  constexpr int kUnroll = kStep < 4 ? 4 / kStep : kStep % 4 || kPairs ? 2 : 1;
  constexpr int kQuads = kStep * kUnroll / 4;
  int32_t s = 0;
  for (; s + kUnroll <= steps; s += kUnroll) {
    Quad quads[kQuads];
    if constexpr (kFromQuads) {
#pragma GCC unroll 16
      for (int q = 0; q < kQuads; ++q) quads[q] = load_quad(weights + 4 * q);
    }
    // Two offsets a load: vectors of activations need the load ports.
    constexpr int kOffsets = G * kUnroll;
    uint64_t pairs[(kOffsets + 1) / 2];
#pragma GCC unroll 16
    for (int i = 0; i + 1 < kOffsets; i += 2) pairs[i / 2] = load_pair(offsets + i);
    if constexpr (kOffsets % 2) pairs[kOffsets / 2] = static_cast<uint32_t>(offsets[kOffsets - 1]);
#pragma GCC unroll 16
    for (int u = 0; u < kUnroll; ++u) {
      step<V, G, B, Masked>(
          acc, x,
          [&](int g) {
            const int at = u * G + g;
            return at % 2 ? pairs[at / 2] >> 32 : pairs[at / 2] & 0xffffffffu;
          },
          tail,
          [&](int i) {
            const int at = u * kStep + i;
            return kFromQuads ? broadcast_lane(quads[at / 4], at % 4) : broadcast(weights[at]);
          });
    }
    weights += kStep * kUnroll;
    offsets += G * kUnroll;
  }
  for (; kUnroll > 1 && s < steps; ++s) {
    step<V, G, B, Masked>(
        acc, x, [&](int g) { return offsets[g]; }, tail,
        [&](int i) { return broadcast(weights[i]); });
    weights += kStep;
    offsets += G;
  }
}

template <int V, bool Plain>
AEROGEL_INLINE void start_row(Vec (&acc)[V], const RunContext& c, int64_t row) {
  if (c.first) {
    const Vec bias = c.bias ? broadcast(c.bias[row]) : zero();
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[v] = bias;
    return;
  }
  const float* y = c.y + row * c.ldy;
#pragma GCC unroll 16
  for (int v = 0; v < V - 1; ++v) acc[v] = load(y + v * kLanes);
  acc[V - 1] = Plain ? load(y + (V - 1) * kLanes) : load_upto(y + (V - 1) * kLanes, c.tail);
}

template <int V, bool Plain>
AEROGEL_INLINE void apply_epilogue(Vec (&acc)[V], const RunContext& c, int64_t row) {
  if (!Plain && c.residual) {
    const float* r = c.residual + row * c.ldr;
#pragma GCC unroll 16
    for (int v = 0; v < V - 1; ++v) acc[v] = add(acc[v], load(r + v * kLanes));
    acc[V - 1] = add(acc[V - 1], load_upto(r + (V - 1) * kLanes, c.tail));
  }
  if (c.activation == Activation::kNone) return;
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) acc[v] = relu(acc[v]);
  if (c.activation == Activation::kRelu6) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[v] = min(broadcast(6.0f), acc[v]);
  }
}

template <int V, bool Plain>
AEROGEL_INLINE void store_row(const Vec (&acc)[V], const RunContext& c, int64_t row) {
  float* y = c.y + row * c.ldy;
#pragma GCC unroll 16
  for (int v = 0; v < V - 1; ++v) store(y + v * kLanes, acc[v]);
  if (Plain) {
    store(y + (V - 1) * kLanes, acc[V - 1]);
  } else {
    store_upto(y + (V - 1) * kLanes, acc[V - 1], c.tail);
  }
}

// One group of block rows on one register tile.
template <int V, int G, int B, bool Masked, bool Quads, bool Plain>
AEROGEL_INLINE void run_group(const RunContext& c, const int32_t* rows, const float* weights,
                              const int32_t* offsets, int32_t steps) {
  Vec acc[G][B][V];
#pragma GCC unroll 16
  for (int g = 0; g < G; ++g) {
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) start_row<V, Plain>(acc[g][b], c, rows[g] + b);
  }
  all_steps<V, G, B, Masked, Quads>(acc, c.x, weights, offsets, steps, c.tail);
  if (c.last) {
#pragma GCC unroll 16
    for (int g = 0; g < G; ++g) {
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) apply_epilogue<V, Plain>(acc[g][b], c, rows[g] + b);
    }
  }
#pragma GCC unroll 16
  for (int g = 0; g < G; ++g) {
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) store_row<V, Plain>(acc[g][b], c, rows[g] + b);
  }
}

// Asks for a row of outputs, and of what is added to it, some groups before it is written. Outputs
// come in the order of their rows' lengths, which the hardware cannot guess, and a store that waits
// for memory holds up the multiply-adds behind it: up to 1.9 times as fast where y is not in cache.
template <int V>
AEROGEL_INLINE void prefetch_outputs(const RunContext& c, int64_t row) {
  constexpr int64_t kBytes = V * kLanes * static_cast<int64_t>(sizeof(float));
  const char* y = reinterpret_cast<const char*>(c.y + row * c.ldy);
  for (int64_t j = 0; j < kBytes; j += kLineBytes) __builtin_prefetch(y + j, 1, 2);
  if (!c.residual || c.residual == c.y) return;
  const char* residual = reinterpret_cast<const char*>(c.residual + row * c.ldr);
  for (int64_t j = 0; j < kBytes; j += kLineBytes) __builtin_prefetch(residual + j, 0, 2);
}

// Plain: whole tiles without residual, which need no decisions at every row.
template <int V, int G, int B, bool Masked, bool Quads, bool Plain>
AEROGEL_INLINE void walk_groups(const RunContext& context, const SpmmRun& run, const int32_t* rows,
                                const float* weights, const int32_t* offsets) {
  const RunContext c = context;  // a copy that stores to y cannot alias
  const int32_t steps = run.steps;
  const int64_t weights_per_group = (static_cast<int64_t>(steps) * G * B + 3) & ~int64_t{3};
  constexpr int kAhead = G < kRowsAhead ? kRowsAhead : G;
  for (int32_t left = run.groups; left > 0; --left) {
    RunContext t = c;
    for (int64_t tile = c.tiles; tile > 0; --tile) {
      if (c.first) {
        for (int g = 0; g < G; ++g) prefetch_outputs<V>(t, rows[kAhead + g]);
      }
      run_group<V, G, B, Masked, Quads, Plain>(t, rows, weights, offsets, steps);
      t.advance(1);
    }
    rows += G;
    weights += weights_per_group;
    offsets += static_cast<int64_t>(steps) * G;
  }
}

template <int V, int G, int B, bool Masked, bool Quads>
AEROGEL_NOINLINE void run_groups(const RunContext& context, const SpmmRun& run, const int32_t* rows,
                                 const float* weights, const int32_t* offsets) {
  // With few registers the compiler spills more in two loops than the decisions cost.
  constexpr bool kWorthwhile = kRegisters == 32 && !Masked;
  if (kWorthwhile && !context.residual && context.tail == kLanes) {
    walk_groups<V, G, B, Masked, Quads, kWorthwhile>(context, run, rows, weights, offsets);
  } else {
    walk_groups<V, G, B, Masked, Quads, false>(context, run, rows, weights, offsets);
  }
}

using RunFunction = void (*)(const RunContext&, const SpmmRun&, const int32_t*, const float*,
                             const int32_t*);

#if defined(AEROGEL_USE_AVX512)
constexpr bool kBothSources = true;
#else
constexpr bool kBothSources = false;
#endif

// Where a tile's weights come from and whether its last vector is a partial one.
enum Form { kFromQuads = 0, kFromMemory = 1, kMasked = 2, kForms = 3 };

template <int V, int G, int B>
constexpr RunFunction run_function(int form) {
  if constexpr (V <= register_tile_vectors(G, B)) {
    if (form == kMasked) return &run_groups<V, G, B, true, !kBothSources>;
    if constexpr (kBothSources && quads_fit(V, G, B)) {
      if (form == kFromMemory) return &run_groups<V, G, B, false, false>;
    }
    return &run_groups<V, G, B, false, true>;
  } else {
    return nullptr;
  }
}

// Functions for one (groups, block) by [form][vectors - 1].
struct RunTable {
  RunFunction function[kForms][kMaxVectors];
};

template <int G, int B>
constexpr RunTable run_table() {
  RunTable t{};
  for (int form = 0; form < kForms; ++form) {
    const RunFunction all[kMaxVectors] = {
        run_function<1, G, B>(form),  run_function<2, G, B>(form),  run_function<3, G, B>(form),
        run_function<4, G, B>(form),  run_function<5, G, B>(form),  run_function<6, G, B>(form),
        run_function<7, G, B>(form),  run_function<8, G, B>(form),  run_function<9, G, B>(form),
        run_function<10, G, B>(form), run_function<11, G, B>(form), run_function<12, G, B>(form)};
    for (int v = 0; v < kMaxVectors; ++v) t.function[form][v] = all[v];
  }
  return t;
}

// By [log2 groups][log2 block].
constexpr RunTable kRunTables[3][3] = {
    {run_table<1, 1>(), run_table<1, 2>(), run_table<1, 4>()},
    {run_table<2, 1>(), run_table<2, 2>(), run_table<2, 4>()},
    {run_table<4, 1>(), run_table<4, 2>(), run_table<4, 4>()}};
constexpr RunTable kLockstepTable = run_table<kLockstep, 1>();

AEROGEL_INLINE const RunTable& table_of(const SpmmRun& run) {
  if (run.width == kLockstep) return kLockstepTable;
  return kRunTables[run.width >> 1][run.block >> 1];
}

int32_t max_vectors(int32_t groups, int32_t block) {
  const bool known = groups == 1 || groups == 2 || groups == 4 || (groups == kLockstep && block == 1);
  return known ? register_tile_vectors(groups, block) : 0;
}

bool is_inline_activation(Activation a) {
  return a == Activation::kNone || a == Activation::kRelu || a == Activation::kRelu6;
}

// The activations that take many instructions, while the panel's rows are still in cache.
AEROGEL_NOINLINE void finish_rows(const SpmmPanel& p, int64_t row_begin, int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    float* y = p.y + row * p.args->ldy + p.column;
    activate_span(p.args->activation, y, y, p.width);
  }
}

// Brings the activations of the next panel from memory while this one is computed. Their rows are
// too far apart for the hardware to guess where each begins.
struct PanelPrefetch {
  const char* next = nullptr;
  int64_t row_bytes = 0;  // from row to row
  int64_t rows = 0;
  int64_t width = 0;     // bytes wanted of each piece of a row
  int64_t per_run = 0;   // rows a run
  int64_t pieces = 1, piece_bytes = 0;  // of a row; from piece to piece

  AEROGEL_INLINE void advance() {
    const int64_t n = rows < per_run ? rows : per_run;
    for (int64_t i = 0; i < n; ++i) {
      const char* piece = next;
      for (int64_t k = 0; k < pieces; ++k, piece += piece_bytes) {
        for (int64_t j = 0; j < width; j += kLineBytes) __builtin_prefetch(piece + j, 0, 2);
      }
      next += row_bytes;
    }
    rows -= n;
  }
};

PanelPrefetch next_panel(const SpmmPanel& p) {
  const SpmmStream& s = *p.stream;
  const SpmmArgs& a = *p.args;
  PanelPrefetch f;
  const int64_t row_bytes = a.ldx * static_cast<int64_t>(sizeof(float));
  if (a.tokens || s.cols_total * row_bytes < kPrefetchBytes) return f;
  const int64_t left = a.columns - p.column - p.width;
  if (left <= 0) return f;
  f.next = reinterpret_cast<const char*>(p.x + p.column + p.width);
  f.row_bytes = row_bytes;
  f.rows = s.cols_total;
  f.width = (left < p.width ? left : p.width) * static_cast<int64_t>(sizeof(float));
  if (f.width >= kFollowedBytes && follows_long_rows()) return PanelPrefetch{};
  const int64_t runs =
      s.segments[p.tile_end * s.slabs].run - s.segments[p.tile_begin * s.slabs].run;
  f.per_run = (s.cols_total + runs - 1) / (runs > 0 ? runs : 1);
  return f;
}

AEROGEL_NOINLINE void run_segment(const RunContext& c, const SpmmStream& s, int64_t segment,
                                  int vectors, bool masked, PanelPrefetch& ahead) {
  const int form = masked ? kMasked : lanes_compete_with_fma() ? kFromMemory : kFromQuads;
  SpmmSegment at = s.segments[segment];
  const int64_t end = s.segments[segment + 1].run;
  for (; at.run < end; ++at.run) {
    ahead.advance();
    const SpmmRun& run = s.runs[at.run];
    const RunFunction function = table_of(run).function[form][vectors - 1];
    function(c, run, s.rows + at.row, s.weights + at.weight, s.offsets + at.offset);
    const int64_t values = static_cast<int64_t>(run.steps) * run.width * run.block;
    at.row += static_cast<int64_t>(run.groups) * run.width;
    at.weight += run.groups * ((values + 3) & ~int64_t{3});
    at.offset += static_cast<int64_t>(run.groups) * run.steps * run.width;
  }
}

// The register tiles of a panel: nearly equal widths, the first `wide` ones with a vector more.
struct ColumnTiles {
  int64_t count, wide, vectors;

  explicit ColumnTiles(const SpmmPanel& p) {
    const int64_t all = (p.width + kLanes - 1) / kLanes;
    count = (all + p.variant->vectors - 1) / p.variant->vectors;
    vectors = all / count;
    wide = all % count;
  }
  int64_t width(int64_t tile) const { return (vectors + (tile < wide)) * kLanes; }
  Columns columns(const SpmmPanel& p, int64_t tile) const {
    const int64_t begin = (tile * vectors + (tile < wide ? tile : wide)) * kLanes;
    const int64_t left = p.width - begin;
    return {p.column + begin, left < width(tile) ? left : width(tile)};
  }
};

// Distances from one register tile to the next where tiles have scratch of their own; 0 where they
// are neighbours in a plane.
struct TileSteps {
  int64_t x_bytes, y_floats;
};

// All tiles of a panel: those of like width together, one that may not load whole vectors alone.
AEROGEL_INLINE void run_tiles(const RunContext& panel, const SpmmStream& s, int64_t segment,
                              const ColumnTiles& tiles, TileSteps steps, bool masked,
                              PanelPrefetch& ahead) {
  RunContext c = panel;
  for (int64_t tile = 0; tile < tiles.count; tile += c.tiles) {
    const bool last = tile + 1 == tiles.count;
    const int64_t width = tiles.width(tile);
    const int64_t alike = tile < tiles.wide ? tiles.wide : tiles.count;
    c.tiles = alike - tile;
    c.tail = kLanes;
    if (alike == tiles.count && panel.tail != kLanes) {
      c.tiles = last ? 1 : c.tiles - 1;
      if (last) c.tail = panel.tail;
    }
    c.x_step = steps.x_bytes ? steps.x_bytes : width * static_cast<int64_t>(sizeof(float));
    c.y_step = steps.y_floats ? steps.y_floats : width;
    run_segment(c, s, segment, static_cast<int>(width / kLanes), masked && last, ahead);
    c.advance(c.tiles);
  }
}

// What padded steps read.
AEROGEL_INLINE void clear(float* row, int64_t floats) {
  for (int64_t j = 0; j < floats; j += kLanes) store(row + j, zero());
}

}  // namespace
}  // namespace aerogel::AEROGEL_ISA

#include "spmm_window.inl"

namespace aerogel::AEROGEL_ISA {
namespace {

void run_panel(const SpmmPanel& p) {
  if (const SpmmWindow* window = p.args->window) {
    return window->strips->masks ? run_shifted_panel(p) : run_window_panel(p);
  }
  const SpmmStream& s = *p.stream;
  const SpmmArgs& a = *p.args;
  const bool pack = p.variant->pack != 0;
  const ColumnTiles tiles(p);
  const int64_t stride = static_cast<int64_t>(p.variant->vectors) * kLanes;
  const int64_t x_floats = (s.cols_total + 1) * stride;  // scratch of one tile: slabs, zeros
  float* const y_scratch = p.scratch + tiles.count * x_floats;

  PanelPrefetch ahead = next_panel(p);
  RunContext c{};
  c.bias = a.bias;
  c.tail = a.padded || a.tokens ? kLanes : (p.width - 1) % kLanes + 1;
  c.activation = is_inline_activation(a.activation) ? a.activation : Activation::kNone;
  const bool masked = !pack && c.tail != kLanes;
  TileSteps steps{pack ? x_floats * static_cast<int64_t>(sizeof(float)) : 0, 0};
  for (int64_t range = p.tile_begin; range < p.tile_end; ++range) {
    const int64_t row_begin = s.tile_rows[range], row_end = s.tile_rows[range + 1];
    if (a.tokens) {
      c.y = y_scratch - row_begin * stride;
      c.ldy = stride;
      c.activation = Activation::kNone;
      steps.y_floats = (row_end - row_begin) * stride;
    } else {
      c.y = p.y + p.column;
      c.ldy = a.ldy;
      c.residual = p.residual ? p.residual + p.column : nullptr;
      c.ldr = a.ldr;
    }
    for (int64_t slab = 0; slab < s.slabs; ++slab) {
      if (pack && range == p.tile_begin) {
        for (int64_t t = 0; t < tiles.count; ++t) {
          pack_slab(p, tiles.columns(p, t), s.slab_cols[slab], s.slab_cols[slab + 1], stride,
                    p.scratch + t * x_floats);
          clear(p.scratch + (t + 1) * x_floats - stride, stride);
        }
      }
      c.x = reinterpret_cast<const char*>(pack ? p.scratch : p.x + p.column);
      c.first = slab == 0;
      c.last = slab == s.slabs - 1;
      run_tiles(c, s, range * s.slabs + slab, tiles, steps, masked, ahead);
    }
    if (a.tokens) {
      for (int64_t t = 0; t < tiles.count; ++t) {
        unpack_tile(p, tiles.columns(p, t), row_begin, row_end, stride,
                    y_scratch + t * steps.y_floats);
      }
    } else if (!is_inline_activation(a.activation)) {
      finish_rows(p, row_begin, row_end);
    }
  }
}

}  // namespace

extern const SpmmKernels kSpmmKernels;
const SpmmKernels kSpmmKernels = {kLanes, kLockstep, &max_vectors, &run_panel};

}  // namespace aerogel::AEROGEL_ISA
