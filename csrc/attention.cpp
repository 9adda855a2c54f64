// Cutting attention into tasks, and running them.
#include "attention.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace aerogel {
namespace {

constexpr int64_t kTaskColumns = 256;  // queries of one task, unless one head's tile has more
constexpr int64_t kMostColumns = 512;  // whose panels fit in a task's table on every machine
constexpr int64_t kPanelPartKeys = 2048;  // keys in one part where queries fill panels,
constexpr size_t kFewTasks = 8;           // and so few lists are there that threads would idle
constexpr int64_t kSegmentsPerThread = 2;  // of the keys, where heads do not give work enough
constexpr int64_t kSegmentKeys = 64;       // at least so many keys in one

void check_tiles(const AttendArgs& a) {
  const int64_t rows = a.plan_batches * a.plan_heads * query_tiles(a);
  for (int64_t r = 0; r < rows; ++r) {
    if (a.tile_ptr[r] > a.tile_ptr[r + 1]) {
      throw std::invalid_argument("tile_ptr: falls from " + std::to_string(a.tile_ptr[r]) +
                                  " at row " + std::to_string(r));
    }
  }
  if (a.tile_ptr[0] != 0 || a.tile_ptr[rows] != a.tiles) {
    throw std::invalid_argument("tile_ptr: expected 0 to " + std::to_string(a.tiles) + ", got " +
                                std::to_string(a.tile_ptr[0]) + " to " +
                                std::to_string(a.tile_ptr[rows]));
  }
  for (int64_t t = 0; t < a.tiles; ++t) {
    const bool gather = a.kind[t] & kTileGather;
    const int64_t first = a.start[t], last = first + a.length[t];
    const int64_t most = gather ? a.gathers : a.k_len;
    if (a.length[t] < 0 || a.length[t] > kStepKeys || first < 0 || last > most) {
      throw std::invalid_argument("tile " + std::to_string(t) + ": start=" + std::to_string(first) +
                                  ", length=" + std::to_string(a.length[t]) + ", expected at most " +
                                  std::to_string(kStepKeys) + " within 0 to " +
                                  std::to_string(most));
    }
  }
  for (int64_t i = 0; i < a.gathers; ++i) {
    if (a.gather_idx[i] < 0 || a.gather_idx[i] >= a.k_len) {
      throw std::invalid_argument("gather_idx[" + std::to_string(i) +
                                  "]=" + std::to_string(a.gather_idx[i]) + ": expected 0 to " +
                                  std::to_string(a.k_len - 1));
    }
  }
  if (a.block_q > kMostColumns) {
    throw std::invalid_argument("block_q=" + std::to_string(a.block_q) + ": expected at most " +
                                std::to_string(kMostColumns));
  }
}

int64_t group_of(const AttendArgs& a) { return a.q_heads / a.kv_heads; }

// Query heads of a key head that one task takes: those that share its keys, if not too many.
int64_t heads_together(const AttendArgs& a) {
  if (a.plan_heads == a.q_heads && a.plan_heads != a.kv_heads) return 1;
  const int64_t rows = std::min(a.block_q, a.q_len);
  return std::clamp<int64_t>(kTaskColumns / std::max<int64_t>(rows, 1), 1, group_of(a));
}

AttendTask task_of(const AttendArgs& a, int64_t batch, int64_t head, int64_t heads,
                   int64_t q_tile) {
  AttendTask t{};
  t.args = &a;
  t.batch = batch;
  t.head = head;
  t.heads = heads;
  t.q_tile = q_tile;
  const int64_t plan_head = a.plan_heads == 1           ? 0
                            : a.plan_heads == a.q_heads ? head
                                                        : head / group_of(a);
  const int64_t plan_batch = a.plan_batches == 1 ? 0 : batch;
  const int64_t row = (plan_batch * a.plan_heads + plan_head) * query_tiles(a) + q_tile;
  t.tile_begin = a.tile_ptr[row];
  t.tile_end = a.tile_ptr[row + 1];
  t.key_begin = 0;
  t.key_end = a.k_len;
  return t;
}

// Every query once; the heads of a group together where they share their keys.
std::vector<AttendTask> query_tasks(const AttendArgs& a) {
  std::vector<AttendTask> tasks;
  const int64_t group = group_of(a), together = heads_together(a);
  for (int64_t b = 0; b < a.batches; ++b) {
    for (int64_t kv = 0; kv < a.kv_heads; ++kv) {
      for (int64_t g = 0; g < group; g += together) {
        const int64_t heads = std::min(together, group - g);
        for (int64_t q = 0; q < query_tiles(a); ++q) {
          tasks.push_back(task_of(a, b, kv * group + g, heads, q));
        }
      }
    }
  }
  return tasks;
}

// Queries of the largest task.
int64_t most_columns(const AttendArgs& a) {
  return heads_together(a) * std::min(a.block_q, a.q_len);
}

int64_t columns_of(const AttendTask& t) {
  return t.heads * std::min(t.args->block_q, t.args->q_len);
}

void run_forward(std::vector<AttendTask>& tasks, int threads) {
  const AttendKernels& kernels = *active_table().attention;
  if (threads > 1) {  // the longest first, so that none is left alone at the end
    std::stable_sort(tasks.begin(), tasks.end(), [](const AttendTask& x, const AttendTask& y) {
      return (x.tile_end - x.tile_begin) * x.heads > (y.tile_end - y.tile_begin) * y.heads;
    });
  }
  parallel_tasks(static_cast<int64_t>(tasks.size()), threads, [&](int64_t i) {
    thread_local Scratch scratch;
    AttendTask t = tasks[i];
    t.scratch = scratch.at_least(attend_scratch(*t.args, columns_of(t), false));
    if (threads <= 1) {  // more do not know who comes next
      t.fetched = i > 0;
      t.next = i + 1 < static_cast<int64_t>(tasks.size()) ? &tasks[i + 1] : nullptr;
    }
    kernels.forward(t);
  });
}

// The parts of a task's list, at least one; cut between tiles.
void cut_parts(const AttendTask& task, int64_t part_keys, std::vector<AttendTask>& parts) {
  const AttendArgs& a = *task.args;
  AttendTask part = task;
  int64_t keys = 0;
  for (int64_t tile = task.tile_begin; tile < task.tile_end; ++tile) {
    if (keys >= part_keys) {
      part.tile_end = tile;
      parts.push_back(part);
      part.tile_begin = tile;
      part.tile_end = task.tile_end;
      keys = 0;
    }
    keys += a.length[tile];
  }
  parts.push_back(part);
}

// Whether threads could be left without work: the number of threads plays no part, so that it
// changes no result.
bool has_few_long_lists(const AttendArgs& a, const std::vector<AttendTask>& tasks) {
  if (tasks.size() >= kFewTasks) return false;
  return std::any_of(tasks.begin(), tasks.end(), [&](const AttendTask& t) {
    return std::accumulate(a.length + t.tile_begin, a.length + t.tile_end, int64_t{0}) >
           kPanelPartKeys;
  });
}

// Cuts every list into parts of `part_keys` and merges what `kernel` finds in them, in order.
void run_parts(const AttendArgs& a, std::vector<AttendTask>& tasks,
               void (*kernel)(const AttendTask&), int64_t part_keys, int threads) {
  const AttendKernels& kernels = *active_table().attention;
  const int64_t columns = most_columns(a), size = attend_part(a, columns);
  std::vector<AttendTask> parts;
  std::vector<int64_t> first{0};
  for (AttendTask& task : tasks) {
    task.part_columns = columns;
    cut_parts(task, part_keys, parts);
    first.push_back(static_cast<int64_t>(parts.size()));
  }
  std::vector<float> results(parts.size() * size);
  const int64_t floats = attend_scratch(a, columns, false);
  parallel_tasks(static_cast<int64_t>(parts.size()), threads, [&](int64_t i) {
    thread_local Scratch scratch;
    AttendTask t = parts[i];
    t.part = results.data() + i * size;
    t.scratch = scratch.at_least(floats);
    kernel(t);
  });
  Scratch scratch;
  for (size_t i = 0; i < tasks.size(); ++i) {
    AttendMerge merge{tasks[i], results.data() + first[i] * size,
                      first[i + 1] - first[i]};
    merge.task.scratch = scratch.at_least(floats);
    kernels.decode_merge(merge);
  }
}

// All tasks of one key head, one after the other; keys in [begin, end) only.
struct HeadShare {
  int64_t batch, kv_head, key_begin, key_end, q_begin, q_end;
  bool grad_q, grad_kv;
  uint8_t* seen;  // per key: its gradients have been begun, zeros at first
};

int64_t bias_copy(const AttendArgs& a, int64_t batch, int64_t kv_head) {
  const int64_t heads = a.plan_heads == 1 ? a.kv_heads : 1;
  return (a.plan_batches == 1 ? batch : 0) * heads + (a.plan_heads == 1 ? kv_head : 0);
}

// Keys that no query of the share reads have gradients of zero.
void zero_unseen(const AttendArgs& a, const HeadShare& share) {
  const int64_t dim = padded_dim(a.dim), value_dim = padded_dim(a.value_dim);
  const int64_t at = (share.batch * a.kv_heads + share.kv_head) * a.k_len;
  for (int64_t key = share.key_begin; key < share.key_end; ++key) {
    if (share.seen[key]) continue;
    std::fill_n(a.grad_k + (at + key) * dim, dim, 0.0f);
    std::fill_n(a.grad_v + (at + key) * value_dim, value_dim, 0.0f);
  }
}

void run_share(const AttendArgs& a, const HeadShare& share) {
  thread_local Scratch scratch;
  const AttendKernels& kernels = *active_table().attention;
  const int64_t group = group_of(a), together = heads_together(a);
  std::vector<AttendTask> tasks;
  for (int64_t q = share.q_begin; q < share.q_end; ++q) {
    for (int64_t g = 0; g < group; g += together) {
      const int64_t heads = std::min(together, group - g);
      AttendTask t = task_of(a, share.batch, share.kv_head * group + g, heads, q);
      t.key_begin = share.key_begin;
      t.key_end = share.key_end;
      t.grad_q = share.grad_q;
      t.grad_kv = share.grad_kv;
      t.bias_copy = bias_copy(a, share.batch, share.kv_head);
      t.seen = share.seen;
      t.fetched = !tasks.empty();
      tasks.push_back(t);
    }
  }
  for (size_t i = 0; i < tasks.size(); ++i) {
    AttendTask& t = tasks[i];
    t.scratch = scratch.at_least(attend_scratch(a, columns_of(t), true));
    t.next = i + 1 < tasks.size() ? &tasks[i + 1] : nullptr;
    kernels.backward(t);
  }
  if (share.grad_kv) zero_unseen(a, share);
}

}  // namespace

