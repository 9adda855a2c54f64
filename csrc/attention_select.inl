// Body of attention_select.h for one instruction set.
#include "attention_select.h"

#include "attention.h"
#include "kernels.h"
#include "simd_math.h"
#include "stored_values.inl"
#include "sum_lanes.inl"

#include "attention_simd.inl"
#include "attention_labels.inl"

namespace aerogel::AEROGEL_ISA {
namespace {

// --- The largest --------------------------------------------------------------------------------

// Ranks are integers in the order of the scores: -0 is 0, NaN is above all.
constexpr int32_t kNever = INT32_MIN;             // below every score
constexpr int32_t kRankOfMinusInf = -2139095041;  // 0x807fffff

AEROGEL_INLINE int32_t rank_of(float x) {
  const float plain = x + 0.0f;
  int32_t bits;
  __builtin_memcpy(&bits, &plain, sizeof bits);
  const int32_t rank = bits ^ (bits >> 31 & INT32_MAX);
  return x == x ? rank : INT32_MAX;
}

// Scores become their ranks, in place.
AEROGEL_NOINLINE void rank_scores(float* scores, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const int32_t rank = rank_of(scores[i]);
    __builtin_memcpy(scores + i, &rank, sizeof rank);
  }
}

// Bit i: whether ranks[i] is at least `bound`, of sixteen.
#if defined(AEROGEL_USE_AVX512)
AEROGEL_INLINE uint32_t at_least(const int32_t* ranks, int32_t bound) {
  return _mm512_cmpge_epi32_mask(_mm512_loadu_si512(ranks), _mm512_set1_epi32(bound));
}
#elif defined(AEROGEL_USE_AVX2)
AEROGEL_INLINE uint32_t below_eight(const int32_t* ranks, int32_t bound) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(ranks));
  const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(bound), x);
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(below)));
}
AEROGEL_INLINE uint32_t at_least(const int32_t* ranks, int32_t bound) {
  return ~(below_eight(ranks, bound) | below_eight(ranks + 8, bound) << 8) & 0xffffu;
}
#else
AEROGEL_INLINE uint32_t at_least(const int32_t* ranks, int32_t bound) {
  uint32_t bits = 0;
  for (int i = 0; i < 16; ++i) bits |= static_cast<uint32_t>(ranks[i] >= bound) << i;
  return bits;
}
#endif

// Entries of sixteen whose bits are set move to `to`, and so do the numbers of their places from `at`
// on; there is room for sixteen. Without branches where registers can be compressed: whether an entry
// is among the largest is beyond any prediction.
#if defined(AEROGEL_USE_AVX512)
AEROGEL_INLINE void pack_marked(const int32_t* from, uint32_t bits, int32_t* to) {
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits),
                                                      _mm512_loadu_si512(from)));
}
AEROGEL_INLINE void pack_places(int64_t at, uint32_t bits, int32_t* to) {
  const __m512i sixteen = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i places = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int32_t>(at)), sixteen);
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), places));
}
#else
AEROGEL_INLINE void pack_marked(const int32_t* from, uint32_t bits, int32_t* to) {
  for (; bits; bits &= bits - 1) *to++ = from[__builtin_ctz(bits)];
}
AEROGEL_INLINE void pack_places(int64_t at, uint32_t bits, int32_t* to) {
  for (; bits; bits &= bits - 1) *to++ = static_cast<int32_t>(at + __builtin_ctz(bits));
}
#endif

// For which bit by bit is faster than bins, whose clearing and searching does not depend on n.
constexpr int64_t kFewRanks = 1024;

AEROGEL_INLINE int32_t least_from(const int32_t* ranks, int64_t n, int32_t bound) {
  int32_t least = INT32_MAX;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t rank = ranks[i] >= bound ? ranks[i] : INT32_MAX;
    least = rank < least ? rank : least;
  }
  return least;
}

// The k-th largest of n ranks bit by bit.
AEROGEL_NOINLINE int32_t kth_of_few(const int32_t* ranks, int64_t n, int64_t k) {
  uint32_t found = 0;
  for (int bit = 31; bit >= 0; --bit) {
    const uint32_t more = found | 1u << bit;
    const int32_t bound = static_cast<int32_t>(more ^ 0x80000000u);
    int32_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += ranks[i] >= bound;
    if (count == k) return least_from(ranks, n, bound);
    if (count > k) found = more;
  }
  return static_cast<int32_t>(found ^ 0x80000000u);
}

