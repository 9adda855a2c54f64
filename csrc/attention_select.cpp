// Cutting the choice of keys into tasks.
#include "attention_select.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace aerogel {
namespace {

constexpr int64_t kScoreKeys = 8192;  // keys of one task where scores alone are wanted
constexpr int64_t kPackRows = 1024;   // rows of one task that packs
constexpr float kInfinity = std::numeric_limits<float>::infinity();

int64_t columns_of(const LabelArgs& a) { return a.q_heads / a.label_heads * a.q_len; }

// Every group of columns of every label head once.
std::vector<LabelTask> label_tasks(const LabelArgs& a) {
  std::vector<LabelTask> tasks;
  for (int64_t b = 0; b < a.batches; ++b) {
    for (int64_t h = 0; h < a.label_heads; ++h) {
      for (int64_t c = 0; c < columns_of(a); c += kLabelColumns) {
        const int64_t columns = std::min(kLabelColumns, columns_of(a) - c);
        tasks.push_back({&a, b, h, c, columns, 0, a.k_len, nullptr, nullptr, a.k_len});
      }
    }
  }
  return tasks;
}

// A query's number in [B][Hq][Lq].
int64_t row_of(const LabelTask& t, int64_t column) {
  const LabelArgs& a = *t.args;
  const int64_t head = t.label_head * (a.q_heads / a.label_heads) + (t.column + column) / a.q_len;
  return (t.batch * a.q_heads + head) * a.q_len + (t.column + column) % a.q_len;
}

// Keys [begin, end) that a query may read, but for padding.
struct Reach {
  int64_t begin, end, own;
};
Reach reach_of(const LabelTask& t, const ChooseRule& rule, int64_t column) {
  const int64_t position = rule.q_offset + (t.column + column) % t.args->q_len;
  Reach r{0, t.args->k_len, std::min(position, t.args->k_len - 1)};
  if (rule.causal) r.end = std::clamp<int64_t>(position + 1, 0, r.end);
  if (rule.window > 0) r.begin = std::clamp<int64_t>(position - rule.window + 1, 0, r.end);
  return r;
}

// What the rule forbids becomes -inf, a query's own key +inf; runs begin at multiples of `run`.
RankTask ranked(const LabelTask& t, const ChooseRule& rule, int64_t column, float* scores) {
  const Reach reach = reach_of(t, rule, column);
  const int64_t first = reach.begin / rule.run * rule.run;
  std::fill(scores + first, scores + reach.begin, -kInfinity);
  if (rule.keep_own && reach.own >= reach.begin && reach.own < reach.end) {
    scores[reach.own] = kInfinity;
  }
  if (rule.key_padding) {
    const uint8_t* const real = rule.key_padding + t.batch * t.args->k_len;
    for (int64_t j = first; j < reach.end; ++j) {
      if (!real[j]) scores[j] = -kInfinity;
    }
  }
  RankTask rank{};
  rank.scores = scores + first;
  rank.n = reach.end - first;
  rank.count = rule.count;
  rank.run = rule.run;
  rank.finite = true;
  rank.first = static_cast<int32_t>(first);
  return rank;
}

void choose_task(LabelTask t, const ChooseRule& rule, int32_t* keys, int64_t* found) {
  thread_local Scratch memory, ranks;
  const SelectKernels& kernels = *active_table().select;
  const int64_t n = t.args->k_len, room = (label_scratch(t.args->width) + 15) / 16 * 16;
  t.end = 0;
  for (int64_t c = 0; c < t.columns; ++c) t.end = std::max(t.end, reach_of(t, rule, c).end);
  t.stride = (n + kRankPad + 15) / 16 * 16;
  t.scratch = memory.at_least(room + t.columns * t.stride);
  t.scores = t.scratch + room;
  kernels.scores(t);
  const int64_t most = rule.count * rule.run;
  for (int64_t c = 0; c < t.columns; ++c) {
    RankTask rank = ranked(t, rule, c, t.scores + c * t.stride);
    rank.scratch = reinterpret_cast<int32_t*>(ranks.at_least(rank_scratch(n) + n + kRankPad));
    // A task may write one entry more than it takes.
    std::vector<int32_t> own(static_cast<size_t>(std::min(most, rank.n) + rule.run + 1));
    rank.keys = own.data();
    const int64_t row = row_of(t, c);
    found[row] = rank.n > 0 ? kernels.largest(rank) : 0;
    int32_t* const to = keys + row * most;
    std::copy_n(own.data(), found[row], to);
    std::fill(to + found[row], to + most, 0);
  }
}

void pack_row(const float* x, int64_t width, int bits, uint8_t* codes, float* span) {
  const float most = static_cast<float>((1 << bits) - 1);
  const auto [low, high] = std::minmax_element(x, x + width);
  const float range = (*high - *low) / most, step = range > 0.0f ? range : 1.0f;
  span[0] = *low;
  span[1] = step;
  const int per_byte = 8 / bits;
  for (int64_t i = 0; i < width; i += per_byte) {
    unsigned byte = 0;
    for (int j = 0; j < per_byte; ++j) {
      const float code = std::nearbyint((x[i + j] - *low) / step);  // ties to even, as torch rounds
      byte |= static_cast<unsigned>(std::clamp(code, 0.0f, most)) << (j * bits);
    }
    *codes++ = static_cast<uint8_t>(byte);
  }
}

}  // namespace

