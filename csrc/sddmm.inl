// Sampled products: dot products over columns of activations, only where a weight is stored.
//
// Both operands are packed as [feature][column] for a block of columns, so that every dot product
// runs over neighbours; token-major data is transposed on the way. One row of dy meets its stored
// columns of x eight products at a time: each vector of dy is loaded once for all of them, and the
// eight sums leave the registers together. Vectors of x come from the second cache, which is the
// limit, as in the product itself.
//
// Reading order: eight products -> one block row -> one task.
#include "kernels.h"
#include "sddmm.h"
#include "sum_lanes.inl"
#include "transpose.inl"

namespace aerogel::AEROGEL_ISA {
namespace {

// Packed activations of one block of columns, features `kSddmmColumns` floats apart.
struct SddmmPanel {
  const float* dy;  // first output of the block row
  const float* x;   // first feature of the slab
  int64_t slab;     // which one that is
  int64_t vectors;
  bool first;  // writes the values instead of adding to them
};

// C stored columns x B outputs.
template <int C, int B>
AEROGEL_INLINE void products(const SddmmPanel& p, const int32_t* columns, float* values) {
  const float* x[C];
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) x[c] = p.x + (columns[c] - p.slab) * kSddmmColumns;
  Vec sums[kProducts];
#pragma GCC unroll 8
  for (int i = 0; i < kProducts; ++i) sums[i] = zero();
  const int64_t end = p.vectors * kLanes;
  for (int64_t j = 0; j < end; j += kLanes) {
    Vec dy[B];
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) dy[b] = load(p.dy + b * kSddmmColumns + j);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const Vec value = load(x[c] + j);
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) sums[c * B + b] = fma(value, dy[b], sums[c * B + b]);
    }
  }
  float total[kProducts];
  sum_lanes(sums, total);
#pragma GCC unroll 8
  for (int i = 0; i < C * B; ++i) values[i] = p.first ? total[i] : values[i] + total[i];
}

template <int B>
AEROGEL_NOINLINE void block_row(const SddmmPanel& panel, const int32_t* columns, int64_t count,
                                float* values) {
  constexpr int kColumns = kProducts / B;
  const SddmmPanel p = panel;  // a copy that stores to values cannot alias
  int64_t i = 0;
  for (; i + kColumns <= count; i += kColumns) products<kColumns, B>(p, columns + i, values + i * B);
  if constexpr (kColumns > 4) {
    if (i + 4 <= count) {
      products<4, B>(p, columns + i, values + i * B);
      i += 4;
    }
  }
  if constexpr (kColumns > 2) {
    if (i + 2 <= count) {
      products<2, B>(p, columns + i, values + i * B);
      i += 2;
    }
  }
  if (i < count) products<1, B>(p, columns + i, values + i * B);
}

// Features [first, last) of columns [begin, end) into to[feature][kSddmmColumns], zeros up to the
// next whole vector. Columns count on from image to image.
AEROGEL_NOINLINE void pack_operand(const SddmmArgs& a, const SddmmOperand& from, int64_t first,
                                   int64_t last, int64_t begin, int64_t end, float* to) {
  const int64_t width = end - begin;
  const int64_t whole = width / kLanes * kLanes;
  if (width > whole) {
    for (int64_t k = 0; k < last - first; ++k) store(to + k * kSddmmColumns + whole, zero());
  }
  if (a.tokens) {
    transpose(from.data + begin * from.row + first, from.row, to, kSddmmColumns, width,
              last - first);
    return;
  }
  for (int64_t at = begin; at < end;) {
    const int64_t image = at / a.columns, pixel = at % a.columns;
    const int64_t run = end - at < a.columns - pixel ? end - at : a.columns - pixel;
    const float* source = from.data + image * from.image + first * from.row + pixel;
    float* target = to + (at - begin);
    for (int64_t k = first; k < last; ++k) {
      __builtin_memcpy(target, source, static_cast<size_t>(run) * sizeof(float));
      source += from.row;
      target += kSddmmColumns;
    }
    at += run;
  }
}

AEROGEL_INLINE int64_t first_output(const SddmmStream& s, int64_t block_row) {
  return block_row < s.full_rows ? block_row * s.block
                                 : s.full_rows * s.block + (block_row - s.full_rows);
}

void sddmm_rows(const SddmmTask& task) {
  const SddmmArgs& a = *task.args;
  const SddmmStream& s = *task.stream;
  const int64_t output_begin = first_output(s, task.row_begin);
  const int64_t output_end = first_output(s, task.row_end);
  float* const dy = task.scratch;
  float* const x = task.scratch + (output_end - output_begin) * kSddmmColumns;
  const int64_t columns = a.batch * a.columns;
  for (int64_t begin = 0; begin < columns; begin += kSddmmColumns) {
    const int64_t end = columns - begin < kSddmmColumns ? columns : begin + kSddmmColumns;
    pack_operand(a, a.dy, output_begin, output_end, begin, end, dy);
    for (int64_t slab = 0; slab < s.slabs; ++slab) {
      const int64_t k_begin = s.slab_cols[slab];
      pack_operand(a, a.x, k_begin, s.slab_cols[slab + 1], begin, end, x);
      const int64_t* from = s.cuts + slab * s.block_rows;
      const int64_t* to = from + s.block_rows;
      SddmmPanel p{dy, x, k_begin, (end - begin + kLanes - 1) / kLanes, begin == 0};
      for (int64_t r = task.row_begin; r < task.row_end; ++r) {
        const bool full = r < s.full_rows;
        const int32_t* stored = s.columns + from[r];
        const int64_t count = to[r] - from[r];
        float* values = a.values + (full ? from[r] * s.block
                                         : from[r] + s.full_columns * (s.block - 1));
        if (!full || s.block == 1) {
          block_row<1>(p, stored, count, values);
        } else if (s.block == 2) {
          block_row<2>(p, stored, count, values);
        } else {
          block_row<4>(p, stored, count, values);
        }
        p.dy += (full ? s.block : 1) * kSddmmColumns;
      }
    }
  }
}

}  // namespace

extern const SddmmKernels kSddmmKernels;
const SddmmKernels kSddmmKernels = {&sddmm_rows};

}  // namespace aerogel::AEROGEL_ISA
