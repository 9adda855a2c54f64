#include "plan_ops.h"

#include <algorithm>
#include <cstring>

#include "plan_parts.h"

namespace aerogel {

namespace {

constexpr int64_t kTaskWork = 32768;   // multiply-adds or floats below which a task is not worth it
constexpr int64_t kJoinedChannels = 16;  // whose planes are put together in the first cache
constexpr int64_t kDirectChannels = 16;  // more repay a gathered panel
constexpr int64_t kTasksPerThread = 6;  // enough for a thread that loses its core for a while

struct Range {
  int64_t first, last;
};

Range share(int64_t units, int64_t task, int64_t tasks) {
  return {units * task / tasks, units * (task + 1) / tasks};
}

const LayerKernels& layer_kernels(const KernelTable& table) { return *table.layers; }

// Where a bare tensor ends, or how far a padded one may be read.
const float* end_of(const Frame& frame, int value) {
  const Operand x = frame.operand(value);
  const Value& v = frame.values[value];
  const float* const end = x.data + x.ld * x.channels;
  if (v.place == Place::kInput) return end;
  return end + kReadSlack / 2 - (v.place == Place::kGroup ? frame.slot * v.stride : 0);
}

int64_t elementwise_tasks(const Operand& z, int threads) {
  return worthwhile_tasks(z.channels, z.channels * z.columns, threads);
}

}  // namespace

int64_t worthwhile_tasks(int64_t units, int64_t work, int threads) {
  if (threads <= 1) return 1;
  const int64_t by_work = work / kTaskWork;
  return std::max<int64_t>(1, std::min({units, by_work, kTasksPerThread * threads}));
}

// dense convolution

// Sums of a panel that is a single vector have another order.
bool ConvOp::takes_group(int64_t columns) const {
  return columnwise() && columns > active_table().lanes;
}

bool ConvOp::pointwise() const {
  const Window& w = source.window;
  return w.kernel_h == 1 && w.kernel_w == 1 && w.stride_h == 1 && w.stride_w == 1 &&
         w.pad_h == 0 && w.pad_w == 0;
}

namespace {

// Few channels, and rows that fill their vectors.
bool runs_by_rows(const ConvSource& source, int64_t lanes) {
  const Window& w = source.window;
  const int64_t vectors = (w.out_w + lanes - 1) / lanes;
  return source.groups == 1 && source.in_channels <= kDirectChannels &&
         source.in_channels * w.kernel_h * w.kernel_w <= kConvDepthBlock &&
         8 * w.out_w >= 7 * vectors * lanes;
}

}  // namespace

void ConvOp::prepare(const std::vector<Value>&, const KernelTable& table) {
  kernels = &layer_kernels(table);
  weight = std::make_unique<ConvWeight>(source, kernels->tile);
  if (!pointwise() && runs_by_rows(source, table.lanes)) {
    direct = direct_shape(source.window, source.in_channels);
  }
}

int64_t ConvOp::scratch_floats() const {
  if (direct.rows) return direct.floats;
  const int64_t width = kernels->tile.width();
  return (kConvDepthBlock + 1) * width + strip_floats(source.window, width);
}

namespace {

// Panels of columns x groups x shares of the row blocks; a task takes a run of units.
struct ConvGrid {
  int64_t panels, groups, shares;

