// The n largest of every m neighbours along one axis: the masks of N:M training, chosen anew from
// every weight after every step.
//
// Exact and deterministic: every group keeps n entries (all of a shorter last one, if it has fewer),
// and of equals the first ones.
//
// Plain data and function pointers only: the files compiled once per instruction set include this one.
#pragma once

#include <stdint.h>

namespace aerogel {

constexpr int64_t kNmMaskLongest = 64;  // entries of a group

// [outer][length][inner], contiguous; groups are cut along `length`.
struct NmMaskArgs {
  const float* score;
  uint8_t* mask;  // 1 = kept
  int64_t outer, length, inner;
  int64_t n, m;
  bool magnitude;  // the largest magnitudes instead
};

// Groups of one length, numbered in the order [outer][groups][inner]; those from begin to end.
struct NmMaskTask {
  const float* score;  // of group 0
  uint8_t* mask;
  int64_t row, step, inner;  // entries from one outer index, group and group member to the next
  int64_t groups;            // of one outer index
  int64_t n, m;
  int32_t bits;  // of a score that count: all, or all but the sign
  int64_t begin, end;
};

struct NmMaskKernels {
  void (*select)(const NmMaskTask& task);
};

// Throws std::invalid_argument unless 1 <= n <= m <= kNmMaskLongest and sizes are not negative.
void nm_mask(const NmMaskArgs& args, int threads);

}  // namespace aerogel
