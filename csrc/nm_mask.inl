// Choosing the n largest of m, for kTogether groups at a time: members lie one below the other, so
// that every loop runs over neighbouring groups and the compiler makes vectors of it.
//
// Scores become integers of the same order (-0 and 0 are one), which leaves a value below and one
// above all of them for entries that are taken already, and a count that is exact whatever the
// scores hold. Few entries are taken one after the other; many are ranked pair by pair.
//
// Reading order: gathering a block of groups -> deciding it -> scattering its mask.
#include "nm_mask.h"

#include <string.h>

#include "kernels.h"
#include "simd.h"

namespace aerogel::AEROGEL_ISA {
namespace {

constexpr int kTogether = 32;
constexpr int32_t kBelow = INT32_MIN, kAbove = INT32_MAX;  // of all keys

struct MaskBlock {
  alignas(64) int32_t key[kNmMaskLongest][kTogether];
  alignas(64) int32_t rank[kNmMaskLongest][kTogether];
  alignas(64) uint8_t keep[kNmMaskLongest][kTogether];
  int64_t place[kTogether];  // of each group's first member
};

// Where the next group is, without a division for each.
struct GroupWalk {
  const NmMaskTask& task;
  int64_t outer, group, inner;

  explicit GroupWalk(const NmMaskTask& t)
      : task(t),
        outer(t.begin / (t.groups * t.inner)),
        group(t.begin / t.inner % t.groups),
        inner(t.begin % t.inner) {}