// The k-th largest of n ranks, 1 <= k <= n, by 11, 11 and 10 bits; those that share the leading bits
// move into `left`.
AEROGEL_NOINLINE int32_t kth_largest(int32_t* ranks, int64_t n, int64_t k, int32_t* left) {
  if (n <= kFewRanks) return kth_of_few(ranks, n, k);
  constexpr int kShifts[] = {21, 10, 0}, kBins[] = {2048, 2048, 1024};
  uint32_t found = 0;
  for (int level = 0; level < 3; ++level) {
    const int shift = kShifts[level];
    const uint32_t mask = static_cast<uint32_t>(kBins[level] - 1);
    uint32_t bins[2048] = {};
    uint32_t most = 0;
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t bin = (static_cast<uint32_t>(ranks[i]) ^ 0x80000000u) >> shift & mask;
      most = bin > most ? bin : most;
      ++bins[bin];
    }
    uint32_t bin = most;
    for (; bins[bin] < k; --bin) k -= bins[bin];
    found |= bin << shift;
    if (shift == 0) break;
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int32_t rank = ranks[i];
      left[kept] = rank;
      kept += ((static_cast<uint32_t>(rank) ^ 0x80000000u) >> shift & mask) == bin;
    }
    if (kept == 1) return left[0];
    ranks = left;
    n = kept;
  }
  return static_cast<int32_t>(found ^ 0x80000000u);
}

// The largest rank of each of `groups` groups: entries g, g + groups and so on belong together.
AEROGEL_NOINLINE void group_maxima(const int32_t* ranks, int64_t groups, int64_t size,
                                   int32_t* maxima) {
  for (int64_t g = 0; g < groups; ++g) maxima[g] = ranks[g];
  for (int64_t i = 1; i < size; ++i) {
    const int32_t* const row = ranks + i * groups;
    for (int64_t g = 0; g < groups; ++g) maxima[g] = row[g] > maxima[g] ? row[g] : maxima[g];
  }
}

// Places of the k largest of n ranks, 1 <= k <= n, ascending; ranks[n .. n + kRankPad) become kNever.
// The k-th largest of the maxima of groups bounds the k-th largest entry from below, so that few
// entries need a closer look. There is room for kRankPad more places. Returns the k-th largest.
AEROGEL_NOINLINE int32_t largest_places(int32_t* ranks, int64_t n, int64_t k, int32_t* scratch,
                                        int32_t* places) {
  for (int64_t i = 0; i < kRankPad; ++i) ranks[n + i] = kNever;
  const int64_t size = n >= 32 * k ? 16 : n >= 8 * k ? 4 : 1, groups = (n + size - 1) / size;
  int32_t* const maxima = scratch;
  int32_t* const left = maxima + n + 256;
  int32_t* const found = left + n + 256;
  int32_t* const place = found + n + 256;
  int32_t* best = ranks;
  if (size > 1) {
    group_maxima(ranks, groups, size, maxima);
    best = maxima;
  }
  const int32_t bound = kth_largest(best, groups, k, left);
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const uint32_t bits = at_least(ranks + i, bound);
    pack_marked(ranks + i, bits, found + count);
    pack_places(i, bits, place + count);
    count += __builtin_popcount(bits);
  }
  const int32_t least = size > 1 ? kth_largest(found, count, k, left) : bound;
  for (int64_t i = 0; i < 16; ++i) found[count + i] = kNever;
  int32_t enough = 0, above = 0;
  for (int64_t i = 0; i < count; ++i) {
    enough += found[i] >= least;
    above += found[i] > least;
  }
  int64_t taken = 0;
  if (enough == k && least > kNever) {
    for (int64_t i = 0; i < count; i += 16) {
      const uint32_t bits = at_least(found + i, least);
      pack_marked(place + i, bits, places + taken);
      taken += __builtin_popcount(bits);
    }
    return least;
  }
  for (int64_t i = 0, tied = k - above; i < count && taken < k; ++i) {
    const bool tie = found[i] == least && tied > 0;
    places[taken] = place[i];
    taken += found[i] > least || tie;
    tied -= tie;
  }
  return least;
}

