// Choosing and packing one way of a tile. The lanes of a vector are outputs; where these lie one
// below the other, the tile is transposed first. An entry is its magnitude as an integer, which
// orders as the float does, and a tag: its place in the group, and its sign.
//
// The n largest of a group are found in one walk that keeps them in order of their places, as they
// are stored: of the n so far and the next one, the smallest leaves and all behind it move up.
//
// A given mask makes magnitudes of what it keeps larger by one, and all others 0: the n largest are
// then what it keeps, if it keeps n.
//
// Reading order: one group of one vector of outputs -> its mask -> all groups of these outputs ->
// the tile.
#include "nm_pack.h"

#include <string.h>

#include "kernels.h"
#include "simd.h"
#include "transpose.inl"

namespace aerogel::AEROGEL_ISA {
namespace {

using Ints = int32_t __attribute__((vector_size(kLanes * 4)));
using Words = uint32_t __attribute__((vector_size(kLanes * 4)));
using Bytes = uint8_t __attribute__((vector_size(kLanes)));

constexpr int32_t kMagnitude = INT32_MAX;
// Of a transposed tile: whole vectors load.
constexpr int64_t kTileStep = kNmPackTransposed + kLanes;
constexpr int64_t kMarkedStep = kNmPackOutputs > kNmPackInputs ? kNmPackOutputs : kNmPackInputs;

struct PackScratch {
  alignas(64) float tile[kNmPackInputs * kTileStep];
  alignas(64) float marked[kMarkedStep * kMarkedStep + kLanes];
  // What a vector of outputs keeps: [step][lane].
  alignas(64) int32_t weights[kNmPackInputs * kLanes];
  alignas(64) int32_t offsets[kNmPackInputs * kLanes];
};

// The eight entries of a mask that a byte of bits stands for.
struct BitsToBytes {
  uint64_t word[256];
  constexpr BitsToBytes() : word() {
    for (int b = 0; b < 256; ++b) {
      for (int i = 0; i < 8; ++i) word[b] |= static_cast<uint64_t>(b >> i & 1) << (8 * i);
    }
  }
};
constexpr BitsToBytes kBitsToBytes;

// What a group keeps, in order of places.
template <int kN>
struct Kept {
  Ints magnitude[kN], tag[kN];
};

AEROGEL_INLINE void load_entries(const float* from, Ints& bits) {
  memcpy(&bits, from, sizeof bits);
}

// kM is the length of the group where the compiler shall know it, else 0.
template <int kN, int kM>
AEROGEL_INLINE void choose(const float* from, int64_t step, int64_t longest, Kept<kN>& kept) {
  const int64_t m = kM > 0 ? kM : longest;
#pragma GCC unroll 4
  for (int j = 0; j < kN; ++j) {
    Ints bits;
    load_entries(from + j * step, bits);
    kept.magnitude[j] = bits & kMagnitude;
    kept.tag[j] = (bits & ~kMagnitude) | j;
  }
  const auto see = [&](int32_t j) {
    Ints bits;
    load_entries(from + j * step, bits);
    const Ints next = bits & kMagnitude, tag = (bits & ~kMagnitude) | j;
    Ints least[kN + 1];  // from an entry on
    least[kN] = next;
#pragma GCC unroll 4
    for (int i = kN - 1; i >= 0; --i) {
      least[i] = kept.magnitude[i] < least[i + 1] ? kept.magnitude[i] : least[i + 1];
    }
#pragma GCC unroll 4
    for (int i = 0; i < kN; ++i) {  // whether the last of the smallest is not behind entry i
      const Ints moves = least[i + 1] > least[0];
      kept.magnitude[i] = moves ? (i + 1 < kN ? kept.magnitude[i + 1 < kN ? i + 1 : 0] : next)
                                : kept.magnitude[i];
      kept.tag[i] = moves ? (i + 1 < kN ? kept.tag[i + 1 < kN ? i + 1 : 0] : tag) : kept.tag[i];
    }
  };
  if constexpr (kM > 0) {
#pragma GCC unroll 16
    for (int32_t j = kN; j < kM; ++j) see(j);
  } else {
    for (int32_t j = kN; j < m; ++j) see(j);
  }
}

// The mask of one group of a vector of outputs.
template <int kM>
AEROGEL_INLINE void write_mask(const NmPackTask& t, int64_t output, int64_t input, int64_t lanes,
                               const Ints& bits) {
  const int64_t m = kM > 0 ? kM : t.m;
  if (t.neighbours) {
    uint8_t* to = t.mask + input * t.ld + output;
    for (int32_t j = 0; j < m; ++j, to += t.ld) {
      const Bytes bytes = __builtin_convertvector(bits >> j & 1, Bytes);
      if (lanes == kLanes) {
        memcpy(to, &bytes, kLanes);
      } else {
        memcpy(to, &bytes, static_cast<size_t>(lanes));
      }
    }
    return;
  }
  alignas(64) uint32_t all[kLanes];
  memcpy(all, &bits, sizeof all);
  uint8_t* to = t.mask + output * t.ld + input;
  for (int64_t l = 0; l < lanes; ++l, to += t.ld) {
    for (int64_t j = 0; j < m; j += 8) {
      const uint64_t* word = &kBitsToBytes.word[all[l] >> j & 255];
      if (m - j >= 8) {
        memcpy(to + j, word, 8);
      } else {
        memcpy(to + j, word, static_cast<size_t>(m - j));
      }
    }
  }
}

// A vector of outputs of a tile.
struct Vector {
  const float* from;  // their first entries
  int64_t step;       // from one input to the next
  int64_t output, lanes;
};

// Everything but the packed form of a vector's outputs, which is left in scratch.
template <int kN, int kM>
AEROGEL_INLINE bool choose_groups(const NmPackTask& t, const Vector& v, PackScratch& scratch) {
  const int64_t m = kM > 0 ? kM : t.m;
  const bool write = t.mask && !t.given;
  const Ints one = Ints{} + 1, size = Ints{} + t.row_bytes;
  Ints lowest = Ints{} + kMagnitude;
  int32_t* weights = scratch.weights;
  int32_t* offsets = scratch.offsets;
  for (int64_t input = 0; input < t.inputs; input += m) {
    Kept<kN> kept;
    choose<kN, kM>(v.from + input * v.step, v.step, m, kept);
    Ints bits{};
#pragma GCC unroll 4
    for (int i = 0; i < kN; ++i) {
      const Ints place = kept.tag[i] & kMagnitude;
      if (t.given) {
        lowest = kept.magnitude[i] < lowest ? kept.magnitude[i] : lowest;
        kept.magnitude[i] -= 1;
      }
      bits |= one << place;
      const Ints weight = kept.magnitude[i] | (kept.tag[i] & ~kMagnitude);
      const Ints offset = (place + (t.input + static_cast<int32_t>(input))) * size;
      memcpy(weights, &weight, sizeof weight);
      memcpy(offsets, &offset, sizeof offset);
      weights += kLanes;
      offsets += kLanes;
    }
    if (write) write_mask<kM>(t, v.output, input, v.lanes, bits);
  }
  alignas(64) int32_t all[kLanes];
  memcpy(all, &lowest, sizeof all);
  bool fits = true;
  for (int64_t l = 0; l < v.lanes; ++l) fits &= all[l] > 0;
  return fits;
}

// The same for any n, one output after the other: the largest that is left, n times.
AEROGEL_NOINLINE bool choose_many(const NmPackTask& t, const Vector& v, PackScratch& scratch) {
  bool fits = true;
  for (int64_t l = 0; l < v.lanes; ++l) {
    int32_t* weights = scratch.weights + l;
    int32_t* offsets = scratch.offsets + l;
    for (int64_t input = 0; input < t.inputs; input += t.m) {
      int32_t entries[kNmPackLongest];
      for (int64_t j = 0; j < t.m; ++j) {
        memcpy(&entries[j], v.from + (input + j) * v.step + l, sizeof(int32_t));
      }
      uint32_t bits = 0;
      for (int64_t i = 0; i < t.n; ++i) {
        int64_t best = -1;
        for (int64_t j = 0; j < t.m; ++j) {
          const bool left = !(bits >> j & 1);
          if (left && (best < 0 || (entries[j] & kMagnitude) > (entries[best] & kMagnitude))) {
            best = j;
          }
        }
        bits |= 1u << best;
      }
      for (int64_t j = 0; j < t.m; ++j) {
        if (bits >> j & 1) {
          fits &= !t.given || (entries[j] & kMagnitude) > 0;
          *weights = entries[j] - t.given;
          *offsets = (t.input + static_cast<int32_t>(input + j)) * t.row_bytes;
          weights += kLanes;
          offsets += kLanes;
        }
        if (t.mask && !t.given) {
          t.mask[t.neighbours ? (input + j) * t.ld + v.output + l
                              : (v.output + l) * t.ld + input + j] = bits >> j & 1;
        }
      }
    }
  }
  return fits;
}

template <int kM>
AEROGEL_NOINLINE bool choose_kept(const NmPackTask& t, const Vector& v, PackScratch& scratch) {
  switch (t.n) {
    case 1: return choose_groups<1, kM>(t, v, scratch);
    case 2: return choose_groups<2, kM>(t, v, scratch);
    case 3: return choose_groups<3, kM>(t, v, scratch);
    case 4: return choose_groups<4, kM>(t, v, scratch);
  }
  return choose_many(t, v, scratch);
}

AEROGEL_INLINE bool choose_vector(const NmPackTask& t, const Vector& v, PackScratch& scratch) {
  switch (t.m) {
    case 4: return choose_kept<4>(t, v, scratch);
    case 8: return choose_kept<8>(t, v, scratch);
    case 16: return choose_kept<16>(t, v, scratch);
  }
  return choose_kept<0>(t, v, scratch);
}

// From scratch to a stream: kCount outputs, 0 for any number.
template <int kCount>
AEROGEL_INLINE void put_steps(const NmPackLanes& to, const PackScratch& from, int64_t lane,
                              int64_t steps) {
  const auto size = static_cast<size_t>(kCount > 0 ? kCount : to.count) * 4;
  const int64_t stride = to.stride;
  float* weights = to.weights;
  for (int64_t s = 0; s < steps; ++s, weights += stride) {
    memcpy(weights, from.weights + s * kLanes + lane, size);
  }
  int32_t* offsets = to.offsets;
  for (int64_t s = 0; s < steps; ++s, offsets += stride) {
    memcpy(offsets, from.offsets + s * kLanes + lane, size);
  }
}

AEROGEL_INLINE void put_piece(const NmPackLanes& to, const PackScratch& from, int64_t lane,
                        int64_t steps) {
  switch (to.count) {
    case 2: return put_steps<2>(to, from, lane, steps);
    case 4: return put_steps<4>(to, from, lane, steps);
    case 6: return put_steps<6>(to, from, lane, steps);
    case 8: return put_steps<8>(to, from, lane, steps);
  }
  put_steps<0>(to, from, lane, steps);
}

constexpr int kPair = 2, kPairs = kLanes / kPair;

template <int... kI>
struct Lanes {};
template <int kCount, int... kI>
struct CountLanes : CountLanes<kCount - 1, kCount - 1, kI...> {};
template <int... kI>
struct CountLanes<0, kI...> {
  using Type = Lanes<kI...>;
};

// Every second unit of kUnit lanes of a changes places with the one before it of b.
template <int kUnit, int... kI>
AEROGEL_INLINE void exchange(Ints& a, Ints& b, Lanes<kI...>) {
  const Ints first = __builtin_shufflevector(a, b, (kI & kUnit ? kLanes + kI - kUnit : kI)...);
  b = __builtin_shufflevector(a, b, (kI & kUnit ? kLanes + kI : kI + kUnit)...);
  a = first;
}

// Transposes pairs of lanes: of vectors of one step each, of all pairs, to one pair's steps each.
template <int kUnit = kPair>
AEROGEL_INLINE void turn_pairs(Ints* v) {
#pragma GCC unroll 8
  for (int i = 0; i < kPairs; ++i) {
    if (!(i & kUnit / kPair)) {
      exchange<kUnit>(v[i], v[i + kUnit / kPair], typename CountLanes<kLanes>::Type{});
    }
  }
  if constexpr (kUnit * 2 < kLanes) turn_pairs<kUnit * 2>(v);
}

template <typename Start>
AEROGEL_INLINE void put_pairs_to(Start start, const int32_t* from, int64_t steps) {
  int64_t s = 0;
  for (; s + kPairs <= steps; s += kPairs, from += kPairs * kLanes) {
    Ints v[kPairs];
    memcpy(v, from, sizeof v);
    turn_pairs(v);
#pragma GCC unroll 8
    for (int p = 0; p < kPairs; ++p) memcpy(start(p) + s * kPair, &v[p], sizeof v[p]);
  }
  for (; s < steps; ++s, from += kLanes) {
    for (int p = 0; p < kPairs; ++p) memcpy(start(p) + s * kPair, from + p * kPair, kPair * 4);
  }
}

// A vector of outputs whose pieces are pairs without gaps between steps. A pair is so short that
// storing step by step takes a sixth of the whole pass more.
AEROGEL_NOINLINE void put_pairs(const NmPackLanes* to, const PackScratch& from, int64_t steps) {
  put_pairs_to([&](int p) { return to[p].weights; }, from.weights, steps);
  put_pairs_to([&](int p) { return to[p].offsets; }, from.offsets, steps);
}

// The pieces of one vector of outputs.
AEROGEL_INLINE void put(const NmPackLanes* to, const PackScratch& from, int64_t pieces,
                        int64_t steps) {
  bool pairs = pieces == kPairs;
  for (int64_t p = 0; p < pieces; ++p) pairs &= to[p].count == kPair && to[p].stride == kPair;
  if (pairs) return put_pairs(to, from, steps);
  for (int64_t p = 0, lane = 0; p < pieces; lane += to[p++].count) {
    put_piece(to[p], from, lane, steps);
  }
}

// A copy of the tile where what a mask keeps is larger by one; false if it keeps too many or few.
AEROGEL_NOINLINE bool mark_given(const NmPackTask& t, float* to) {
  const int64_t rows = t.neighbours ? t.inputs : t.outputs;
  const int64_t cols = t.neighbours ? t.outputs : t.inputs;
  Ints count{};
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; c += kLanes) {
      const int64_t at = r * t.ld + c, left = cols - c;
      Ints bits{};
      Bytes keep{};
      if (left >= kLanes) {
        memcpy(&bits, t.weight + at, sizeof bits);
        memcpy(&keep, t.mask + at, sizeof keep);
      } else {
        memcpy(&bits, t.weight + at, static_cast<size_t>(left) * 4);
        memcpy(&keep, t.mask + at, static_cast<size_t>(left));
      }
      const Ints kept = __builtin_convertvector(keep, Ints);
      count += kept;
      // Unsigned: a NaN of all ones overflows to an entry that is not kept.
      const Words larger = __builtin_convertvector(bits, Words) + 1u;
      bits = __builtin_convertvector(larger, Ints) & -kept;
      memcpy(to + r * kMarkedStep + c, &bits, sizeof bits);
    }
  }
  int64_t sum = 0;
  for (int l = 0; l < kLanes; ++l) sum += count[l];
  return sum == t.outputs * (t.inputs / t.m) * t.n;
}

