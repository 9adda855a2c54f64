// Operations with sparse weights: products on every column, and convolutions.
#include <algorithm>
#include <limits>

#include "plan_ops.h"

namespace aerogel {

// sparse 1x1 convolution, linear

SpmmOp::SpmmOp(const BlockRows& source, const float* bias_data, const SpmmVariant& variant,
               Epilogue epilogue)
    : source(source), variant(variant), epilogue(epilogue) {
  if (bias_data) bias.assign(bias_data, bias_data + source.rows);
}

void SpmmOp::prepare(const std::vector<Value>& values, const KernelTable&) {
  weight = std::make_unique<SpmmWeight>(source, variant, values[inputs[0]].ld);
}

namespace {

SpmmArgs product_args(const Op& op, const Frame& frame, const std::vector<float>& bias,
                      Epilogue epilogue) {
  const Operand x = frame.operand(op.inputs[0]), y = frame.operand(op.output);
  SpmmArgs args;
  args.bias = bias.empty() ? nullptr : bias.data();
  args.x = x.data;
  args.ldx = x.ld;
  args.y = y.data;
  args.ldy = y.ld;
  if (epilogue.residual) {
    const Operand residual = frame.operand(op.inputs[1]);
    args.residual = residual.data;
    args.ldr = residual.ld;
  }
  args.columns = y.columns;
  args.activation = epilogue.activation;
  return args;
}

}  // namespace

// Planes of fewer are shared by outputs. A row of them is a few cache lines, and cores that wrote halves
// of it would take lines from each other.
constexpr int64_t kSharedPixels = 256;

SpmmArgs SpmmOp::args(const Frame& frame) const {
  SpmmArgs args = product_args(*this, frame, bias, epilogue);
  args.weight = weight.get();
  args.padded = args.ldx > 1 && args.ldy > 1;
  if (frame.values[output].height > 1) args.shared_columns = kSharedPixels;
  return args;
}

int64_t SpmmOp::tasks(const Frame& frame) const {
  return spmm_task_count(args(frame), frame.threads);
}

void SpmmOp::run(const Frame& frame, int64_t task, int64_t tasks, float*) const {
  spmm_run_task(args(frame), task, tasks);
}

RowReach SpmmOp::row_reach() const {
  return {1, 1, 0, std::numeric_limits<int64_t>::max(), 1};
}

void SpmmOp::run_rows(const Frame& frame, const RowPlaces& places, float*) const {
  const Value& value = frame.values[output];
  const int64_t first = places.rows.first * value.width;
  SpmmArgs args = product_args(*this, frame, bias, epilogue);
  args.weight = weight.get();
  args.x = places.x.data + first;
  args.ldx = places.x.ld;
  args.y = places.y.data + first;
  args.ldy = places.y.ld;
  if (epilogue.residual) {
    args.residual = places.residual.data + first;
    args.ldr = places.residual.ld;
  }
  args.columns = places.rows.last * value.width - first;
  // Else the last vector would go over rows of another thread, or over the next channel's first ones.
  const bool to_end = places.rows.last == value.height && first % kLineFloats == 0;
  args.padded = places.spare || args.columns % kLineFloats == 0 || to_end;
  const int64_t tasks = spmm_task_count(args, 1);
  for (int64_t task = 0; task < tasks; ++task) spmm_run_task(args, task, tasks);
}

// sparse convolution

SparseConvOp::SparseConvOp(const BlockRows& source, const float* bias_data, int64_t groups,
                           const Window& window, const SpmmVariant& variant, Epilogue epilogue)
    : source(source), groups(groups), window(window), variant(variant), epilogue(epilogue) {
  if (bias_data) bias.assign(bias_data, bias_data + source.rows);
}

void SparseConvOp::prepare(const std::vector<Value>& values, const KernelTable&) {
  const int64_t images = on_group ? values[output].images : 1;
  weight = std::make_unique<SparseConvWeight>(source, groups, window, variant, images);
}

bool SparseConvOp::takes_group(int64_t) const { return StripLayout::takes_group(window); }

bool SparseConvOp::reads_picked() const { return is_point(window); }

std::unique_ptr<Op> SparseConvOp::pick_columns() {
  auto pick = std::make_unique<PickOp>(window);
  window = over_picked(window);
  return pick;
}

SparseConvArgs SparseConvOp::args(const Frame& frame) const {
  SparseConvArgs args{weight.get(), product_args(*this, frame, bias, epilogue)};
  args.product.padded = on_group;
  return args;
}

int64_t SparseConvOp::tasks(const Frame& frame) const {
  return sparse_conv_task_count(args(frame), frame.threads);
}

void SparseConvOp::run(const Frame& frame, int64_t task, int64_t tasks, float*) const {
  sparse_conv_run_task(args(frame), task, tasks);
}

RowReach SparseConvOp::row_reach() const { return reach_of(window, 1); }

void SparseConvOp::run_rows(const Frame& frame, const RowPlaces& places, float*) const {
  const auto [first, last] = places.rows;
  const RowReach reach = row_reach();
  const int64_t from = first_needed(reach, first);  // first row of the input
  Window rows = window;
  rows.pad_h = from - (first * window.stride_h - window.pad_h);
  rows.in_h = std::max<int64_t>(0, end_needed(reach, last) - from);
  rows.out_h = last - first;
  SparseConvArgs args = this->args(frame);
  SpmmArgs& product = args.product;
  product.x = places.x.data + from * window.in_w;
  product.ldx = places.x.ld;
  product.y = places.y.data + first * window.out_w;
  product.ldy = places.y.ld;
  product.columns = rows.out_h * rows.out_w;
  if (epilogue.residual) {
    product.residual = places.residual.data + first * window.out_w;
    product.ldr = places.residual.ld;
  }
  sparse_conv_run_rows(args, rows);
}

}  // namespace aerogel
