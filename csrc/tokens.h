// What a transformer needs between its linear layers, on planar activations: feature f of a token
// stands at x + f * ld, tokens are columns. So everything that torch does along the features of a
// token runs down the rows here, a vector of tokens at a time, and nothing is ever transposed.
//
// "Padded" planes are those of layers.h: rows may be written up to the next whole cache line. Every
// kernel handles a slice of its work chosen by the caller; slices never overlap.
//
// Plain data and function pointers only: the files compiled once per instruction set include this one.
#pragma once

#include <stdint.h>

namespace aerogel {

// y[f] = (x[f] - mean) / sqrt(variance + epsilon) * weight[f] + bias[f] for every column.
struct NormArgs {
  const float* x;  // padded, or a vector (ld 1)
  int64_t ldx;
  float* y;  // likewise; may be x
  int64_t ldy;
  int64_t features;
  int64_t columns;
  const float* weight;
  const float* bias;
  float epsilon;
};

// One head of one sequence: y = v softmax(k^T q * scale + mask), a column per query.
struct AttentionArgs {
  const float* q;  // [head_dim][ldq], readable in whole cache lines
  int64_t ldq;
  const float* k;  // [head_dim][ldk]
  int64_t ldk;
  const float* v;  // [value_dim][ldv]
  int64_t ldv;
  float* y;  // [value_dim][ldy]
  int64_t ldy;
  int64_t head_dim, value_dim;
  int64_t queries, keys;
  float scale;
  const float* mask;  // [keys][ldm], added to the scores; null for none
  int64_t ldm;
  bool mask_per_query;  // a column for each query, or one for all
  bool empty_is_zero;   // a query that may see no key gives zeros, else NaN
};

// Keys are walked in blocks of nearly equal size, at most this many: the scores of a panel of
// queries then stay in the first caches, however long the sequence.
constexpr int64_t kKeyBlock = 256;

// Columns of the widest panel of queries.
struct AttentionTile {
  int64_t vectors, lanes;
  __attribute__((always_inline)) constexpr int64_t width() const { return vectors * lanes; }
};

__attribute__((always_inline)) constexpr int64_t attention_panels(int64_t queries,
                                                                  const AttentionTile& tile) {
  return (queries + tile.width() - 1) / tile.width();
}

// Scratch of one panel: queries, scores, sums of values, then maxima, sums and factors.
__attribute__((always_inline)) constexpr int64_t attention_scratch(int64_t head_dim,
                                                                   int64_t value_dim, int64_t keys,
                                                                   const AttentionTile& tile) {
  const int64_t block = keys < kKeyBlock ? keys : kKeyBlock;
  return (head_dim + block + value_dim + 3) * tile.width();
}

struct TokenKernels {
  AttentionTile tile;
  // Columns [first, last), which begin at a whole vector.
  void (*layer_norm)(const NormArgs& args, int64_t first, int64_t last);
  // Panels of queries [first, last) of attention_panels(...); aligned scratch.
  void (*attention)(const AttentionArgs& args, int64_t first, int64_t last, float* scratch);
};

}  // namespace aerogel
