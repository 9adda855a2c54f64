// Attention of a few queries over keys and values in 2, 4 or 8 bits, which stay so until they are in
// registers.
//
// Tokens lie in the lanes. A tile is 16 tokens: one byte of each, then the next byte of each, and a
// byte holds the codes of 8 / bits neighbouring channels, the first in its lowest bits:
//   codes [B][Hkv][tiles][dim * bits / 8][16].
// A key is code * step + low with one step and low per channel: both go into the query, once per
// part. A value is (code * step + low) * channel with one step and low per token: step goes into the
// token's weight, channel into the sum.
//
// Plain data and function pointers only: the files compiled once per instruction set include this one.
#pragma once

#include "attention.h"

namespace aerogel {

constexpr int64_t kCodedTokens = 16;  // of a tile
constexpr int64_t kCodedTiles = 64;   // of a part at most

struct Scales {
  const void* data;
  AttendType type;
};

// Tokens that were coded together.
struct CodedSegment {
  const uint8_t *k, *v;
  int64_t tiles, bits;
  const int64_t* counts;  // [B] tokens that are real, the first of the tiles
  Scales k_low, k_step;   // [B][Hkv][D]
  Scales v_low, v_step;   // [B][tiles * 16]
  Scales v_channel;       // [B][Hkv][Dv]
};

// Some tiles of a segment for some queries of one key head.
struct CodedTask {
  AttendTask task;
  const CodedSegment* segment;
  int64_t tile_begin, tile_end;
  int64_t result;  // its place among the parts of all tasks
};

// What the queries found elsewhere, as another part: o in the type of the call, and lse.
struct CodedPrior {
  AttendTask task;
  AttendTensor o;
  const float* lse;  // [B][Hq][Lq]
};

__attribute__((always_inline)) inline int64_t coded_scratch(const AttendArgs& a) {
  const int64_t dims = padded_dim(a.dim) + padded_dim(a.value_dim);
  return (kDecodeColumns + 3) * dims + (kDecodeColumns + 2) * kCodedTiles * kCodedTokens +
         4 * padded_dim(kDecodeColumns);
}

// Attention over `segments` and, if `prior.lse`, over what `prior` has seen. Tiles, padding and the
// causal rule of `args` are not read: every query sees every real token.
void attend_coded(AttendArgs args, const CodedSegment* segments, int64_t count,
                  const CodedPrior& prior, int threads);

}  // namespace aerogel