int64_t largest_task(const RankTask& t) {
  int32_t* const ranks = reinterpret_cast<int32_t*>(t.scores);
  rank_scores(t.scores, t.n);
  const int32_t floor = t.finite ? kRankOfMinusInf : kNever;
  const auto keep = [&](int64_t place, int64_t count) {
    t.keys[count] = t.first + static_cast<int32_t>(place);
    return count + (ranks[place] > floor);
  };
  int64_t count = 0;
  if (t.count * t.run >= t.n) {
    for (int64_t i = 0; i < t.n; ++i) count = keep(i, count);
    return count;
  }
  if (t.run == 1) {
    int32_t* const places = t.scratch + rank_scratch(t.n);
    const int32_t least = largest_places(ranks, t.n, t.count, t.scratch, places);
    if (least > floor) {  // so are all of them
      for (int64_t i = 0; i < t.count; ++i) t.keys[i] = t.first + places[i];
      return t.count;
    }
    for (int64_t i = 0; i < t.count; ++i) count = keep(places[i], count);
    return count;
  }
  const int64_t runs = (t.n + t.run - 1) / t.run;
  int32_t* const best = t.scratch;
  int32_t* const places = t.scratch + rank_scratch(t.n);
  for (int64_t r = 0; r < runs; ++r) {
    const int64_t end = (r + 1) * t.run < t.n ? (r + 1) * t.run : t.n;
    int32_t most = kNever;
    for (int64_t i = r * t.run; i < end; ++i) most = ranks[i] > most ? ranks[i] : most;
    best[r] = most;
  }
  largest_places(best, runs, t.count, t.scratch + runs + kRankPad, places);
  for (int64_t p = 0; p < t.count; ++p) {
    const int64_t begin = places[p] * t.run;
    for (int64_t i = begin; i < begin + t.run && i < t.n; ++i) count = keep(i, count);
  }
  return count;
}

// --- Pools --------------------------------------------------------------------------------------

// Rows fetched into the second cache, beyond the block and at last beyond the tensor too, where a
// prefetch does nothing.
constexpr int64_t kPoolRowsAhead = 24;

template <class Values, int V>
AEROGEL_INLINE void pool_columns(const PoolTask& t, int64_t first) {
  const auto* row = static_cast<const typename Values::Stored*>(t.rows) + first;
  const int64_t left = t.dim - first;
  Vec most[V], least[V], sum[V];
  for (int v = 0; v < V; ++v) {
    most[v] = broadcast(-kInfinity);
    least[v] = broadcast(kInfinity);
    sum[v] = zero();
  }
  for (int64_t i = 0; i < t.count; ++i, row += t.stride) {
    const char* const ahead = reinterpret_cast<const char*>(row + kPoolRowsAhead * t.stride);
    constexpr int64_t kBytes = V * kLanes * sizeof *row;
#pragma GCC unroll 4
    for (int64_t at = 0; at < kBytes; at += 64) __builtin_prefetch(ahead + at, 0, 2);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Vec x = V == 1 ? load_row<Values>(row, left) : Values::load(row + v * kLanes);
      most[v] = max(most[v], x);
      least[v] = min(least[v], x);
      sum[v] = add(sum[v], x);
    }
  }
  const Vec count = broadcast(static_cast<float>(t.count));
  for (int v = 0; v < V; ++v) {
    const int64_t at = first + v * kLanes, n = t.dim - at;
    if (t.most) store_upto(t.most + at, most[v], n);
    if (t.least) store_upto(t.least + at, least[v], n);
    if (t.mean) store_upto(t.mean + at, div(sum[v], count), n);
  }
}

template <class Values>
AEROGEL_INLINE void pool_block(const PoolTask& t) {
  int64_t d = 0;
  for (; d + 4 * kLanes <= t.dim; d += 4 * kLanes) pool_columns<Values, 4>(t, d);
  for (; d < t.dim; d += kLanes) pool_columns<Values, 1>(t, d);
}

void pool_task(const PoolTask& t) {
  switch (static_cast<AttendType>(t.type)) {
    case AttendType::kFloat32: return pool_block<Float32Values>(t);
    case AttendType::kBfloat16: return pool_block<Bfloat16Values>(t);
    case AttendType::kFloat16: return pool_block<Float16Values>(t);
  }
}

}  // namespace

extern const SelectKernels kSelectKernels;
const SelectKernels kSelectKernels = {&score_task, &largest_task, &pool_task};

}  // namespace aerogel::AEROGEL_ISA
