// N:M weights under training: other values at other places of a packed weight, in place.
//
// Every group keeps as many entries as before, so runs, rows and sizes of the stream stay what they
// are; only its weights and offsets are written, at a small part of a product's cost.
#pragma once

#include <cstdint>

#include "spmm.h"

namespace aerogel {

// A dense weight and its mask of as many entries each: that of output r and input k is number
// r * row_step + k * column_step; one of the two steps is 1.
struct NmSource {
  const float* weight;
  const uint8_t* mask;  // 0 or 1
  int64_t row_step, column_step;
  int64_t n, m;  // kept of every m inputs; of a shorter last group n too, or all
};

// Nobody may be multiplying meanwhile. Returns false if some group of the mask does not keep just so
// many; the weight then holds nothing of use until the next call. Throws std::invalid_argument
// unless the weight packs, has single rows, whole groups in every slab, and room for just so many.
bool nm_refill(SpmmWeight& weight, const NmSource& source, int threads);

}  // namespace aerogel
