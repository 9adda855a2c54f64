// Three passes over the scores, none with a branch that depends on them (but for ties). Scores become
// unsigned integers of the same order.
#include "largest.h"

#include <string.h>

#include "kernels.h"
#include "simd.h"

namespace aerogel::AEROGEL_ISA {
namespace {

constexpr int kHighest = 32 - kLargestBits;
constexpr int kCounters = 4;  // scores of one bucket follow each other: one counter would be waited for

AEROGEL_INLINE uint32_t key_of(float score) {
  const float value = score + 0.0f;  // -0 and 0 are one
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits ^ ((bits >> 31 ? 0xffffffffu : 0u) | 0x80000000u);
}

template <bool kAll>
AEROGEL_INLINE uint32_t competes(const LargestArgs& a, int64_t i) {
  return kAll ? 1u : a.among[i];
}

template <bool kAll>
AEROGEL_INLINE void count(const LargestArgs& a, uint32_t* buckets) {
  static thread_local uint32_t counts[kCounters][kLargestBuckets];
  memset(counts, 0, sizeof counts);
  int64_t i = 0;
  for (; i + kCounters <= a.count; i += kCounters) {
#pragma GCC unroll 4
    for (int j = 0; j < kCounters; ++j) {
      counts[j][key_of(a.score[i + j]) >> kHighest] += competes<kAll>(a, i + j);
    }
  }
  for (; i < a.count; ++i) counts[0][key_of(a.score[i]) >> kHighest] += competes<kAll>(a, i);
  for (int64_t b = 0; b < kLargestBuckets; ++b) {
    buckets[b] = counts[0][b] + counts[1][b] + counts[2][b] + counts[3][b];
  }
}

void histogram(const LargestArgs& a, uint32_t* buckets) {
  a.among ? count<false>(a, buckets) : count<true>(a, buckets);
}

template <bool kAll>
AEROGEL_INLINE int64_t gather(const LargestArgs& a, uint32_t bucket, uint32_t* keys) {
  int64_t found = 0;
  for (int64_t i = 0; i < a.count; ++i) {
    const uint32_t key = key_of(a.score[i]);
    keys[found] = key;
    found += competes<kAll>(a, i) & static_cast<uint32_t>(key >> kHighest == bucket);
  }
  return found;
}

int64_t collect(const LargestArgs& a, uint32_t bucket, uint32_t* keys) {
  return a.among ? gather<false>(a, bucket, keys) : gather<true>(a, bucket, keys);
}

// Entries above the threshold, or from it on.
template <bool kAll, bool kEqual>
AEROGEL_INLINE void compare(const LargestArgs& a, uint32_t threshold) {
  for (int64_t i = 0; i < a.count; ++i) {
    const uint32_t key = key_of(a.score[i]);
    const bool over = kEqual ? key >= threshold : key > threshold;
    a.mask[i] = static_cast<uint8_t>(over & competes<kAll>(a, i));
  }
}

void mark(const LargestArgs& a, uint32_t threshold, int64_t ties, bool all_ties) {
  if (all_ties) return a.among ? compare<false, true>(a, threshold) : compare<true, true>(a, threshold);
  a.among ? compare<false, false>(a, threshold) : compare<true, false>(a, threshold);
  for (int64_t i = 0; ties > 0 && i < a.count; ++i) {
    if (key_of(a.score[i]) != threshold || (a.among && !a.among[i])) continue;
    a.mask[i] = 1;
    --ties;
  }
}

}  // namespace

extern const LargestKernels kLargestKernels;
const LargestKernels kLargestKernels = {&histogram, &collect, &mark};

}  // namespace aerogel::AEROGEL_ISA
