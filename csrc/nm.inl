// N:M weight x vectors. The lanes of a register are outputs; a permutation picks what each reads
// from its group of activations. Two blocks of outputs share the activations of one vector; several
// vectors share the weights of one block.
#include "nm.h"

#include "kernels.h"
#include "stored_values.inl"

namespace aerogel::AEROGEL_ISA {
namespace {

constexpr int64_t kAheadBytes = 4096;  // of values: about the way from memory

// A group of kM activations, and the lanes' picks from it by the low bits of an index word.
template <int kM>
struct Group;

#if defined(AEROGEL_USE_AVX512)

using Index = __m512i;
AEROGEL_INLINE Index load_index(const uint32_t* p) { return _mm512_loadu_si512(p); }
template <int kBits>
AEROGEL_INLINE Index next_slot(Index i) {
  return _mm512_srli_epi32(i, kBits);
}
template <>
struct Group<4> {
  __m512 x;
  AEROGEL_INLINE explicit Group(const float* p) : x(load_quad(p)) {}
  AEROGEL_INLINE Vec pick(Index i) const { return _mm512_permutevar_ps(x, i); }
};
template <>
struct Group<8> {  // both halves hold the eight, so that a fourth bit of the index does not matter
  __m512 x;
  AEROGEL_INLINE explicit Group(const float* p)
      : x(_mm512_broadcast_f32x8(_mm256_loadu_ps(p))) {}
  AEROGEL_INLINE Vec pick(Index i) const { return _mm512_permutexvar_ps(i, x); }
};

#elif defined(AEROGEL_USE_AVX2)

using Index = __m256i;
AEROGEL_INLINE Index load_index(const uint32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
template <int kBits>
AEROGEL_INLINE Index next_slot(Index i) {
  return _mm256_srli_epi32(i, kBits);
}
template <>
struct Group<4> {
  __m256 x;
  AEROGEL_INLINE explicit Group(const float* p) : x(load_quad(p)) {}
  AEROGEL_INLINE Vec pick(Index i) const { return _mm256_permutevar_ps(x, i); }
};
template <>
struct Group<8> {
  __m256 x;
  AEROGEL_INLINE explicit Group(const float* p) : x(_mm256_loadu_ps(p)) {}
  AEROGEL_INLINE Vec pick(Index i) const { return _mm256_permutevar8x32_ps(x, i); }
};

#elif defined(AEROGEL_USE_NEON)

using Index = uint32x4_t;
AEROGEL_INLINE Index load_index(const uint32_t* p) { return vld1q_u32(p); }
template <int kBits>
AEROGEL_INLINE Index next_slot(Index i) {
  return vshrq_n_u32(i, kBits);
}
// Bytes 4k to 4k + 3 for lane number k.
AEROGEL_INLINE uint8x16_t bytes_of_lanes(Index lane) {
  return vreinterpretq_u8_u32(vmlaq_n_u32(vdupq_n_u32(0x03020100u), lane, 0x04040404u));
}
template <>
struct Group<4> {
  uint8x16_t x;
  AEROGEL_INLINE explicit Group(const float* p) : x(vreinterpretq_u8_f32(vld1q_f32(p))) {}
  AEROGEL_INLINE Vec pick(Index i) const {
    const uint8x16_t bytes = bytes_of_lanes(vandq_u32(i, vdupq_n_u32(3)));
    return vreinterpretq_f32_u8(vqtbl1q_u8(x, bytes));
  }
};
template <>
struct Group<8> {
  uint8x16x2_t x;
  AEROGEL_INLINE explicit Group(const float* p)
      : x{{vreinterpretq_u8_f32(vld1q_f32(p)), vreinterpretq_u8_f32(vld1q_f32(p + 4))}} {}
  AEROGEL_INLINE Vec pick(Index i) const {
    const uint8x16_t bytes = bytes_of_lanes(vandq_u32(i, vdupq_n_u32(7)));
    return vreinterpretq_f32_u8(vqtbl2q_u8(x, bytes));
  }
};

#else

struct Index {
  uint32_t lane[kLanes];
};
AEROGEL_INLINE Index load_index(const uint32_t* p) {
  Index i;
  for (int l = 0; l < kLanes; ++l) i.lane[l] = p[l];
  return i;
}
template <int kBits>
AEROGEL_INLINE Index next_slot(Index i) {
  for (int l = 0; l < kLanes; ++l) i.lane[l] >>= kBits;
  return i;
}
template <int kM>
struct Group {
  const float* x;
  AEROGEL_INLINE explicit Group(const float* p) : x(p) {}
  AEROGEL_INLINE Vec pick(Index i) const {
    return lanewise([&](int l) { return x[i.lane[l] & (kM - 1)]; });
  }
};

#endif

// kBlocks blocks of outputs from `block` on, for kTokens vectors. Sums of one output are added up in
// as many parts as there are registers for: slots apart, if few vectors and blocks share them.
template <class Values, int kN, int kM, int kBlocks, int kTokens>
AEROGEL_NOINLINE void run_some(const NmTask& task, int64_t block, float* sums) {
  using Stored = typename Values::Stored;
  constexpr int kBits = nm_index_bits(kM), kGroups = nm_slots(kM) / kN;
  constexpr int kParts = kBlocks * kTokens * kN <= 8 ? kN : 1;
  const NmStream& s = *task.stream;
  const Stored* values[kBlocks];
  const uint32_t* indices[kBlocks];
  for (int b = 0; b < kBlocks; ++b) {
    values[b] = static_cast<const Stored*>(s.values) + (block + b) * s.groups * kN * kLanes;
    indices[b] = s.indices + (block + b) * s.words() * kLanes;
  }
  Vec total[kBlocks][kTokens][kParts];
#pragma GCC unroll 8
  for (int b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 2
      for (int p = 0; p < kParts; ++p) total[b][t][p] = zero();
    }
  }
  const float* x = task.x;
  int64_t vector[kTokens];  // those that are missing repeat the last, and nobody reads their sums
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
    vector[t] = (t < task.tokens ? t : task.tokens - 1) * task.ldx;
  }
  for (int64_t word = s.words(); word > 0; --word) {
    Index index[kBlocks];
#pragma GCC unroll 2
    for (int b = 0; b < kBlocks; ++b) {
      index[b] = load_index(indices[b]);
      indices[b] += kLanes;
    }
    for (int g = 0; g < kGroups; ++g) {
#pragma GCC unroll 2
      for (int b = 0; b < kBlocks; ++b) {
        __builtin_prefetch(reinterpret_cast<const char*>(values[b]) + kAheadBytes);
        Vec weight[kN];
        Index slot[kN];
#pragma GCC unroll 2
        for (int i = 0; i < kN; ++i) {
          weight[i] = Values::load(values[b] + i * kLanes);
          slot[i] = index[b];
          index[b] = next_slot<kBits>(index[b]);
        }
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) {
          const Group<kM> group(x + vector[t]);
#pragma GCC unroll 2
          for (int i = 0; i < kN; ++i) {
            Vec& part = total[b][t][i % kParts];
            part = fma(weight[i], group.pick(slot[i]), part);
          }
        }
        values[b] += kN * kLanes;
      }
      x += kM;
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 2
    for (int b = 0; b < kBlocks; ++b) {
      Vec sum = total[b][t][0];
      if (kParts == 2) sum = add(sum, total[b][t][kParts - 1]);
      store(sums + (t * kBlocks + b) * kLanes, sum);
    }
  }
}

// y of the outputs that `blocks` blocks from `block` on hold.
AEROGEL_INLINE void finish(const NmTask& task, int64_t block, int64_t blocks, const float* sums) {
  const NmStream& s = *task.stream;
  const NmProduct& p = *task.product;
  const int64_t row = block * kLanes;
  const int64_t left = s.rows - row, rows = left < blocks * kLanes ? left : blocks * kLanes;
  for (int64_t t = 0; t < task.tokens; ++t) {
    finish_sums(sums + t * blocks * kLanes, s.scales ? s.scales + row : nullptr,
                p.bias ? p.bias + row : nullptr,
                p.residual ? p.residual + t * p.ldr + row : nullptr, p.activation,
                p.y + t * p.ldy + row, rows);
  }
}

template <class Values, int kN, int kM, int kBlocks, int kTokens>
AEROGEL_INLINE void run_tokens(const NmTask& task) {
  float sums[kTokens * kBlocks * kLanes];
  int64_t block = task.first;
  for (; block + kBlocks <= task.last; block += kBlocks) {
    run_some<Values, kN, kM, kBlocks, kTokens>(task, block, sums);
    finish(task, block, kBlocks, sums);
  }
  for (; block < task.last; ++block) {
    run_some<Values, kN, kM, 1, kTokens>(task, block, sums);
    finish(task, block, 1, sums);
  }
}

template <class Values, int kN, int kM>
void run_pattern(const NmTask& task) {
  if (task.tokens == 1) return run_tokens<Values, kN, kM, 2, 1>(task);
  if (task.tokens == 2) return run_tokens<Values, kN, kM, 2, 2>(task);
  if (task.tokens <= 4) return run_tokens<Values, kN, kM, 1, 4>(task);
  run_tokens<Values, kN, kM, 1, kNmTokens>(task);
}

template <class Values>
void run_values(const NmTask& task) {
  const NmStream& s = *task.stream;
  if (s.m == 4) {
    s.n == 1 ? run_pattern<Values, 1, 4>(task) : run_pattern<Values, 2, 4>(task);
  } else {
    s.n == 1 ? run_pattern<Values, 1, 8>(task) : run_pattern<Values, 2, 8>(task);
  }
}

void run_blocks(const NmTask& task) {
  switch (task.stream->type) {
    case ValueType::kFloat32: return run_values<Float32Values>(task);
    case ValueType::kBfloat16: return run_values<Bfloat16Values>(task);
    case ValueType::kInt8: return run_values<Int8Values>(task);
  }
}

}  // namespace

extern const NmKernels kNmKernels;
const NmKernels kNmKernels = {kLanes, &run_blocks};

}  // namespace aerogel::AEROGEL_ISA
