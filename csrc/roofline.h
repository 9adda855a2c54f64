// Micro-benchmarks of the two limits a kernel can hit: multiply-adds and loads.
#pragma once

#include <cstdint>

namespace aerogel {

struct RooflineKernels {
  // `rounds` rounds of independent FMAs; returns the number of floating point operations done.
  int64_t (*fma)(int64_t rounds, float* sink);
  // Reads `floats` floats (a multiple of 128, 64-byte aligned) `rounds` times.
  void (*load)(const float* p, int64_t floats, int64_t rounds, float* sink);
};

}  // namespace aerogel
