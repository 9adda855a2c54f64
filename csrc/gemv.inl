// Sparse weight x vectors. For one vector the lanes of a register are the four strands of a group:
// their activations are fetched one by one, which costs less than any gather instruction did, and
// the weights are one load. For several vectors the lanes are the vectors, and each weight is spread.
#include "gemv.h"

#include "kernels.h"
#include "stored_values.inl"
#include "transpose.inl"

namespace aerogel::AEROGEL_ISA {
namespace {

constexpr int64_t kAheadBytes = 4096;  // of values: about the way from memory
constexpr int kUnroll = 4;             // steps between two prefetches

// The columns that the lanes of a group stand at.
struct StrandColumns {
  uint64_t a, b, c, d;

  AEROGEL_INLINE explicit StrandColumns(const uint16_t* first)
      : a(first[0]), b(first[1]), c(first[2]), d(first[3]) {}

  AEROGEL_INLINE void advance(const uint8_t* gaps) {
    a += gaps[0];
    b += gaps[1];
    c += gaps[2];
    d += gaps[3];
  }
};

// Called every kUnroll steps: once for every line of values and of gaps.
template <class Values>
AEROGEL_INLINE void prefetch_ahead(const typename Values::Stored* values, const uint8_t* gaps,
                                   int32_t left) {
  constexpr int kSize = sizeof(typename Values::Stored);
  constexpr int kLineBytes = 64, kStepBytes = kSize * kGemvStrands;
  if (left % (kLineBytes / kStepBytes) < kUnroll) {
    __builtin_prefetch(reinterpret_cast<const char*>(values) + kAheadBytes);
  }
  if (left % (kLineBytes / kGemvStrands) < kUnroll) {
    __builtin_prefetch(gaps + kAheadBytes / kSize);
  }
}

template <class Values>
AEROGEL_INLINE Four strand_step(const float* x, StrandColumns& at,
                                const typename Values::Stored* values, const uint8_t* gaps,
                                Four sum) {
  at.advance(gaps);
  return four_fma(Values::load_four(values), four_of(x + at.a, x + at.b, x + at.c, x + at.d), sum);
}

template <class Values>
AEROGEL_NOINLINE void run_part(const GemvStream& s, const GemvPart& from, int64_t end,
                               const float* x, float* sums) {
  const uint8_t* gaps = s.gaps + from.entry;
  auto values = static_cast<const typename Values::Stored*>(s.values) + from.entry;
  for (const GemvGroup* group = s.groups + from.group; group < s.groups + end; ++group) {
    StrandColumns at(group->first);
    Four even = four_zero(), odd = four_zero();
    int32_t left = group->steps;
    for (; left >= kUnroll; left -= kUnroll) {
      prefetch_ahead<Values>(values, gaps, left);
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; u += 2) {
        even = strand_step<Values>(x, at, values + 4 * u, gaps + 4 * u, even);
        odd = strand_step<Values>(x, at, values + 4 * u + 4, gaps + 4 * u + 4, odd);
      }
      values += kUnroll * kGemvStrands;
      gaps += kUnroll * kGemvStrands;
    }
    for (; left > 0; --left) {
      even = strand_step<Values>(x, at, values, gaps, even);
      values += kGemvStrands;
      gaps += kGemvStrands;
    }
    float total[kGemvStrands];
    four_store(total, four_add(even, odd));
    for (int l = 0; l < kGemvStrands; ++l) sums[group->output[l]] += total[l];
  }
}

// Vectors side by side, in a whole register or in one of four lanes.
struct WideLanes {
  using Lanes = Vec;
  static constexpr int64_t kWidth = kLanes;
  static AEROGEL_INLINE Lanes zero() { return AEROGEL_ISA::zero(); }
  static AEROGEL_INLINE Lanes load(const float* p) { return AEROGEL_ISA::load(p); }
  static AEROGEL_INLINE void store(float* p, Lanes v) { AEROGEL_ISA::store(p, v); }
  static AEROGEL_INLINE Lanes add(Lanes a, Lanes b) { return AEROGEL_ISA::add(a, b); }
  static AEROGEL_INLINE Lanes fma(Lanes a, float b, Lanes c) {
    return AEROGEL_ISA::fma(a, broadcast(b), c);
  }
};

struct FourLanes {
  using Lanes = Four;
  static constexpr int64_t kWidth = kGemvStrands;
  static AEROGEL_INLINE Lanes zero() { return four_zero(); }
  static AEROGEL_INLINE Lanes load(const float* p) { return four_float32(p); }
  static AEROGEL_INLINE void store(float* p, Lanes v) { four_store(p, v); }
  static AEROGEL_INLINE Lanes add(Lanes a, Lanes b) { return four_add(a, b); }
  static AEROGEL_INLINE Lanes fma(Lanes a, float b, Lanes c) {
    return four_fma(a, four_spread(b), c);
  }
};

// The same for vectors side by side: x[column][kWidth], sums[output][kWidth].
template <class Values, class L>
AEROGEL_NOINLINE void run_part_tokens(const GemvStream& s, const GemvPart& from, int64_t end,
                                      const float* x, float* sums) {
  constexpr int64_t kWidth = L::kWidth;
  const uint8_t* gaps = s.gaps + from.entry;
  auto values = static_cast<const typename Values::Stored*>(s.values) + from.entry;
  for (const GemvGroup* group = s.groups + from.group; group < s.groups + end; ++group) {
    StrandColumns at(group->first);
    typename L::Lanes a = L::zero(), b = L::zero(), c = L::zero(), d = L::zero();
    for (int32_t left = group->steps; left > 0; --left) {
      if (left % kUnroll == 0) prefetch_ahead<Values>(values, gaps, left);
      at.advance(gaps);
      a = L::fma(L::load(x + at.a * kWidth), Values::one(values), a);
      b = L::fma(L::load(x + at.b * kWidth), Values::one(values + 1), b);
      c = L::fma(L::load(x + at.c * kWidth), Values::one(values + 2), c);
      d = L::fma(L::load(x + at.d * kWidth), Values::one(values + 3), d);
      values += kGemvStrands;
      gaps += kGemvStrands;
    }
    const typename L::Lanes strands[kGemvStrands] = {a, b, c, d};
    for (int l = 0; l < kGemvStrands; ++l) {
      float* total = sums + group->output[l] * kWidth;
      L::store(total, L::add(L::load(total), strands[l]));
    }
  }
}

template <class Values>
AEROGEL_INLINE void accumulate(const GemvTask& t, float* sums) {
  const GemvStream& s = *t.stream;
  const auto run = t.width == 1              ? &run_part<Values>
                   : t.width == kGemvStrands ? &run_part_tokens<Values, FourLanes>
                                             : &run_part_tokens<Values, WideLanes>;
  for (int64_t slab = 0; slab < s.slabs; ++slab) {
    const GemvPart* part = s.parts + t.tile * s.slabs + slab;
    run(s, part[0], part[1].group, t.x + s.slab_cols[slab] * t.width, sums);
  }
}

void run_tile(const GemvTask& t) {
  const GemvStream& s = *t.stream;
  const GemvProduct& p = *t.product;
  const int64_t row = s.tile_rows[t.tile], rows = s.tile_rows[t.tile + 1] - row;
  float* sums = t.scratch;
  for (int64_t i = 0; i < (rows + 1) * t.width; ++i) sums[i] = 0.0f;
  switch (s.type) {
    case ValueType::kFloat32: accumulate<Float32Values>(t, sums); break;
    case ValueType::kBfloat16: accumulate<Bfloat16Values>(t, sums); break;
    case ValueType::kInt8: accumulate<Int8Values>(t, sums); break;
  }
  if (t.width > 1) {
    float* turned = sums + (s.tallest_tile + 1) * t.width;
    transpose(sums, t.width, turned, rows, rows, t.tokens);
    sums = turned;
  }
  for (int64_t token = 0; token < t.tokens; ++token) {
    finish_sums(sums + token * rows, s.scales ? s.scales + row : nullptr,
                p.bias ? p.bias + row : nullptr,
                p.residual ? p.residual + token * p.ldr + row : nullptr, p.activation,
                p.y + token * p.ldy + row, rows);
  }
}

}  // namespace

extern const GemvKernels kGemvKernels;
const GemvKernels kGemvKernels = {kLanes, &run_tile};

}  // namespace aerogel::AEROGEL_ISA
