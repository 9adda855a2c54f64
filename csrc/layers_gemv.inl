// Dense matrix times one vector: bound by the weights' way from memory, so four rows stream at once.

namespace aerogel::AEROGEL_ISA {
namespace {

template <int kRowCount>
AEROGEL_INLINE void gemv_block(const GemvArgs& a, int64_t row) {
  Vec even[kRowCount], odd[kRowCount];
  for (int r = 0; r < kRowCount; ++r) even[r] = odd[r] = zero();
  const float* weight = a.weight + row * a.ldw;
  int64_t k = 0;
  for (; k + 2 * kLanes <= a.depth; k += 2 * kLanes) {
    const Vec x0 = load(a.x + k), x1 = load(a.x + k + kLanes);
    for (int r = 0; r < kRowCount; ++r) {
      even[r] = fma(load(weight + r * a.ldw + k), x0, even[r]);
      odd[r] = fma(load(weight + r * a.ldw + k + kLanes), x1, odd[r]);
    }
  }
  for (; k < a.depth; k += kLanes) {
    const Vec x = load_upto(a.x + k, a.depth - k);
    for (int r = 0; r < kRowCount; ++r) {
      even[r] = fma(load(weight + r * a.ldw + k), x, even[r]);
    }
  }
  for (int r = 0; r < kRowCount; ++r) {
    float sum = sum_lanes(add(even[r], odd[r])) + a.bias[row + r];
    if (a.residual) sum += a.residual[row + r];
    a.y[row + r] = sum;
  }
}

void gemv_rows(const GemvArgs& args, int64_t first, int64_t last) {
  int64_t row = first;
  for (; row + 4 <= last; row += 4) gemv_block<4>(args, row);
  for (; row < last; ++row) gemv_block<1>(args, row);
  activate_span(args.activation, args.y + first, args.y + first, last - first);
}

}  // namespace
}  // namespace aerogel::AEROGEL_ISA
