// Element by element: activations, sums and products of two tensors, and the mean of a plane.

namespace aerogel::AEROGEL_ISA {
namespace {

// The activations that cost an instruction or two run on the accumulators; the others run over the
// stored result, which is still in L1, so that they exist once and not in every kernel.
AEROGEL_INLINE bool is_cheap(Activation activation) {
  return activation == Activation::kNone || activation == Activation::kRelu ||
         activation == Activation::kRelu6;
}

AEROGEL_INLINE Vec activate_cheaply(Vec v, Activation activation) {
  if (activation == Activation::kNone) return v;
  v = relu(v);
  return activation == Activation::kRelu6 ? min(broadcast(6.0f), v) : v;
}

// The same without branches, for tiles where these would cost more than two instructions.
struct Clamp {
  Vec low, high;

  AEROGEL_INLINE explicit Clamp(Activation activation)
      : low(activation == Activation::kNone ? broadcast(-__builtin_inff()) : zero()),
        high(broadcast(activation == Activation::kRelu6 ? 6.0f : __builtin_inff())) {}
  AEROGEL_INLINE Vec operator()(Vec v) const { return min(high, max(low, v)); }
};

AEROGEL_INLINE Vec combine(Binary kind, Vec x, Vec y) {
  return kind == Binary::kAdd ? add(x, y) : mul(x, y);
}

AEROGEL_INLINE void binary_row(const BinaryArgs& a, const float* x, const float* y, float* z) {
  const bool scalar = a.y_columns == 1 && a.columns != 1;
  const Vec same = broadcast(*y);
  const bool in_registers = is_cheap(a.activation);
  const Activation cheap = in_registers ? a.activation : Activation::kNone;
  for (int64_t i = 0; i < a.columns; i += kLanes) {
    const int64_t n = a.columns - i;
    const Vec other = scalar ? same : load_upto(y + i, n);
    const Vec v = combine(a.kind, load_upto(x + i, n), other);
    store_upto(z + i, activate_cheaply(v, cheap), n);
  }
  if (!in_registers) activate_span(a.activation, z, z, a.columns);
}

void binary_channels(const BinaryArgs& args, int64_t first, int64_t last) {
  if (args.ldx == 1 && args.ldy == 1 && args.ldz == 1) {  // vectors: all channels are one row
    BinaryArgs row = args;
    row.columns = row.y_columns = last - first;
    binary_row(row, args.x + first, args.y + first, args.z + first);
    return;
  }
  for (int64_t c = first; c < last; ++c) {
    binary_row(args, args.x + c * args.ldx, args.y + c * args.ldy, args.z + c * args.ldz);
  }
}

void mean_channels(const float* x, int64_t ldx, int64_t columns, float* y, int64_t ldy,
                   int64_t first, int64_t last) {
  const float scale = 1.0f / static_cast<float>(columns);
  for (int64_t c = first; c < last; ++c) {
    const float* row = x + c * ldx;
    Vec sums[4] = {zero(), zero(), zero(), zero()};
    int64_t i = 0;
    for (; i + 4 * kLanes <= columns; i += 4 * kLanes) {
      for (int v = 0; v < 4; ++v) sums[v] = add(sums[v], load(row + i + v * kLanes));
    }
    for (; i < columns; i += kLanes) sums[0] = add(sums[0], load_upto(row + i, columns - i));
    y[c * ldy] = scale * sum_lanes(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  }
}

}  // namespace
}  // namespace aerogel::AEROGEL_ISA
