// Dense matrix times one vector: bound by the weights' way from memory, so they are one stream.

namespace aerogel::AEROGEL_ISA {
namespace {

constexpr int kChunkVectors = kGemvChunk / kLanes;

AEROGEL_INLINE void gemv_block(const GemvArgs& a, int64_t block) {
  constexpr int64_t kStep = kGemvRows * kGemvChunk;
  constexpr int64_t kAhead = 16 * kStep;  // 4 KiB: about the way from the last cache
  const int64_t chunks = (a.depth + kGemvChunk - 1) / kGemvChunk;
  const float* weight = a.weight + block * chunks * kStep;
  Vec sums[kGemvRows][kChunkVectors];
  for (auto& row : sums) {
    for (Vec& sum : row) sum = zero();
  }
  for (int64_t k = 0; k < a.depth; k += kGemvChunk, weight += kStep) {
    Vec x[kChunkVectors];
    for (int v = 0; v < kChunkVectors; ++v) {
      const int64_t left = a.depth - k - v * kLanes;
      x[v] = left > 0 ? load_upto(a.x + k + v * kLanes, left) : zero();
    }
    for (int r = 0; r < kGemvRows; ++r) {
      __builtin_prefetch(weight + kAhead + r * kGemvChunk);
      for (int v = 0; v < kChunkVectors; ++v) {
        sums[r][v] = fma(load(weight + r * kGemvChunk + v * kLanes), x[v], sums[r][v]);
      }
    }
  }
  const int64_t row = block * kGemvRows;
  for (int r = 0; r < kGemvRows && row + r < a.outputs; ++r) {
    Vec sum = sums[r][0];
    for (int v = 1; v < kChunkVectors; ++v) sum = add(sum, sums[r][v]);
    const float dot = sum_lanes(sum) + a.bias[row + r];
    a.y[row + r] = a.residual ? dot + a.residual[row + r] : dot;
  }
}

void gemv_blocks(const GemvArgs& args, int64_t first, int64_t last) {
  for (int64_t block = first; block < last; ++block) gemv_block(args, block);
  float* y = args.y + first * kGemvRows;
  activate_span(args.activation, y, y, smaller(last * kGemvRows, args.outputs) - first * kGemvRows);
}

}  // namespace
}  // namespace aerogel::AEROGEL_ISA