bool pack(const NmPackTask& t) {
  thread_local PackScratch scratch;
  const float* from = t.weight;
  int64_t ld = t.ld, readable = t.readable;
  if (t.given) {
    if (!mark_given(t, scratch.marked)) return false;
    from = scratch.marked;
    ld = kMarkedStep;
    readable = kMarkedStep + kLanes;
  }
  if (!t.neighbours) {
    transpose(from, ld, scratch.tile, kTileStep, t.outputs, t.inputs);
    from = scratch.tile;
    ld = kTileStep;
    readable = kTileStep;
  }
  const int64_t steps = t.inputs / t.m * t.n;
  const NmPackLanes* next = t.lanes;
  for (int64_t output = 0; output < t.outputs;) {
    // As many whole pieces as a vector holds.
    int64_t lanes = 0, pieces = 0;
    if (next) {
      for (; output + lanes < t.outputs && lanes + next[pieces].count <= kLanes; ++pieces) {
        lanes += next[pieces].count;
      }
    } else {
      lanes = t.outputs - output < kLanes ? t.outputs - output : kLanes;
    }
    Vector v{from + output, ld, output, lanes};
    if (output + kLanes > readable) {
      for (int64_t k = 0; k < t.inputs; ++k) {
        memcpy(scratch.tile + k * kTileStep, v.from + k * ld, static_cast<size_t>(lanes) * 4);
      }
      v.from = scratch.tile;
      v.step = kTileStep;
    }
    if (!choose_vector(t, v, scratch)) return false;
    if (next) {
      put(next, scratch, pieces, steps);
      next += pieces;
    }
    output += lanes;
  }
  return true;
}

}  // namespace

extern const NmPackKernels kNmPackKernels;
const NmPackKernels kNmPackKernels = {kLanes, &pack};

}  // namespace aerogel::AEROGEL_ISA