  AEROGEL_INLINE int64_t next() {
    const int64_t place = outer * task.row + group * task.step + inner;
    if (++inner == task.inner) {
      inner = 0;
      if (++group == task.groups) {
        group = 0;
        ++outer;
      }
    }
    return place;
  }
};

AEROGEL_INLINE int32_t ordered(float score, int32_t counting) {
  const float value = score + 0.0f;
  int32_t bits;
  memcpy(&bits, &value, sizeof bits);
  bits &= counting;
  bits ^= bits >> 31 & INT32_MAX;
  bits = bits == kBelow ? kBelow + 1 : bits;
  return bits == kAbove ? kAbove - 1 : bits;
}

// Whether the groups follow each other without gaps.
AEROGEL_INLINE bool packed(const NmMaskTask& t, const MaskBlock& b) {
  return t.inner == 1 && b.place[kTogether - 1] == b.place[0] + (kTogether - 1) * t.m;
}

// Loops over members: kM is the length of a group where the compiler shall know it, else 0.
template <int kM>
AEROGEL_INLINE int64_t members(int64_t m) {
  return kM > 0 ? kM : m;
}

template <int kM>
AEROGEL_INLINE void gather(const NmMaskTask& t, bool neighbours, MaskBlock& b) {
  const int64_t m = members<kM>(t.m);
  if (neighbours) {
    const float* from = t.score + b.place[0];
    for (int64_t j = 0; j < m; ++j, from += t.inner) {
      for (int l = 0; l < kTogether; ++l) b.key[j][l] = ordered(from[l], t.bits);
    }
    return;
  }
  if (kM > 0 && packed(t, b)) {
    const float* from = t.score + b.place[0];
    for (int l = 0; l < kTogether; ++l) {
#pragma GCC unroll 8
      for (int j = 0; j < kM; ++j) b.key[j][l] = ordered(from[l * kM + j], t.bits);
    }
    return;
  }
  for (int l = 0; l < kTogether; ++l) {
    const float* from = t.score + b.place[l];
    for (int64_t j = 0; j < m; ++j) memcpy(&b.key[j][l], from + j * t.inner, sizeof(float));
  }
  for (int64_t j = 0; j < m; ++j) {
    for (int l = 0; l < kTogether; ++l) {
      float score;
      memcpy(&score, &b.key[j][l], sizeof score);
      b.key[j][l] = ordered(score, t.bits);
    }
  }
}

// Takes the largest (or the smallest: of equals the last) of what is left, so many times.
template <int kM, bool kLargest>
AEROGEL_INLINE void take(MaskBlock& b, int64_t rounds, int64_t longest) {
  const int64_t m = members<kM>(longest);
  constexpr int32_t kTaken = kLargest ? kBelow : kAbove;
  for (int64_t r = 0; r < rounds; ++r) {
    alignas(64) int32_t best[kTogether], where[kTogether];
    for (int l = 0; l < kTogether; ++l) {
      best[l] = kTaken;
      where[l] = 0;
    }
    for (int32_t j = 0; j < m; ++j) {
      for (int l = 0; l < kTogether; ++l) {
        const int32_t key = b.key[j][l];
        const bool better = kLargest ? key > best[l] : key < kAbove && key <= best[l];
        best[l] = better ? key : best[l];
        where[l] = better ? j : where[l];
      }
    }
    for (int32_t j = 0; j < m; ++j) {
      for (int l = 0; l < kTogether; ++l) b.key[j][l] = where[l] == j ? kTaken : b.key[j][l];
    }
  }
  for (int64_t j = 0; j < m; ++j) {
    for (int l = 0; l < kTogether; ++l) b.keep[j][l] = (b.key[j][l] == kTaken) == kLargest;
  }
}

// Rank of every member: how many others come before it.
template <int kM>
AEROGEL_INLINE void rank(MaskBlock& b, int64_t n, int64_t longest) {
  const int64_t m = members<kM>(longest);
  for (int32_t j = 0; j < m; ++j) {
    alignas(64) int32_t own[kTogether], lost[kTogether];
    for (int l = 0; l < kTogether; ++l) {
      own[l] = b.key[j][l];
      lost[l] = j;  // as if every earlier one came first
    }
    for (int32_t k = 0; k < j; ++k) {
      for (int l = 0; l < kTogether; ++l) {
        const int32_t won = own[l] > b.key[k][l];
        lost[l] -= won;
        b.rank[k][l] += won;
      }
    }
    for (int l = 0; l < kTogether; ++l) b.rank[j][l] = lost[l];
  }
  for (int64_t j = 0; j < m; ++j) {
    for (int l = 0; l < kTogether; ++l) b.keep[j][l] = b.rank[j][l] < n;
  }
}

template <int kM>
AEROGEL_INLINE void scatter(const NmMaskTask& t, bool neighbours, int count, const MaskBlock& b) {
  const int64_t m = members<kM>(t.m);
  if (neighbours) {
    uint8_t* to = t.mask + b.place[0];
    for (int64_t j = 0; j < m; ++j, to += t.inner) memcpy(to, b.keep[j], kTogether);
    return;
  }
  if (kM > 0 && count == kTogether && packed(t, b)) {
    uint8_t* to = t.mask + b.place[0];
    for (int l = 0; l < kTogether; ++l) {
#pragma GCC unroll 8
      for (int j = 0; j < kM; ++j) to[l * kM + j] = b.keep[j][l];
    }
    return;
  }
  for (int l = 0; l < count; ++l) {
    uint8_t* to = t.mask + b.place[l];
    for (int64_t j = 0; j < m; ++j) to[j * t.inner] = b.keep[j][l];
  }
}

template <int kM>
AEROGEL_NOINLINE void select_groups(const NmMaskTask& t) {
  thread_local MaskBlock b;
  GroupWalk walk(t);
  // A round costs about as much as ranking against three others.
  const bool few = 3 * t.n < t.m, almost = 3 * (t.m - t.n) < t.m;
  for (int64_t q = t.begin; q < t.end; q += kTogether) {
    const int count = t.end - q < kTogether ? static_cast<int>(t.end - q) : kTogether;
    for (int l = 0; l < kTogether; ++l) b.place[l] = l < count ? walk.next() : b.place[0];
    const bool neighbours = b.place[kTogether - 1] == b.place[0] + kTogether - 1;
    gather<kM>(t, neighbours, b);
    if (few) {
      take<kM, true>(b, t.n, t.m);
    } else if (almost) {
      take<kM, false>(b, t.m - t.n, t.m);
    } else {
      rank<kM>(b, t.n, t.m);
    }
    scatter<kM>(t, neighbours, count, b);
  }
}

void select(const NmMaskTask& t) {
  if (t.begin == t.end) return;
  if (t.m == 4) {
    select_groups<4>(t);
  } else if (t.m == 8) {
    select_groups<8>(t);
  } else {
    select_groups<0>(t);
  }
}

}  // namespace

extern const NmMaskKernels kNmMaskKernels;
const NmMaskKernels kNmMaskKernels = {&select};

}  // namespace aerogel::AEROGEL_ISA