  int64_t units() const { return panels * groups * shares; }
};

ConvGrid conv_grid(const ConvLayer& layer, const DenseTile& tile, int64_t columns, int threads) {
  ConvGrid grid{conv_panels(columns, tile), layer.groups, 1};
  const int64_t wanted = threads > 1 ? 3 * threads : 1;
  const int64_t units = grid.units();
  if (units < wanted) {
    constexpr int64_t kLeastBlocks = 4;  // fewer would gather a panel for too little work
    grid.shares = std::max<int64_t>(
        1, std::min((wanted + units - 1) / units, layer.row_blocks / kLeastBlocks));
  }
  return grid;
}

}  // namespace

int64_t ConvOp::tasks(const Frame& frame) const {
  if (frame.threads <= 1) return 1;
  const ConvLayer& layer = weight->layer();
  const int64_t columns = frame.operand(output).columns;
  if (direct.rows) {
    const int64_t strips = (source.window.out_h + direct.rows - 1) / direct.rows;
    return worthwhile_tasks(strips, columns * source.out_channels * layer.depth, frame.threads);
  }
  const int64_t units = conv_grid(layer, kernels->tile, columns, frame.threads).units();
  return worthwhile_tasks(units, columns * source.out_channels * layer.depth, frame.threads);
}

ConvArgs ConvOp::args(const Frame& frame) const {
  const Operand x = frame.operand(inputs[0]), y = frame.operand(output);
  ConvArgs args{};
  args.layer = &weight->layer();
  args.x = x.data;
  args.ldx = x.ld;
  args.x_end = end_of(frame, inputs[0]);
  args.y = y.data;
  args.ldy = y.ld;
  if (epilogue.residual) {
    const Operand residual = frame.operand(inputs[1]);
    args.residual = residual.data;
    args.ldr = residual.ld;
  }
  args.activation = epilogue.activation;
  args.columns = y.columns;
  return args;
}

void ConvOp::run(const Frame& frame, int64_t task, int64_t tasks, float* scratch) const {
  const ConvArgs args = this->args(frame);
  if (direct.rows) {
    const Range rows = share(source.window.out_h, task, tasks);
    return kernels->conv_direct(args, rows.first, rows.last, scratch);
  }
  const ConvGrid grid = conv_grid(*args.layer, kernels->tile, args.columns, frame.threads);
  const Range units = share(grid.units(), task, tasks);
  for (int64_t unit = units.first; unit < units.last;) {  // panels vary fastest
    const int64_t panel = unit % grid.panels, part = unit / grid.panels;
    const int64_t count = std::min(grid.panels - panel, units.last - unit);
    const Range blocks = share(args.layer->row_blocks, part % grid.shares, grid.shares);
    kernels->conv(args, {panel, panel + count, part / grid.shares, blocks.first, blocks.last},
                  scratch);
    unit += count;
  }
}

RowReach ConvOp::row_reach() const {
  if (epilogue.residual || pointwise() || !runs_by_rows(source, active_table().lanes)) return {};
  return reach_of(source.window, direct_shape(source.window, source.in_channels).rows);
}

void ConvOp::run_rows(const Frame& frame, const RowPlaces& places, float* scratch) const {
  ConvArgs args = this->args(frame);
  args.x = places.x.data;
  args.ldx = places.x.ld;
  args.y = places.y.data;
  args.ldy = places.y.ld;
  kernels->conv_direct(args, places.rows.first, places.rows.last, scratch);
}

// planes in parts, put together for operations that want them whole

namespace {

// Floats from channel to channel, or 0 for a value that lies in one piece.
int64_t joined_row_of(const Value& v) { return v.parts > 1 ? padded_row(v.columns()) : 0; }

int64_t joined_floats(int64_t row) { return row ? kJoinedChannels * row + 2 * kReadSlack : 0; }

// At most kJoinedChannels of them; returns where channel 0 would be.
const float* joined_planes(const Frame& frame, int value, Span channels, int64_t row,
                           float* scratch) {
  join_parts(frame, value, channels, scratch + kReadSlack, row);
  return scratch + kReadSlack - channels.first * row;
}

}  // namespace

// depthwise convolution

void DepthwiseOp::prepare(const std::vector<Value>& values, const KernelTable& table) {
  kernels = &layer_kernels(table);
  weight = std::make_unique<DepthwiseWeight>(source, table.lanes);
  joined_row = joined_row_of(values[inputs[0]]);
}

int64_t DepthwiseOp::scratch_floats() const { return joined_floats(joined_row); }

namespace {

// Large planes are cut into bands of rows, as the products around cut their columns, and small ones by
// channels, as those then do: a core finds its own part in its cache. Bands are whole numbers of the
// kernel's tiles.
constexpr int64_t kBandedRows = 28;

int64_t band_count(const Window& w, int64_t tile, int threads) {
  if (threads <= 1 || w.out_h < kBandedRows) return 1;
  return std::min<int64_t>((w.out_h + tile - 1) / tile, 2 * threads);
}

struct BandTask {
  Range channels, rows;
};

// Bands begin with different channels: the cache line in which two of them meet would else go back and
// forth between the cores that write them.
BandTask band_task(const Window& w, int64_t channels, int64_t tile, int64_t bands, int64_t task,
                   int64_t tasks) {
  const int64_t parts = tasks / bands, band = task / parts;
  const Range tiles = share((w.out_h + tile - 1) / tile, band, bands);
  return {share(channels, (task + band * parts / bands) % parts, parts),
          {tile * tiles.first, std::min(tile * tiles.last, w.out_h)}};
}

}  // namespace

int64_t DepthwiseOp::tasks(const Frame& frame) const {
  const Operand y = frame.operand(output);
  const int64_t taps = source.window.kernel_h * source.window.kernel_w;
  const Window& w = source.window;
  const int64_t bands = band_count(w, depthwise_tile_rows(w), frame.threads);
  const int64_t wanted =
      worthwhile_tasks(bands * y.channels, y.channels * y.columns * taps, frame.threads);
  return (wanted + bands - 1) / bands * bands;
}

void DepthwiseOp::run(const Frame& frame, int64_t task, int64_t tasks, float* scratch) const {
  const Operand x = frame.operand(inputs[0]), y = frame.operand(output);
  const Window& w = source.window;
  const int64_t tile = depthwise_tile_rows(w), bands = band_count(w, tile, frame.threads);
  const auto [channels, rows] = band_task(w, y.channels, tile, bands, task, tasks);
  DepthwiseArgs args = {&weight->layer(), x.data, x.ld, y.data, y.ld, activation};
  if (joined_row == 0) {
    return kernels->depthwise(args, channels.first, channels.last, rows.first, rows.last);
  }
  args.ldx = joined_row;
  const int64_t multiplier = args.layer->multiplier;  // outputs of an input
  for (int64_t first = channels.first; first < channels.last; first += kJoinedChannels) {
    const int64_t last = std::min(first + kJoinedChannels, channels.last);
    const Span read = {first / multiplier, (last - 1) / multiplier + 1};
    args.x = joined_planes(frame, inputs[0], read, joined_row, scratch);
    kernels->depthwise(args, first, last, rows.first, rows.last);
  }
}

RowReach DepthwiseOp::row_reach() const {
  const LayerKernels& best = layer_kernels(active_table());
  return reach_of(source.window, best.depthwise_rows(source.window, activation));
}

void DepthwiseOp::run_rows(const Frame&, const RowPlaces& places, float*) const {
  const Operand &x = places.x, &y = places.y;
  const DepthwiseArgs args = {&weight->layer(), x.data, x.ld, y.data, y.ld, activation};
  const int64_t begin = y.channels * places.part / places.parts;
  kernels->depthwise(args, begin, y.channels, places.rows.first, places.rows.last);
  kernels->depthwise(args, 0, begin, places.rows.first, places.rows.last);
}

// dense linear layer

void LinearOp::prepare(const std::vector<Value>& values, const KernelTable& table) {
  if (values[output].place == Place::kJoint) return ConvOp::prepare(values, table);
  kernels = &layer_kernels(table);
  const int64_t depth = source.in_channels, outputs = source.out_channels;
  blocks = (outputs + kGemvRows - 1) / kGemvRows;
  const int64_t chunks = (depth + kGemvChunk - 1) / kGemvChunk;
  rows = FloatBuffer(blocks * chunks * kGemvRows * kGemvChunk);
  bias = FloatBuffer(outputs);
  for (int64_t n = 0; n < outputs; ++n) {
    float* to = rows.data() + (n / kGemvRows * chunks * kGemvRows + n % kGemvRows) * kGemvChunk;
    for (int64_t k = 0; k < depth; k += kGemvChunk, to += kGemvRows * kGemvChunk) {
      std::copy_n(source.weight + n * depth + k, std::min(kGemvChunk, depth - k), to);
    }
  }
  if (source.bias) std::copy_n(source.bias, outputs, bias.data());
}

int64_t LinearOp::scratch_floats() const { return weight ? ConvOp::scratch_floats() : 0; }

int64_t LinearOp::tasks(const Frame& frame) const {
  if (weight) return ConvOp::tasks(frame);
  return worthwhile_tasks(blocks, rows.size(), frame.threads);
}

void LinearOp::run(const Frame& frame, int64_t task, int64_t tasks, float* scratch) const {
  if (weight) return ConvOp::run(frame, task, tasks, scratch);
  GemvArgs args{};
  args.weight = rows.data();
  args.bias = bias.data();
  args.x = frame.operand(inputs[0]).data;
  args.depth = source.in_channels;
  args.residual = epilogue.residual ? frame.operand(inputs[1]).data : nullptr;
  args.y = frame.operand(output).data;
  args.outputs = source.out_channels;
  args.activation = epilogue.activation;
  const Range n = share(blocks, task, tasks);
  kernels->gemv(args, n.first, n.last);
}

// pooling

void PoolOp::prepare(const std::vector<Value>&, const KernelTable& table) {
  kernels = &layer_kernels(table);
}

int64_t PoolOp::tasks(const Frame& frame) const {
  const Operand y = frame.operand(output);
  const int64_t work = y.channels * y.columns * window.kernel_h * window.kernel_w;
  const int64_t bands = band_count(window, 1, frame.threads);
  const int64_t wanted = worthwhile_tasks(bands * y.channels, work, frame.threads);
  return (wanted + bands - 1) / bands * bands;
}

void PoolOp::run(const Frame& frame, int64_t task, int64_t tasks, float*) const {
  const Operand x = frame.operand(inputs[0]), y = frame.operand(output);
  const int64_t bands = band_count(window, 1, frame.threads);
  const BandTask part = band_task(window, y.channels, 1, bands, task, tasks);
  kernels->pool({kind, window, taps.x.data(), taps.y.data(), x.data, x.ld, y.data, y.ld},
                part.channels.first, part.channels.last, part.rows.first, part.rows.last);
}

RowReach PoolOp::row_reach() const { return reach_of(window, 1); }

void PoolOp::run_rows(const Frame&, const RowPlaces& places, float*) const {
  const Operand &x = places.x, &y = places.y;
  const PoolArgs args = {kind, window, taps.x.data(), taps.y.data(), x.data, x.ld, y.data, y.ld};
  const int64_t begin = y.channels * places.part / places.parts;
  kernels->pool(args, begin, y.channels, places.rows.first, places.rows.last);
  kernels->pool(args, 0, begin, places.rows.first, places.rows.last);
}

void MeanOp::prepare(const std::vector<Value>& values, const KernelTable& table) {
  kernels = &layer_kernels(table);
  joined_row = joined_row_of(values[inputs[0]]);
}

int64_t MeanOp::scratch_floats() const { return joined_floats(joined_row); }

int64_t MeanOp::tasks(const Frame& frame) const {
  constexpr int64_t kSumAcross = 4;  // of a vector: as long as so many loads
  const Operand x = frame.operand(inputs[0]);
  return worthwhile_tasks(x.channels, kSumAcross * x.channels * x.columns, frame.threads);
}

void MeanOp::run(const Frame& frame, int64_t task, int64_t tasks, float* scratch) const {
  const Operand x = frame.operand(inputs[0]), y = frame.operand(output);
  const Range c = share(x.channels, task, tasks);
  if (joined_row == 0) {
    return kernels->channel_mean(x.data, x.ld, x.columns, y.data, y.ld, c.first, c.last);
  }
  for (int64_t first = c.first; first < c.last; first += kJoinedChannels) {
    const int64_t last = std::min(first + kJoinedChannels, c.last);
    const float* planes = joined_planes(frame, inputs[0], {first, last}, joined_row, scratch);
    kernels->channel_mean(planes, joined_row, x.columns, y.data, y.ld, first, last);
  }
}

// element by element

void BinaryOp::prepare(const std::vector<Value>&, const KernelTable& table) {
  kernels = &layer_kernels(table);
}

int64_t BinaryOp::tasks(const Frame& frame) const {
  return elementwise_tasks(frame.operand(output), frame.threads);
}

void BinaryOp::run(const Frame& frame, int64_t task, int64_t tasks, float*) const {
  const Operand x = frame.operand(inputs[0]), y = frame.operand(inputs[1]);
  const Operand z = frame.operand(output);
  const Range c = share(z.channels, task, tasks);
  kernels->binary({kind, activation, x.data, x.ld, y.data, y.ld, y.columns, z.data, z.ld,
                   z.columns},
                  c.first, c.last);
}

void ActivationOp::prepare(const std::vector<Value>&, const KernelTable& table) {
  kernels = &layer_kernels(table);
}

int64_t ActivationOp::tasks(const Frame& frame) const {
  return elementwise_tasks(frame.operand(output), frame.threads);
}

void ActivationOp::run(const Frame& frame, int64_t task, int64_t tasks, float*) const {
  const Operand x = frame.operand(inputs[0]), y = frame.operand(output);
  const Range c = share(y.channels, task, tasks);
  if (x.ld == 1 && y.ld == 1) {
    kernels->activate(activation, x.data + c.first, y.data + c.first, c.last - c.first);
    return;
  }
  for (int64_t i = c.first; i < c.last; ++i) {
    kernels->activate(activation, x.data + i * x.ld, y.data + i * y.ld, y.columns);
  }
}

// copies

int64_t PickOp::tasks(const Frame& frame) const {
  const Operand y = frame.operand(output);
  return worthwhile_tasks(y.channels, y.channels * y.columns, frame.threads);
}

void PickOp::run(const Frame& frame, int64_t task, int64_t tasks, float*) const {
  const Operand x = frame.operand(inputs[0]), y = frame.operand(output);
  const Window& w = window;
  const Range c = share(y.channels, task, tasks);
  for (int64_t i = c.first; i < c.last; ++i) {
    const float* from = x.data + i * x.ld;
    float* to = y.data + i * y.ld;
    for (int64_t oy = 0; oy < w.out_h; ++oy, to += w.out_w, from += w.stride_h * w.in_w) {
      if (w.stride_w == 2) {
        for (int64_t ox = 0; ox < w.out_w; ++ox) to[ox] = from[2 * ox];
      } else {
        for (int64_t ox = 0; ox < w.out_w; ++ox) to[ox] = from[ox * w.stride_w];
      }
    }
  }
}

int64_t CopyOp::tasks(const Frame& frame) const {
  const Operand x = frame.operand(inputs[0]);
  return worthwhile_tasks(x.channels, x.channels * x.columns, frame.threads);
}

void CopyOp::run(const Frame& frame, int64_t task, int64_t tasks, float*) const {
  const Operand x = frame.operand(inputs[0]), y = frame.operand(output);
  if (x.data == y.data) return;
  // A vector stands for planes side by side.
  const bool flatten = y.columns == 1 && x.columns > 1, unflatten = x.columns == 1 && y.columns > 1;
  const Operand& planes = unflatten ? y : x;
  const int64_t from_ld = unflatten ? planes.columns : x.ld;
  const int64_t to_ld = flatten ? planes.columns : y.ld;
  Range c = share(planes.channels, task, tasks);
  int64_t count = planes.columns;
  if (from_ld == count && to_ld == count) {  // one block
    count *= c.last - c.first;
    std::memcpy(y.data + c.first * to_ld, x.data + c.first * from_ld,
                static_cast<size_t>(count) * sizeof(float));
    return;
  }
  for (int64_t i = c.first; i < c.last; ++i) {
    std::memcpy(y.data + i * to_ld, x.data + i * from_ld,
                static_cast<size_t>(count) * sizeof(float));
  }
}

void TransposeOp::prepare(const std::vector<Value>&, const KernelTable& table) {
  kernels = &layer_kernels(table);
}

int64_t TransposeOp::tasks(const Frame& frame) const {
  const Operand planes = frame.operand(to_planes ? output : inputs[0]);
  return worthwhile_tasks((planes.columns + 7) / 8, planes.channels * planes.columns, frame.threads);
}

void TransposeOp::run(const Frame& frame, int64_t task, int64_t tasks, float*) const {
  const int tokens_id = to_planes ? inputs[0] : output;
  const Operand planes = frame.operand(to_planes ? output : inputs[0]);
  const Value& tokens_value = frame.values[tokens_id];
  float* tokens = frame.operand(tokens_id).data;
  const int64_t row = tokens_value.stride / tokens_value.columns();  // floats from token to token
  const Range blocks = share((planes.columns + 7) / 8, task, tasks);
  const int64_t first = blocks.first * 8, last = std::min(blocks.last * 8, planes.columns);
  if (to_planes) {
    kernels->transpose(tokens + first * row, row, planes.data + first, planes.ld, last - first,
                       planes.channels);
  } else {
    kernels->transpose(planes.data + first, planes.ld, tokens + first * row, row, planes.channels,
                       last - first);
  }
}

}  // namespace aerogel
