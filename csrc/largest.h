// The k largest of many scores as a mask: what masks are drawn by, and what drop and grow choose.
//
// Exact and deterministic: k entries whatever the scores hold, and of equals the first ones. -0 and 0
// are equal; NaN counts as more than infinity.
//
// Plain data and function pointers only: the files compiled once per instruction set include this one.
#pragma once

#include <stdint.h>

namespace aerogel {

constexpr int kLargestBits = 11;  // of a key that one histogram looks at
constexpr int64_t kLargestBuckets = int64_t{1} << kLargestBits;
constexpr int64_t kLargestCount = INT32_MAX;

struct LargestArgs {
  const float* score;
  const uint8_t* among;  // 1 = competes; null: all do
  uint8_t* mask;         // 1 = kept
  int64_t count, keep;   // entries; 0 <= keep <= those that compete
};

struct LargestKernels {
  // How many competing scores fall into each bucket of their keys' highest bits.
  void (*histogram)(const LargestArgs& args, uint32_t* buckets);
  // The keys of one bucket, in order; returns how many. `keys` has room for one more.
  int64_t (*collect)(const LargestArgs& args, uint32_t bucket, uint32_t* keys);
  // Keeps what is above the threshold, and the first `ties` of those equal to it.
  void (*mark)(const LargestArgs& args, uint32_t threshold, int64_t ties, bool all_ties);
};

// Throws std::invalid_argument if count is above kLargestCount or keep above what competes.
void largest(const LargestArgs& args);

}  // namespace aerogel
