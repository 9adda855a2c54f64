// The threshold by histograms of the keys, highest bits first: after the first of them few scores
// are left to look at.
#include "largest.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace aerogel {
namespace {

// The bucket that the `wanted`-th largest falls into; `wanted` becomes its rank there.
uint32_t bucket_of(const std::vector<uint32_t>& buckets, int64_t& wanted) {
  uint32_t bucket = static_cast<uint32_t>(buckets.size()) - 1;
  for (; wanted > int64_t{buckets[bucket]}; --bucket) wanted -= buckets[bucket];
  return bucket;
}

struct Threshold {
  uint32_t key;
  int64_t wanted, there;  // of the scores equal to it
};

Threshold threshold_of(std::vector<uint32_t> keys, int64_t wanted) {
  for (int low = 32 - kLargestBits; low > 0;) {
    const int bits = std::min(low, kLargestBits);
    low -= bits;
    std::vector<uint32_t> buckets(size_t{1} << bits);
    const auto digit = [&](uint32_t key) { return key >> low & ((1u << bits) - 1u); };
    for (const uint32_t key : keys) ++buckets[digit(key)];
    const uint32_t bucket = bucket_of(buckets, wanted);
    keys.erase(std::remove_if(keys.begin(), keys.end(),
                              [&](uint32_t key) { return digit(key) != bucket; }),
               keys.end());
  }
  return {keys.front(), wanted, static_cast<int64_t>(keys.size())};
}

}  // namespace

void largest(const LargestArgs& a) {
  if (a.count < 0 || a.count > kLargestCount || a.keep < 0) {
    throw std::invalid_argument("count=" + std::to_string(a.count) + ", keep=" +
                                std::to_string(a.keep) + ": expected 0 <= keep, count <= " +
                                std::to_string(kLargestCount));
  }
  if (a.keep == 0) {
    std::fill_n(a.mask, a.count, uint8_t{0});
    return;
  }
  const LargestKernels& kernels = *active_table().largest;
  std::vector<uint32_t> buckets(kLargestBuckets);
  kernels.histogram(a, buckets.data());
  int64_t competing = 0, wanted = a.keep;
  for (const uint32_t some : buckets) competing += some;
  if (a.keep > competing) {
    throw std::invalid_argument("keep=" + std::to_string(a.keep) + ": only " +
                                std::to_string(competing) + " entries compete");
  }
  const uint32_t bucket = bucket_of(buckets, wanted);
  std::vector<uint32_t> keys(buckets[bucket] + size_t{1});
  keys.resize(static_cast<size_t>(kernels.collect(a, bucket, keys.data())));
  const Threshold t = threshold_of(std::move(keys), wanted);
  kernels.mark(a, t.key, t.wanted, t.wanted == t.there);
}

}  // namespace aerogel
