// Which n of every m consecutive scores are largest: the mask that N:M training chooses anew after
// every step. Of equals the first stays.
//
// Scores are read as [outer][m][inner]: a group is the m entries of one (outer, inner). Groups along
// the rows of a matrix have inner = 1, groups along its columns inner = columns.
#pragma once

#include <cstdint>

namespace aerogel {

constexpr int64_t kNmSelectLanes = 64;  // groups that are ranked together
constexpr int64_t kNmSelectMost = 64;   // entries of a group

struct NmSelectArgs {
  const float* score = nullptr;  // no NaN
  uint8_t* mask = nullptr;       // 1 where kept
  int64_t outer = 0, inner = 0;
  int n = 0, m = 0;
};

// All of it on `threads` threads. Throws std::invalid_argument for n or m out of range.
void nm_select_run(const NmSelectArgs& args, int threads);

// Groups [first, last) in the order of (outer, inner): what every instruction set provides.
struct NmSelectKernels {
  void (*run)(const NmSelectArgs& args, int64_t first, int64_t last);
};

}  // namespace aerogel
