// Rows of a transposed weight added up, four at a time: the sums are loaded and stored once for all
// four, and four rows in flight hide the way from memory. Each row is prefetched along the way it
// will be read: where it ends, the row that follows the next three begins.
#include "sparse_input.h"

#include "kernels.h"
#include "stored_values.inl"

namespace aerogel::AEROGEL_ISA {
namespace {

constexpr int64_t kAheadBytes = 2048;  // of each of the four rows
constexpr int64_t kStepVectors = 2;

template <class Values>
struct WeightRow {
  const typename Values::Stored* here;  // its first output of the task
  const typename Values::Stored* next;  // that of the row to be read after it
  float x;
};

// Outputs [j, end) of R rows, in whole steps.
template <class Values, int R>
AEROGEL_INLINE int64_t add_steps(const WeightRow<Values>* rows,
                                 const typename Values::Stored* const* ahead, int64_t j,
                                 int64_t end, float* sums) {
  constexpr int64_t kStep = kStepVectors * kLanes;
  Vec x[R];
  for (int r = 0; r < R; ++r) x[r] = broadcast(rows[r].x);
  for (; j + kStep <= end; j += kStep) {
    Vec sum[kStepVectors];
    for (int v = 0; v < kStepVectors; ++v) sum[v] = load(sums + j + v * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(ahead[r] + j);
      for (int v = 0; v < kStepVectors; ++v) {
        sum[v] = fma(Values::load(rows[r].here + j + v * kLanes), x[r], sum[v]);
      }
    }
    for (int v = 0; v < kStepVectors; ++v) store(sums + j + v * kLanes, sum[v]);
  }
  return j;
}

// sums[j] += rows[0].x * rows[0].here[j] + ... for j < count.
template <class Values, int R>
AEROGEL_NOINLINE void add_rows(const WeightRow<Values>* rows, int64_t count, float* sums) {
  constexpr int64_t kAhead = kAheadBytes / sizeof(typename Values::Stored);
  const int64_t turn = count > kAhead ? count - kAhead : 0;
  const typename Values::Stored* ahead[R];
  for (int r = 0; r < R; ++r) ahead[r] = rows[r].here + kAhead;
  int64_t j = add_steps<Values, R>(rows, ahead, 0, turn, sums);
  for (int r = 0; r < R; ++r) ahead[r] = rows[r].next - turn;
  j = add_steps<Values, R>(rows, ahead, j, count, sums);
  for (; j < count; j += kLanes) {
    const int64_t n = count - j;
    Vec sum = load_upto(sums + j, n);
    for (int r = 0; r < R; ++r) {
      const Vec weight = n >= kLanes ? Values::load(rows[r].here + j)
                                     : load_values_n<Values>(rows[r].here + j, n);
      sum = fma(weight, broadcast(rows[r].x), sum);
    }
    store_upto(sums + j, sum, n);
  }
}

template <class Values>
AEROGEL_INLINE void add_some_rows(const WeightRow<Values>* rows, int n, int64_t count,
                                  float* sums) {
  switch (n) {
    case 4: add_rows<Values, 4>(rows, count, sums); break;
    case 3: add_rows<Values, 3>(rows, count, sums); break;
    case 2: add_rows<Values, 2>(rows, count, sums); break;
    case 1: add_rows<Values, 1>(rows, count, sums); break;
    default: break;
  }
}

template <class Values>
AEROGEL_INLINE void accumulate(const SparseInputTask& t) {
  const SparseInputArgs& a = *t.args;
  const auto* weight = static_cast<const typename Values::Stored*>(a.weight.data) + t.first;
  const int64_t count = t.last - t.first;
  for (int64_t i = 0; i < t.active.count; i += kSparseInputRows) {
    const int64_t left = t.active.count - i;
    const int n = static_cast<int>(left < kSparseInputRows ? left : kSparseInputRows);
    for (int64_t token = 0; token < t.tokens; ++token) {
      WeightRow<Values> rows[kSparseInputRows];
      int used = 0;
      for (int64_t r = i; r < i + n; ++r) {
        if (!(t.active.tokens[r] >> token & 1)) continue;
        const int64_t after = r + kSparseInputRows;
        const int64_t next = after < t.active.count ? after : r;
        rows[used++] = {weight + t.active.inputs[r] * a.ldw, weight + t.active.inputs[next] * a.ldw,
                        t.active.x[r * t.tokens + token]};
      }
      add_some_rows(rows, used, count, t.scratch + token * count);
    }
  }
}

void run(const SparseInputTask& t) {
  const SparseInputArgs& a = *t.args;
  const int64_t count = t.last - t.first;
  for (int64_t i = 0; i < t.tokens * count; ++i) t.scratch[i] = 0.0f;
  switch (a.weight.type) {
    case ValueType::kFloat32: accumulate<Float32Values>(t); break;
    case ValueType::kBfloat16: accumulate<Bfloat16Values>(t); break;
    case ValueType::kInt8: accumulate<Int8Values>(t); break;
  }
  for (int64_t token = 0; token < t.tokens; ++token) {
    finish_sums(t.scratch + token * count, a.weight.scales ? a.weight.scales + t.first : nullptr,
                a.bias ? a.bias + t.first : nullptr,
                a.residual ? a.residual + token * a.ldr + t.first : nullptr, a.activation,
                a.y + token * a.ldy + t.first, count);
  }
}

}  // namespace

extern const SparseInputKernels kSparseInputKernels;
const SparseInputKernels kSparseInputKernels = {&run};

}  // namespace aerogel::AEROGEL_ISA
