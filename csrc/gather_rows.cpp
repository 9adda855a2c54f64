// A row is set to zero and then filled in; the next rows are fetched meanwhile, because ids of a
// large table lie anywhere in memory.
#include "gather_rows.h"

#include <algorithm>
#include <cstring>

#include "parallel.h"

namespace aerogel {
namespace {

constexpr int64_t kTaskRows = 256;
constexpr int64_t kPointersAhead = 16, kRowsAhead = 8;

float widened(float value) { return value; }

float widened(uint16_t half) {
  const uint32_t sign = uint32_t{half & 0x8000u} << 16, rest = half & 0x7fffu;
  // Exponents are rebased by a product, which also makes subnormal numbers right.
  const uint32_t shifted = rest << 13;
  float value;
  std::memcpy(&value, &shifted, sizeof value);
  value *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (rest >= 0x7c00u) bits = 0x7f800000u | (rest & 0x3ffu) << 13;
  bits |= sign;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class Value, class Column>
void run(const GatherRowsArgs& a, int64_t first, int64_t last) {
  const Value* values = static_cast<const Value*>(a.values);
  const Column* columns = static_cast<const Column*>(a.columns);
  for (int64_t i = first; i < last; ++i) {
    if (i + kPointersAhead < last) __builtin_prefetch(a.row_ptr + a.ids[i + kPointersAhead]);
    if (i + kRowsAhead < last) {
      const int64_t next = std::clamp(a.row_ptr[a.ids[i + kRowsAhead]], int64_t{0}, a.nonzeros);
      __builtin_prefetch(values + next);
      __builtin_prefetch(columns + next);
    }
    float* row = a.out + i * a.dim;
    std::fill(row, row + a.dim, 0.0f);
    const int64_t end = std::min(a.row_ptr[a.ids[i] + 1], a.nonzeros);
    for (int64_t k = std::max(a.row_ptr[a.ids[i]], int64_t{0}); k < end; ++k) {
      const int64_t column = columns[k];
      if (column >= 0 && column < a.dim) row[column] = widened(values[k]);
    }
  }
}

}  // namespace

void gather_rows(const GatherRowsArgs& a, int threads) {
  const auto rows = a.half ? (a.narrow ? &run<uint16_t, uint8_t> : &run<uint16_t, int32_t>)
                           : (a.narrow ? &run<float, uint8_t> : &run<float, int32_t>);
  parallel_tasks((a.count + kTaskRows - 1) / kTaskRows, threads, [&](int64_t task) {
    rows(a, task * kTaskRows, std::min(a.count, (task + 1) * kTaskRows));
  });
}

int64_t entries_above(const float* matrix, int64_t rows, int64_t columns, const float* limits,
                      int64_t* found_rows, int64_t* found_columns, float* found, int64_t room) {
  int64_t count = 0;
  for (int64_t r = 0; r < rows; ++r, matrix += columns) {
    int32_t any = 0;  // a loop without a branch is one of registers
    for (int64_t c = 0; c < columns; ++c) any |= matrix[c] > limits[c] ? 1 : 0;
    if (!any) continue;
    for (int64_t c = 0; c < columns; ++c) {
      if (!(matrix[c] > limits[c])) continue;
      if (count < room) {
        found_rows[count] = r;
        found_columns[count] = c;
        found[count] = matrix[c];
      }
      ++count;
    }
  }
  return count;
}

}  // namespace aerogel