void label_scores(const LabelArgs& a, float* scores, int threads) {
  const SelectKernels& kernels = *active_table().select;
  std::vector<LabelTask> parts;
  for (LabelTask task : label_tasks(a)) {
    for (int64_t begin = 0; begin < a.k_len; begin += kScoreKeys) {
      task.begin = begin;
      task.end = std::min(begin + kScoreKeys, a.k_len);
      parts.push_back(task);
    }
  }
  parallel_tasks(static_cast<int64_t>(parts.size()), threads, [&](int64_t i) {
    thread_local Scratch memory;
    LabelTask t = parts[i];
    // Columns are neighbouring rows of the result, since they follow each other head by head.
    t.scores = scores + row_of(t, 0) * a.k_len + t.begin;
    t.scratch = memory.at_least(label_scratch(a.width));
    kernels.scores(t);
  });
}

void choose_by_labels(const LabelArgs& a, const ChooseRule& rule, int32_t* keys, int64_t* found,
                      int threads) {
  const std::vector<LabelTask> tasks = label_tasks(a);
  parallel_tasks(static_cast<int64_t>(tasks.size()), threads,
                 [&](int64_t i) { choose_task(tasks[i], rule, keys, found); });
}

void tile_lengths(const int64_t* found, int64_t rows, int64_t most, int64_t tile,
                  int16_t* lengths) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t begin = 0; begin < most; begin += tile) {
      *lengths++ = static_cast<int16_t>(std::clamp<int64_t>(found[row] - begin, 0, tile));
    }
  }
}

void largest_keys(const float* scores, int64_t rows, int64_t n, int64_t k, int64_t* keys,
                  int threads) {
  const SelectKernels& kernels = *active_table().select;
  parallel_tasks(rows, threads, [&](int64_t row) {
    thread_local Scratch memory;
    RankTask t{};
    t.n = n;
    t.count = k;
    t.run = 1;
    t.scores = memory.at_least(n + kRankPad + rank_scratch(n) + n + k + kRankPad);
    t.scratch = reinterpret_cast<int32_t*>(t.scores + n + kRankPad);
    t.keys = t.scratch + rank_scratch(n) + n;
    std::copy_n(scores + row * n, n, t.scores);
    kernels.largest(t);
    std::copy_n(t.keys, k, keys + row * k);
  });
}

int64_t choose_blocks(const BlockChoice& a, int64_t* row_ptr, int32_t* col, int threads) {
  const SelectKernels& kernels = *active_table().select;
  // Every row writes where the longest rows before it would end; then gaps are closed, in order.
  const int64_t rows = a.planes * a.n, count = std::min(a.count, a.n);
  const auto dense = [&](int64_t row) {
    return a.dense_from && row % a.n >= a.dense_from[row / a.n / a.heads];
  };
  std::vector<int64_t> begin(rows + 1, 0), found(rows, 0);
  for (int64_t row = 0; row < rows; ++row) begin[row + 1] = begin[row] + (dense(row) ? a.n : count);
  parallel_tasks(rows, threads, [&](int64_t row) {
    const float* const scores = a.scores + row * a.n;
    int32_t* const kept = col + begin[row];
    const auto keep = [&](int64_t place) {
      if (scores[place] > -kInfinity) kept[found[row]++] = static_cast<int32_t>(place);
    };
    if (dense(row)) {
      for (int64_t place = 0; place < a.n; ++place) keep(place);
      return;
    }
    if (count == 0) return;
    thread_local Scratch memory;
    RankTask t{};
    t.n = a.n;
    t.count = count;
    t.run = 1;
    t.scores = memory.at_least(a.n + kRankPad + rank_scratch(a.n) + a.n + count + kRankPad);
    t.scratch = reinterpret_cast<int32_t*>(t.scores + a.n + kRankPad);
    t.keys = t.scratch + rank_scratch(a.n) + a.n;
    std::copy_n(scores, a.n, t.scores);
    const int64_t own = row % a.n;
    bool owed = a.own && scores[own] > -kInfinity;
    if (owed) t.scores[own] = kInfinity;
    kernels.largest(t);
    for (int64_t i = 0; i < count; ++i) {
      if (owed && t.keys[i] >= own) {
        if (t.keys[i] > own) keep(own);  // NaN took all places: none of the others is kept
        owed = false;
      }
      keep(t.keys[i]);
    }
    if (owed) keep(own);
  });
  int64_t total = 0;
  for (int64_t row = 0; row < rows; ++row) {
    row_ptr[row + row / a.n] = total;
    std::copy_n(col + begin[row], found[row], col + total);
    total += found[row];
    if (row % a.n == a.n - 1) row_ptr[row + row / a.n + 1] = total;
  }
  return total;
}

void pool_rows(const PoolArgs& a, int threads) {
  const SelectKernels& kernels = *active_table().select;
  const int64_t blocks = (a.length + a.block - 1) / a.block;
  const int64_t bytes = a.type == 0 ? 4 : 2;
  parallel_tasks(a.batches * a.heads, threads, [&](int64_t plane) {
    const auto* const base = static_cast<const char*>(a.x) +
                             (plane / a.heads * a.batch + plane % a.heads * a.head) * bytes;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t at = (plane * blocks + block) * a.stride;
      const int64_t first = block * a.block;
      kernels.pool({base + first * a.row * bytes, a.type, std::min(a.block, a.length - first),
                    a.row, a.dim, a.most ? a.most + at : nullptr, a.least ? a.least + at : nullptr,
                    a.mean ? a.mean + at : nullptr});
    }
  });
}

void pack_codes(const float* x, int64_t rows, int64_t width, int bits, uint8_t* codes, float* span,
                int threads) {
  const int64_t bytes = width * bits / 8;
  parallel_tasks((rows + kPackRows - 1) / kPackRows, threads, [&](int64_t task) {
    const int64_t end = std::min((task + 1) * kPackRows, rows);
    for (int64_t row = task * kPackRows; row < end; ++row) {
      pack_row(x + row * width, width, bits, codes + row * bytes, span + 2 * row);
    }
  });
}

}  // namespace aerogel
