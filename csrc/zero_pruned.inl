// Block by block: a loop of loads says whether a block holds anything to zero, and only then a
// second one, on what the cache has by then, writes it. Both are plain loops that the compiler makes
// vectors of.
#include "zero_pruned.h"

#include "kernels.h"
#include "simd.h"

namespace aerogel::AEROGEL_ISA {
namespace {

constexpr int64_t kWord = 32, kBlock = 8 * kWord;  // entries

// A bit each, to compare with instead of shifting: not every instruction set shifts its lanes by
// different counts.
struct SingleBits {
  uint32_t at[kWord];
  constexpr SingleBits() : at() {
    for (int64_t i = 0; i < kWord; ++i) at[i] = 1u << i;
  }
};
constexpr SingleBits kSingle;

template <class Bits>
AEROGEL_INLINE Bits kept(uint32_t word, int64_t i) {
  return (word & kSingle.at[i]) != 0 ? static_cast<Bits>(~Bits(0)) : Bits(0);
}

template <class Bits>
AEROGEL_INLINE Bits pruned_bits(const Bits* x, uint32_t word, int64_t count) {
  Bits pruned = 0;
  for (int64_t i = 0; i < count; ++i) pruned |= static_cast<Bits>(x[i] & ~kept<Bits>(word, i));
  return pruned;
}

template <class Bits>
AEROGEL_INLINE void zero_word(Bits* x, uint32_t word, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] &= kept<Bits>(word, i);
}

template <class Bits>
AEROGEL_INLINE bool zero_block(Bits* x, const uint32_t* mask) {
  Bits pruned = 0;
  for (int64_t w = 0; w < kBlock / kWord; ++w) pruned |= pruned_bits(x + w * kWord, mask[w], kWord);
  if (pruned == 0) return false;
  for (int64_t w = 0; w < kBlock / kWord; ++w) zero_word(x + w * kWord, mask[w], kWord);
  return true;
}

template <class Bits>
bool zero_entries(const ZeroPrunedArgs& a, int64_t begin, int64_t end) {
  Bits* x = static_cast<Bits*>(a.tensor);
  bool written = false;
  int64_t i = begin;
  for (; i + kBlock <= end; i += kBlock) written |= zero_block(x + i, a.mask + i / kWord);
  for (; i < end; i += kWord) {
    const int64_t count = end - i < kWord ? end - i : kWord;
    const uint32_t word = a.mask[i / kWord];
    if (pruned_bits(x + i, word, count) == 0) continue;
    zero_word(x + i, word, count);
    written = true;
  }
  return written;
}

bool zero(const ZeroPrunedArgs& a, int64_t begin, int64_t end) {
  switch (a.width) {
    case 1: return zero_entries<uint8_t>(a, begin, end);
    case 2: return zero_entries<uint16_t>(a, begin, end);
    case 4: return zero_entries<uint32_t>(a, begin, end);
    default: return zero_entries<uint64_t>(a, begin, end);
  }
}

}  // namespace

extern const ZeroPrunedKernels kZeroPrunedKernels;
const ZeroPrunedKernels kZeroPrunedKernels = {&zero};

}  // namespace aerogel::AEROGEL_ISA
