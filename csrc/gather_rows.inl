// A row is set to zero and then filled in, sixteen entries at a time where the instruction set can
// scatter; the next rows are fetched meanwhile, because ids of a large table lie anywhere in memory.
//
// Reading order: float16 -> the entries of a row -> fetching ahead -> a run of ids; then the
// search among scores.
#include "gather_rows.h"

#include <string.h>

#include "kernels.h"
#include "simd.h"

namespace aerogel::AEROGEL_ISA {
namespace {

constexpr int64_t kPointersAhead = 16, kRowsAhead = 8;
constexpr int64_t kLineBytes = 64;

AEROGEL_INLINE float widened(float value) { return value; }

AEROGEL_INLINE float widened(uint16_t half) {
  const uint32_t sign = uint32_t{half & 0x8000u} << 16, rest = half & 0x7fffu;
  // Exponents are rebased by a product, which also makes subnormal numbers right.
  const uint32_t shifted = rest << 13;
  float value;
  memcpy(&value, &shifted, sizeof value);
  value *= 0x1p112f;
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if (rest >= 0x7c00u) bits = 0x7f800000u | (rest & 0x3ffu) << 13;
  bits |= sign;
  memcpy(&value, &bits, sizeof value);
  return value;
}

#if defined(AEROGEL_USE_AVX512)

AEROGEL_INLINE __m512 values_at(const float* p, __mmask16 some) {
  return _mm512_maskz_loadu_ps(some, p);
}
// Halves are widened in 256 bits: the first wide instruction that calculates makes the core change
// its power state, which costs more than a short lookup.
AEROGEL_INLINE __m512 values_at(const uint16_t* p, __mmask16 some) {
  const __m256i halves = _mm256_maskz_loadu_epi16(some, p);
  const __m256 low = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
  const __m256 high = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
  return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}
AEROGEL_INLINE __m512i columns_at(const uint8_t* p, __mmask16 some) {
  return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, p));
}
AEROGEL_INLINE __m512i columns_at(const int32_t* p, __mmask16 some) {
  return _mm512_maskz_loadu_epi32(some, p);
}

// As unsigned numbers negative columns are out of range too. Of equal columns the last one stays, as
// in a loop.
template <class Value, class Column>
AEROGEL_INLINE void fill(float* row, const Value* values, const Column* columns, int64_t count,
                         int64_t dim) {
  const __m512i end = _mm512_set1_epi32(static_cast<int32_t>(dim));
  for (int64_t k = 0; k < count; k += kLanes) {
    const __mmask16 some = count - k < kLanes ? lane_mask(count - k) : __mmask16{0xffff};
    const __m512i column = columns_at(columns + k, some);
    const __mmask16 inside = _mm512_mask_cmplt_epu32_mask(some, column, end);
    _mm512_mask_i32scatter_ps(row, inside, column, values_at(values + k, some), sizeof(float));
  }
}

#else

template <class Value, class Column>
AEROGEL_INLINE void fill(float* row, const Value* values, const Column* columns, int64_t count,
                         int64_t dim) {
  for (int64_t k = 0; k < count; ++k) {
    const int64_t column = columns[k];
    if (column >= 0 && column < dim) row[column] = widened(values[k]);
  }
}

#endif

AEROGEL_INLINE void clear(float* row, int64_t dim) {
  int64_t j = 0;
  for (; j + kLanes <= dim; j += kLanes) store(row + j, broadcast(0.0f));
  if (j < dim) store_n(row + j, broadcast(0.0f), dim - j);
}

struct Entries {
  int64_t first, count;
};

// What the table says of a row, as far as it lies within the table.
AEROGEL_INLINE Entries entries_of(const GatherRowsArgs& a, int64_t id) {
  const int64_t begin = a.row_ptr[id], end = a.row_ptr[id + 1];
  const int64_t first = begin < 0 ? 0 : begin, last = end > a.nonzeros ? a.nonzeros : end;
  return {first, last > first ? last - first : 0};
}

template <class Item>
AEROGEL_INLINE void fetch(const Item* first, int64_t count) {
  const char* bytes = reinterpret_cast<const char*>(first);
  __builtin_prefetch(bytes);
  // A short row often ends in the next line, where the pattern of its neighbours does not help.
  if (count * int64_t{sizeof(Item)} > kLineBytes / 4) __builtin_prefetch(bytes + kLineBytes);
}

template <class Id>
AEROGEL_INLINE bool among(const Id* ids, int64_t begin, int64_t end, int64_t rows) {
  uint64_t outside = 0;
  for (int64_t i = begin; i < end; ++i) {
    outside |= static_cast<uint64_t>(int64_t{ids[i]} < 0) | static_cast<uint64_t>(ids[i] >= rows);
  }
  return outside == 0;
}

template <class Value, class Column, class Id>
bool gather_run(const GatherRowsArgs& a, int64_t begin, int64_t end) {
  const Value* values = static_cast<const Value*>(a.values);
  const Column* columns = static_cast<const Column*>(a.columns);
  const Id* ids = static_cast<const Id*>(a.ids);
  if (!among(ids, begin, end, a.rows)) return false;
  for (int64_t i = begin; i < end && i < begin + kPointersAhead; ++i) {
    __builtin_prefetch(a.row_ptr + ids[i]);
  }
  for (int64_t i = begin; i < end; ++i) {
    if (i + kPointersAhead < end) __builtin_prefetch(a.row_ptr + ids[i + kPointersAhead]);
    if (i + kRowsAhead < end) {
      const Entries next = entries_of(a, ids[i + kRowsAhead]);
      fetch(values + next.first, next.count);
      fetch(columns + next.first, next.count);
    }
    float* row = a.out + i * a.dim;
    const Entries own = entries_of(a, ids[i]);
    clear(row, a.dim);
    fill(row, values + own.first, columns + own.first, own.count, a.dim);
  }
  return true;
}

template <class Value, class Column>
bool gather_ids(const GatherRowsArgs& a, int64_t begin, int64_t end) {
  return a.wide_ids ? gather_run<Value, Column, int64_t>(a, begin, end)
                    : gather_run<Value, Column, int32_t>(a, begin, end);
}

bool gather(const GatherRowsArgs& a, int64_t begin, int64_t end) {
  if (a.half) {
    return a.narrow ? gather_ids<uint16_t, uint8_t>(a, begin, end)
                    : gather_ids<uint16_t, int32_t>(a, begin, end);
  }
  return a.narrow ? gather_ids<float, uint8_t>(a, begin, end)
                  : gather_ids<float, int32_t>(a, begin, end);
}

int64_t above(const AboveArgs& a) {
  int64_t count = 0;
  const float* row = a.matrix;
  for (int64_t r = 0; r < a.rows; ++r, row += a.columns) {
    int32_t any = 0;  // a loop without a branch is one of registers
    for (int64_t c = 0; c < a.columns; ++c) any |= row[c] > a.limits[c] ? 1 : 0;
    if (!any) continue;
    for (int64_t c = 0; c < a.columns; ++c) {
      if (!(row[c] > a.limits[c])) continue;
      if (count < a.room) {
        a.found_rows[count] = r;
        a.found_columns[count] = c;
        a.found[count] = row[c];
      }
      ++count;
    }
  }
  return count;
}

}  // namespace

extern const GatherRowsKernels kGatherRowsKernels;
const GatherRowsKernels kGatherRowsKernels = {&gather, &above};

}  // namespace aerogel::AEROGEL_ISA
