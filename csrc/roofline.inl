#include "kernels.h"
#include "roofline.h"
#include "simd.h"

namespace aerogel::AEROGEL_ISA {
namespace {

constexpr int kChains = 12;  // more than latency x ports, fewer than registers

AEROGEL_NOINLINE int64_t measure_fma(int64_t rounds, float* sink) {
  const Vec scale = load(sink), shift = load(sink + kLanes);
  Vec chain[kChains];
  for (int i = 0; i < kChains; ++i) chain[i] = broadcast(sink[i]);
  for (int64_t r = 0; r < rounds; ++r) {
    for (int i = 0; i < kChains; ++i) chain[i] = fma(chain[i], scale, shift);
  }
  Vec total = zero();
  for (int i = 0; i < kChains; ++i) total = add(total, chain[i]);
  store(sink, total);
  return rounds * kChains * kLanes * 2;
}

// Loads feed FMAs, as they do in the kernels.
AEROGEL_NOINLINE void measure_load(const float* p, int64_t floats, int64_t rounds, float* sink) {
  constexpr int kUnroll = 8;
  const Vec scale = broadcast(sink[0]);
  Vec chain[kUnroll];
  for (int i = 0; i < kUnroll; ++i) chain[i] = zero();
  for (int64_t r = 0; r < rounds; ++r) {
    for (int64_t j = 0; j < floats; j += kUnroll * kLanes) {
      for (int i = 0; i < kUnroll; ++i) {
        chain[i] = fma(load(p + j + i * kLanes), scale, chain[i]);
      }
    }
  }
  Vec total = zero();
  for (int i = 0; i < kUnroll; ++i) total = add(total, chain[i]);
  store(sink, total);
}

}  // namespace

extern const RooflineKernels kRooflineKernels;
const RooflineKernels kRooflineKernels = {&measure_fma, &measure_load};

}  // namespace aerogel::AEROGEL_ISA
