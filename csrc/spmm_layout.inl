// Slabs of activations into aligned scratch and finished tiles out of it: [k][stride] planes, with
// the columns of one register tile side by side. Token-major data is transposed on the way.
#pragma once

#include "simd_math.h"
#include "spmm.h"
#include "transpose.inl"

namespace aerogel::AEROGEL_ISA {
namespace {

// Columns [first, first + width) of the activations.
struct Columns {
  int64_t first, width;
};

// Activation rows [k_begin, k_end) of these columns into scratch[k][stride]. Columns up to the next
// whole vector are zeroed: the kernels load them.
AEROGEL_NOINLINE void pack_slab(const SpmmPanel& p, Columns columns, int64_t k_begin, int64_t k_end,
                                int64_t stride, float* scratch) {
  const int64_t ldx = p.args->ldx;
  const int64_t width = columns.width;
  const int64_t whole = width / kLanes * kLanes;
  if (p.args->tokens) {
    if (width > whole) {
      for (int64_t k = k_begin; k < k_end; ++k) store(scratch + k * stride + whole, zero());
    }
    transpose(p.x + columns.first * ldx + k_begin, ldx, scratch + k_begin * stride, stride, width,
              k_end - k_begin);
    return;
  }
  for (int64_t k = k_begin; k < k_end; ++k) {
    const float* from = p.x + k * ldx + columns.first;
    float* to = scratch + k * stride;
    for (int64_t j = 0; j < whole; j += kLanes) store(to + j, load(from + j));
    if (width > whole) store(to + whole, load_n(from + whole, width - whole));
  }
}

// Output rows [row_begin, row_end) of these tokens from scratch[row][stride] to y[token][row], with
// the epilogue.
AEROGEL_NOINLINE void unpack_tile(const SpmmPanel& p, Columns tokens, int64_t row_begin,
                                  int64_t row_end, int64_t stride, const float* scratch) {
  const SpmmArgs& a = *p.args;
  float* y = p.y + tokens.first * a.ldy;
  transpose(scratch, stride, y + row_begin, a.ldy, row_end - row_begin, tokens.width);
  if (a.activation == Activation::kNone && !p.residual) return;
  for (int64_t t = 0; t < tokens.width; ++t) {
    const float* r = p.residual ? p.residual + (tokens.first + t) * a.ldr : nullptr;
    for (int64_t j = row_begin; j < row_end; j += kLanes) {
      const int64_t n = row_end - j;
      Vec v = load_upto(y + t * a.ldy + j, n);
      if (r) v = add(v, load_upto(r + j, n));
      store_upto(y + t * a.ldy + j, activate(v, a.activation), n);
    }
  }
}

}  // namespace
}  // namespace aerogel::AEROGEL_ISA
