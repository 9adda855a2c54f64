// Zeroing the pruned entries of a weight, its gradient or its optimizer state by a mask.
//
// The mask is a bit per entry, so that hardly anything is read beside the tensor. Memory is written
// only where a pruned entry holds something else than +0: a pass over what is masked already costs
// one reading.
//
// Plain data and function pointers only: the files compiled once per instruction set include this one.
#pragma once

#include <stdint.h>

namespace aerogel {

struct ZeroPrunedArgs {
  void* tensor;
  const uint32_t* mask;  // entry i: bit i % 32 of word i / 32; 1 = kept
  int64_t count;         // entries
  int width;             // bytes of an entry: 1, 2, 4 or 8
};

struct ZeroPrunedKernels {
  // Entries from begin, a multiple of 32, to end; whether any was written.
  bool (*zero)(const ZeroPrunedArgs& args, int64_t begin, int64_t end);
};

// Whether any entry was written. Throws std::invalid_argument for another width.
bool zero_pruned(const ZeroPrunedArgs& args, int threads);

}  // namespace aerogel