void attend_forward(const AttendArgs& a, int threads) {
  check_tiles(a);
  if (a.batches == 0 || a.q_len == 0) return;
  std::vector<AttendTask> tasks = query_tasks(a);
  const AttendKernels& kernels = *active_table().attention;
  const bool plain = !a.linear && !a.drop_below;  // panels know the rest, parts do not
  if (plain && most_columns(a) <= kDecodeColumns) {
    run_parts(a, tasks, kernels.decode, kPartKeys, threads);
  } else if (plain && has_few_long_lists(a, tasks)) {
    run_parts(a, tasks, kernels.forward, kPanelPartKeys, threads);
  } else {
    run_forward(tasks, threads);
  }
}

int64_t attend_bias_copies(const AttendArgs& a) {
  return (a.plan_batches == 1 ? a.batches : 1) * (a.plan_heads == 1 ? a.kv_heads : 1);
}

// Gradients of keys are summed over queries in ascending order whoever does it, and those of
// queries over keys: whether one task does both or two do one each changes no bit.
void attend_backward(const AttendArgs& a, int threads) {
  check_tiles(a);
  std::vector<HeadShare> shares;
  const int64_t heads = a.batches * a.kv_heads, tiles = query_tiles(a);
  const bool whole = threads == 1 || heads >= threads;
  const int64_t most = std::max<int64_t>(1, (a.k_len + kSegmentKeys - 1) / kSegmentKeys);
  const int64_t segments = std::min<int64_t>(most, kSegmentsPerThread * threads);
  std::vector<uint8_t> seen(heads * a.k_len);
  for (int64_t b = 0; b < a.batches; ++b) {
    for (int64_t kv = 0; kv < a.kv_heads; ++kv) {
      uint8_t* const own = seen.data() + (b * a.kv_heads + kv) * a.k_len;
      if (whole) {
        shares.push_back({b, kv, 0, a.k_len, 0, tiles, true, true, own});
        continue;
      }
      for (int64_t q = 0; q < tiles; ++q) {
        shares.push_back({b, kv, 0, a.k_len, q, q + 1, true, false, own});
      }
      for (int64_t s = 0; s < segments; ++s) {
        const int64_t begin = a.k_len * s / segments, end = a.k_len * (s + 1) / segments;
        shares.push_back({b, kv, begin, end, 0, tiles, false, true, own});
      }
    }
  }
  parallel_tasks(static_cast<int64_t>(shares.size()), threads,
                 [&](int64_t i) { run_share(a, shares[i]); });
}

}  // namespace aerogel
