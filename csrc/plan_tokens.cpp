#include "plan_tokens.h"

#include <algorithm>
#include <cstring>

namespace aerogel {

namespace {

constexpr int64_t kNormGrain = 32;  // columns whose rows fill two cache lines

struct Share {
  int64_t first, last;

  Share(int64_t units, int64_t task, int64_t tasks)
      : first(units * task / tasks), last(units * (task + 1) / tasks) {}
};

}  // namespace

// layer normalisation

NormOp::NormOp(int64_t features, const float* weight_data, const float* bias_data, float epsilon)
    : weight(static_cast<size_t>(features), 1.0f),
      bias(static_cast<size_t>(features), 0.0f),
      epsilon(epsilon) {
  if (weight_data) std::copy_n(weight_data, features, weight.data());
  if (bias_data) std::copy_n(bias_data, features, bias.data());
}

void NormOp::prepare(const std::vector<Value>&, const KernelTable& table) {
  kernels = table.tokens;
}

int64_t NormOp::tasks(const Frame& frame) const {
  const Operand y = frame.operand(output);
  const int64_t units = (y.columns + kNormGrain - 1) / kNormGrain;
  return worthwhile_tasks(units, 2 * y.channels * y.columns, frame.threads);
}

void NormOp::run(const Frame& frame, int64_t task, int64_t tasks, float*) const {
  const Operand x = frame.operand(inputs[0]), y = frame.operand(output);
  const NormArgs args{x.data,    x.ld,          y.data,      y.ld,   x.channels,
                      x.columns, weight.data(), bias.data(), epsilon};
  const Share units((y.columns + kNormGrain - 1) / kNormGrain, task, tasks);
  kernels->layer_norm(args, units.first * kNormGrain,
                      std::min(units.last * kNormGrain, y.columns));
}

// attention

void AttentionOp::prepare(const std::vector<Value>&, const KernelTable& table) {
  kernels = table.tokens;
}

int64_t AttentionOp::scratch_floats() const {
  return attention_scratch(shape.head_dim, shape.value_dim, keys, kernels->tile);
}

int64_t AttentionOp::tasks(const Frame& frame) const {
  const int64_t units =
      shape.sequences * shape.heads * attention_panels(queries, kernels->tile);
  const int64_t work = shape.sequences * shape.heads * queries * keys *
                       (shape.head_dim + shape.value_dim);
  return worthwhile_tasks(units, work, frame.threads);
}

void AttentionOp::add_mask(const Frame& frame, int64_t sequence, int64_t head,
                           AttentionArgs* args) const {
  if (inputs.size() < 4) return;
  const Operand mask = frame.operand(inputs[3]);
  int64_t column = shape.mask_per_sequence ? sequence : 0;
  column = shape.mask_per_head ? column * shape.heads + head : column;
  args->mask = mask.data + (shape.mask_per_query ? column * queries : column);
  args->ldm = mask.ld;
  args->mask_per_query = shape.mask_per_query;
}

void AttentionOp::run(const Frame& frame, int64_t task, int64_t tasks, float* scratch) const {
  const Operand q = frame.operand(inputs[0]), k = frame.operand(inputs[1]);
  const Operand v = frame.operand(inputs[2]), y = frame.operand(output);
  const int64_t panels = attention_panels(queries, kernels->tile);
  const Share units(shape.sequences * shape.heads * panels, task, tasks);
  for (int64_t unit = units.first; unit < units.last;) {  // panels vary fastest
    const int64_t panel = unit % panels, head = unit / panels % shape.heads;
    const int64_t sequence = unit / panels / shape.heads, shared = head / shape.groups;
    const int64_t count = std::min(panels - panel, units.last - unit);
    AttentionArgs args{};
    args.q = q.data + (shape.q_row + head * shape.head_dim) * q.ld + sequence * queries;
    args.ldq = q.ld;
    args.k = k.data + (shape.k_row + shared * shape.head_dim) * k.ld + sequence * keys;
    args.ldk = k.ld;
    args.v = v.data + (shape.v_row + shared * shape.value_dim) * v.ld + sequence * keys;
    args.ldv = v.ld;
    args.y = y.data + head * shape.value_dim * y.ld + sequence * queries;
    args.ldy = y.ld;
    args.head_dim = shape.head_dim;
    args.value_dim = shape.value_dim;
    args.queries = queries;
    args.keys = keys;
    args.scale = shape.scale;
    args.empty_is_zero = shape.empty_is_zero;
    add_mask(frame, sequence, head, &args);
    kernels->attention(args, panel, panel + count, scratch);
    unit += count;
  }
}

// columns

int64_t ColumnsOp::tasks(const Frame& frame) const {
  const Operand y = frame.operand(output);
  return worthwhile_tasks(y.channels, y.channels * y.columns, frame.threads);
}

void ColumnsOp::run(const Frame& frame, int64_t task, int64_t tasks, float*) const {
  const Operand x = frame.operand(inputs[0]), y = frame.operand(output);
  const Share c(y.channels, task, tasks);
  for (int64_t i = c.first; i < c.last; ++i) {
    const float* from = x.data + i * x.ld + start;
    float* to = y.data + i * y.ld;
    for (int64_t j = 0; j < y.columns; ++j) to[j] = from[j * step];
  }
}

int64_t ConcatOp::tasks(const Frame& frame) const {
  const Operand y = frame.operand(output);
  return worthwhile_tasks(y.channels, y.channels * y.columns, frame.threads);
}

void ConcatOp::run(const Frame& frame, int64_t task, int64_t tasks, float*) const {
  const Operand y = frame.operand(output);
  const Share c(y.channels, task, tasks);
  float* to = y.data;
  for (int input : inputs) {
    const Operand x = frame.operand(input);
    for (int64_t i = c.first; i < c.last; ++i) {
      std::memcpy(to + i * y.ld, x.data + i * x.ld, static_cast<size_t>(x.columns) * sizeof(float));
    }
    to += x.columns;
  }
}

}  // namespace aerogel
