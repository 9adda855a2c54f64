// Cutting attention over codes into parts, and running them.
#include "attention_codes.h"

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace aerogel {
namespace {

// Heads of a group and rows of queries that share a task, kDecodeColumns at most.
std::vector<AttendTask> query_tasks(AttendArgs& a) {
  const int64_t group = a.q_heads / a.kv_heads;
  const int64_t together = std::min(group, kDecodeColumns);
  a.block_q = std::max<int64_t>(1, kDecodeColumns / together);
  std::vector<AttendTask> tasks;
  for (int64_t b = 0; b < a.batches; ++b) {
    for (int64_t kv = 0; kv < a.kv_heads; ++kv) {
      for (int64_t g = 0; g < group; g += together) {
        for (int64_t q = 0; q < query_tiles(a); ++q) {
          AttendTask t{};
          t.part_columns = kDecodeColumns;
          t.args = &a;
          t.batch = b;
          t.head = kv * group + g;
          t.heads = std::min(together, group - g);
          t.q_tile = q;
          tasks.push_back(t);
        }
      }
    }
  }
  return tasks;
}

// `results` counts the parts of all tasks so far.
void cut_parts(const AttendTask& task, const CodedSegment* segments, int64_t count,
               int64_t& results, std::vector<CodedTask>& parts) {
  for (int64_t s = 0; s < count; ++s) {
    const int64_t tokens = segments[s].counts[task.batch];
    const int64_t tiles = (tokens + kCodedTokens - 1) / kCodedTokens;
    for (int64_t begin = 0; begin < tiles; begin += kCodedTiles) {
      const int64_t end = std::min(begin + kCodedTiles, tiles);
      parts.push_back({task, segments + s, begin, end, results++});
    }
  }
}

}  // namespace

void attend_coded(AttendArgs a, const CodedSegment* segments, int64_t count,
                  const CodedPrior& prior, int threads) {
  if (a.batches == 0 || a.q_len == 0) return;
  const AttendKernels& kernels = *active_table().attention;
  const std::vector<AttendTask> tasks = query_tasks(a);
  std::vector<CodedTask> parts;
  std::vector<int64_t> first;
  int64_t results = 0;
  for (const AttendTask& task : tasks) {
    first.push_back(results);
    if (prior.lse) ++results;
    cut_parts(task, segments, count, results, parts);
  }
  first.push_back(results);
  thread_local Scratch kept;
  float* const memory = kept.at_least(std::max<int64_t>(1, results) * attend_part(a, kDecodeColumns));
  parallel_tasks(static_cast<int64_t>(parts.size()), threads, [&](int64_t i) {
    thread_local Scratch scratch;
    CodedTask t = parts[i];
    t.task.part = memory + t.result * attend_part(a, kDecodeColumns);
    t.task.scratch = scratch.at_least(coded_scratch(a));
    kernels.coded_part(t);
  });
  Scratch scratch;
  for (size_t i = 0; i < tasks.size(); ++i) {
    AttendMerge merge{tasks[i], memory + first[i] * attend_part(a, kDecodeColumns), first[i + 1] - first[i]};
    merge.task.scratch = scratch.at_least(attend_scratch(a, kDecodeColumns, false));
    if (prior.lse) {
      CodedPrior own = prior;
      own.task = tasks[i];
      own.task.part = memory + first[i] * attend_part(a, kDecodeColumns);
      kernels.coded_prior(own);
    }
    kernels.decode_merge(merge);
  }
}

}  // namespace aerogel
