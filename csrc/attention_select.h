// Choosing keys: approximate scores from labels (a few channels of every key), the largest of many
// scores, and blocks of tokens pooled.
//
// Scores of one group of queries stay in the second cache while the largest are found, so that
// labels are all that comes from memory. Everything is deterministic: equal scores go to the lowest
// key, whatever the number of threads.
//
// Plain data and function pointers only: the files compiled once per instruction set include this one.
#pragma once

#include <stdint.h>

namespace aerogel {

enum class LabelType : int32_t {
  kFloat32 = 0,
  kBfloat16 = 1,
  kFloat16 = 2,
  kBits8 = 3,  // codes, the first channel in the lowest bits: channel = low + step * code
  kBits4 = 4,
  kBits2 = 5,
};

constexpr int64_t kLabelColumns = 8;  // queries of one task: whose scores fit in the second cache
constexpr int64_t kLabelChunk = 256;  // keys that all queries of a task meet while they are near
constexpr int64_t kRankPad = 64;      // entries beyond the last score that a task may write

// Bytes that a label of so many channels takes.
__attribute__((always_inline)) inline int64_t label_bytes(LabelType type, int64_t width) {
  switch (type) {
    case LabelType::kFloat32: return 4 * width;
    case LabelType::kBfloat16:
    case LabelType::kFloat16: return 2 * width;
    case LabelType::kBits8: return width;
    case LabelType::kBits4: return width / 2;
    case LabelType::kBits2: return width / 4;
  }
  return 0;
}

// [B][Hq][Lq] queries of `width` floats, times `scale`, and [B][Hlab][Lk] labels; Hlab divides Hq. Labels
// of one head follow each other without gaps.
struct LabelArgs {
  const float* query;
  const void* labels;
  int64_t label_batch, label_head;  // bytes from one to the next
  const float* span;                // [..][Lk][2], low and step; codes only
  int64_t span_batch, span_head;    // floats
  LabelType type;
  int64_t batches, q_heads, label_heads, q_len, k_len, width;
  float scale;
};

// Which keys a query may get, and how many.
struct ChooseRule {
  const uint8_t* key_padding;  // [B][Lk], 0 where a key takes no part, or null
  int64_t q_offset;            // position of the first query
  bool causal;
  int64_t window;  // position - key < window; 0 for none
  bool keep_own;   // the key at a query's own position first of all
  int64_t count;   // runs
  int64_t run;     // neighbours that are taken together, by the best of them
};

// Scores of some queries of one label head.
struct LabelTask {
  const LabelArgs* args;
  int64_t batch, label_head;
  int64_t column, columns;  // queries (head of the group, row), at most kLabelColumns
  int64_t begin, end;       // keys
  float* scratch;           // label_scratch floats
  float* scores;            // of the first column and key `begin`
  int64_t stride;           // between columns
};

__attribute__((always_inline)) inline int64_t label_scratch(int64_t width) {
  return kLabelChunk * width + kLabelColumns * (width + 16) + 64;
}

// The largest of n scores, which are overwritten; room for kRankPad more entries behind them.
struct RankTask {
  float* scores;
  int64_t n;
  int64_t count, run;
  bool finite;       // entries of -inf are never taken
  int32_t* scratch;  // rank_scratch entries, n more and kRankPad
  int32_t* keys;     // count * run entries, ascending
  int32_t first;     // what the first entry is called
};

__attribute__((always_inline)) inline int64_t rank_scratch(int64_t n) { return 4 * (n + 512); }

// One block of rows: the largest, the least and the mean of every channel, whichever is not null.
struct PoolTask {
  const void* rows;
  int32_t type;  // 0 float32, 1 bfloat16, 2 float16
  int64_t count, stride, dim;
  float *most, *least, *mean;
};

struct SelectKernels {
  void (*scores)(const LabelTask& task);
  int64_t (*largest)(const RankTask& task);  // how many entries were taken
  void (*pool)(const PoolTask& task);
};

// Scores [B][Hq][Lq][Lk].
void label_scores(const LabelArgs& args, float* scores, int threads);
// keys [B * Hq * Lq][count * run], of which the first found[row] count; the rest is 0.
void choose_by_labels(const LabelArgs& args, const ChooseRule& rule, int32_t* keys, int64_t* found,
                      int threads);
// How many of the first found[row] of `most` keys lie in each tile: lengths [rows][most / tile, up].
void tile_lengths(const int64_t* found, int64_t rows, int64_t most, int64_t tile,
                  int16_t* lengths);
// The k largest of each row, ascending: keys [rows][k].
void largest_keys(const float* scores, int64_t rows, int64_t n, int64_t k, int64_t* keys,
                  int threads);

// Square maps of block scores, [planes][n][n] with -inf where nothing may be kept: in each row the
// `count` largest are kept, the own place among them if `own`, and every place from row
// dense_from[plane / heads] on. NaN takes one of the places and is not kept.
struct BlockChoice {
  const float* scores;
  int64_t planes, heads, n, count;
  bool own;
  const int64_t* dense_from;  // [planes / heads], or null for no such rows
};
// row_ptr: [planes][n + 1], joined. col: the columns that are kept, ascending in each row, with room
// for `count` of each row and n of each dense one. Returns how many there are.
int64_t choose_blocks(const BlockChoice& choice, int64_t* row_ptr, int32_t* col, int threads);

// [B][H][L][D] in blocks of `block` rows: each [B][H][blocks][stride], or null.
struct PoolArgs {
  const void* x;
  int64_t batch, head, row;  // elements
  int32_t type;
  int64_t batches, heads, length, dim, block;
  float *most, *least, *mean;
  int64_t stride;
};
void pool_rows(const PoolArgs& args, int threads);

// Rows of `width` floats in so many bits: codes [rows][width * bits / 8], the first channel in the
// lowest bits, and span [rows][2], low and step.
void pack_codes(const float* x, int64_t rows, int64_t width, int bits, uint8_t* codes, float* span,
                int threads);

}  // namespace aerogel
