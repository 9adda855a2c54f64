// The rank of an entry is the number of entries of its group that beat it. Up to kNmSelectLanes
// groups lie side by side, entry by entry, so that every comparison of two entries is one of whole
// registers; plain loops, which compilers turn into vector code.
#include "nm_select.h"

#include <algorithm>

#include "kernels.h"
#include "simd.h"

namespace aerogel::AEROGEL_ISA {
namespace {

using Scores = float[kNmSelectLanes];
using Ranks = int32_t[kNmSelectLanes];

AEROGEL_INLINE void rank(const Scores* score, Ranks* ranks, int m) {
  for (int j = 0; j < m; ++j) {
    for (int64_t l = 0; l < kNmSelectLanes; ++l) ranks[j][l] = 0;
  }
  for (int i = 0; i < m; ++i) {
    int32_t lost[kNmSelectLanes] = {};
    for (int j = i + 1; j < m; ++j) {
      for (int64_t l = 0; l < kNmSelectLanes; ++l) {
        const int32_t wins = score[i][l] >= score[j][l] ? 1 : 0;
        ranks[j][l] += wins;
        lost[l] += wins;
      }
    }
    // Entry i loses to the later entries that it does not beat.
    for (int64_t l = 0; l < kNmSelectLanes; ++l) ranks[i][l] += m - 1 - i - lost[l];
  }
}

// `count` groups from (outer, inner) on, all of the same outer.
AEROGEL_INLINE void load_row(const NmSelectArgs& a, int64_t outer, int64_t inner, int64_t count,
                             int64_t lane, Scores* score) {
  const float* from = a.score + outer * a.m * a.inner + inner;
  for (int j = 0; j < a.m; ++j, from += a.inner) {
    for (int64_t l = 0; l < count; ++l) score[j][lane + l] = from[l];
  }
}

AEROGEL_INLINE void store_row(const NmSelectArgs& a, int64_t outer, int64_t inner, int64_t count,
                              int64_t lane, const Ranks* ranks) {
  uint8_t* to = a.mask + outer * a.m * a.inner + inner;
  for (int j = 0; j < a.m; ++j, to += a.inner) {
    for (int64_t l = 0; l < count; ++l) to[l] = ranks[j][lane + l] < a.n ? 1 : 0;
  }
}

void run(const NmSelectArgs& a, int64_t first, int64_t last) {
  alignas(64) Scores score[kNmSelectMost];
  alignas(64) Ranks ranks[kNmSelectMost];
  for (int j = 0; j < a.m; ++j) std::fill(score[j], score[j] + kNmSelectLanes, 0.0f);
  for (int64_t group = first; group < last; group += kNmSelectLanes) {
    const int64_t lanes = std::min(kNmSelectLanes, last - group);
    const auto each_row = [&](auto&& body) {
      for (int64_t lane = 0; lane < lanes;) {
        const int64_t outer = (group + lane) / a.inner, inner = (group + lane) % a.inner;
        const int64_t count = std::min(lanes - lane, a.inner - inner);
        body(outer, inner, count, lane);
        lane += count;
      }
    };
    if (a.inner == 1) {
      const float* from = a.score + group * a.m;
      for (int64_t l = 0; l < lanes; ++l) {
        for (int j = 0; j < a.m; ++j) score[j][l] = from[l * a.m + j];
      }
    } else {
      each_row([&](int64_t outer, int64_t inner, int64_t count, int64_t lane) {
        load_row(a, outer, inner, count, lane, score);
      });
    }
    rank(score, ranks, a.m);
    if (a.inner == 1) {
      uint8_t* to = a.mask + group * a.m;
      for (int64_t l = 0; l < lanes; ++l) {
        for (int j = 0; j < a.m; ++j) to[l * a.m + j] = ranks[j][l] < a.n ? 1 : 0;
      }
    } else {
      each_row([&](int64_t outer, int64_t inner, int64_t count, int64_t lane) {
        store_row(a, outer, inner, count, lane, ranks);
      });
    }
  }
}

}  // namespace

extern const NmSelectKernels kNmSelectKernels;
const NmSelectKernels kNmSelectKernels = {&run};

}  // namespace aerogel::AEROGEL_ISA
