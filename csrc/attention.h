// Attention over lists of keys: every tile of queries names the keys it reads, in runs or one by
// one, and all of them share one softmax. Nothing of size queries x keys is ever stored.
//
// Queries lie in the lanes of vectors where scores are made: a broadcast element of a key times a
// vector of queries, and a softmax runs lane by lane. Outputs lie row by row: a broadcast probability
// times the row of a value. Keys and values are read where they are, so that scattered ones cost no
// packing; queries alone are transposed. The query heads of a group sit side by side in the lanes.
//
// A stream of tiles is tile_ptr [Bp * Hp * query_tiles + 1] and, for each tile, its kind, its start
// and its length (at most kStepKeys). Kernels take up to kStepKeys keys of consecutive tiles in one
// step. Everything is deterministic and does not depend on the number of threads.
//
// Plain data and function pointers only: the files compiled once per instruction set include this one.
#pragma once

#include <stdint.h>

namespace aerogel {

enum class AttendType : int32_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

constexpr int64_t kStepKeys = 64;
constexpr int64_t kDecodeColumns = 8;  // up to so many queries, keys lie in the lanes instead
constexpr int64_t kPartKeys = 1024;    // keys of a part of such a list, but for its last tile

// Bits of a tile's kind.
constexpr uint8_t kTileEdge = 1;      // compare the position of every key with every query's
constexpr uint8_t kTileGather = 2;    // `start` points into gather_idx
constexpr uint8_t kTileNoWindow = 4;  // the causal rule alone: the window does not cut these keys

// Elements between neighbours; the elements of a row are neighbours.
struct AttendTensor {
  void* data;
  int64_t batch, head, row;
};

// softmax(scale q k^T + tile_bias, capped) v for every query, over the keys of its tile.
struct AttendArgs {
  AttendTensor q, k, v, o;  // [B][Hq][Lq][D], [B][Hkv][Lk][D], [B][Hkv][Lk][Dv], [B][Hq][Lq][Dv]
  float* lse;               // [B][Hq][Lq], natural logarithm
  AttendType type;
  int64_t batches, q_heads, kv_heads, q_len, k_len, dim, value_dim;

  const int64_t* tile_ptr;
  const uint8_t* kind;
  const int32_t* start;
  const int16_t* length;
  const int32_t* gather_idx;
  const float* tile_bias;  // per tile, or null
  int64_t plan_batches, plan_heads, block_q, tiles, gathers;

  int64_t q_offset;  // position of the first query; key j has position j
  float scale;
  bool causal;
  const int64_t* window;  // per head of the plan, 0 for none; or null
  int64_t window_block;   // 1, or the tokens of a block that windows count in
  const uint8_t* key_padding;  // [B][Lk], 0 where a key takes no part, or null
  float softcap;               // 0 for none
  const float* sink_logit;     // per query head, or null
  bool linear;  // weights are the scores themselves: o is their sum of values, lse their own sum
  uint32_t seed, drop_below;  // pairs whose hash is below take no part in o; 0 for no dropout
  float kept_factor;          // of the others

  // Backward only.
  AttendTensor grad_o, grad_q;
  const float* grad_lse;     // [B][Hq][Lq] or null
  float *grad_k, *grad_v;    // [B][Hkv][Lk][padded_dim(D)], whatever they hold at first
  float* grad_bias;          // [copies][tiles], zeros at first, or null
};

__attribute__((always_inline)) inline int64_t padded_dim(int64_t dim) {
  return (dim + 15) / 16 * 16;
}

// The first key that a window leaves a query at this position: position - key < window, in blocks.
__attribute__((always_inline)) inline int64_t window_begin(int64_t position, int64_t window,
                                                           int64_t block) {
  const int64_t own = position >= 0 ? position / block : -((block - 1 - position) / block);
  return (own - (window - 1)) * block;
}

__attribute__((always_inline)) inline int64_t query_tiles(const AttendArgs& a) {
  return (a.q_len + a.block_q - 1) / a.block_q;
}

// Some heads of one query tile, all of one key head; keys in [key_begin, key_end) only.
struct AttendTask {
  const AttendArgs* args;
  int64_t batch, head, heads, q_tile;
  int64_t tile_begin, tile_end;  // of the stream
  int64_t key_begin, key_end;
  float* scratch;
  float* part;             // if the list is cut: this part's maxima, totals and sums of values
  int64_t part_columns;    // room in a part
  const AttendTask* next;  // what the same thread runs afterwards, or null: its first rows are
  bool fetched;            // fetched while this task ends, as this one's were
  bool grad_q, grad_kv;    // backward: which of them
  uint8_t* seen;           // per key of the head: whether its gradients have been begun
  int64_t bias_copy;
};

// Unfinished parts of one task, in order.
struct AttendMerge {
  AttendTask task;
  const float* parts;
  int64_t count;
};

struct CodedTask;   // attention_codes.h: keys and values in few bits
struct CodedPrior;

struct AttendKernels {
  void (*forward)(const AttendTask& task);
  void (*decode)(const AttendTask& task);
  void (*decode_merge)(const AttendMerge& merge);
  void (*backward)(const AttendTask& task);
  void (*coded_part)(const CodedTask& task);
  void (*coded_prior)(const CodedPrior& prior);
};

// Floats of scratch, 64-byte aligned, and of one part. `columns` counts queries of a task.
__attribute__((always_inline)) inline int64_t attend_scratch(const AttendArgs& a, int64_t columns,
                                                             bool backward) {
  const int64_t padded = padded_dim(columns) + 64;
  const int64_t dims = padded_dim(a.dim) + padded_dim(a.value_dim);
  const int64_t panels = backward ? padded * (3 * dims + 8) : padded * (dims + 8);
  const int64_t step = kStepKeys * (dims + 4 * 64) + 64 * 16;
  return panels + step + 64 * dims;
}
__attribute__((always_inline)) inline int64_t attend_part(const AttendArgs& a,
                                                          int64_t columns) {
  return columns * (padded_dim(a.value_dim) + 2);
}

// All of it. Throws std::invalid_argument if a tile leaves the keys.
void attend_forward(const AttendArgs& args, int threads);
void attend_backward(const AttendArgs& args, int threads);
// How many copies of grad_bias backward fills; their sum is the gradient.
int64_t attend_bias_copies(const AttendArgs& args);

}  // namespace aerogel
