#include "plan_gemv.h"

namespace aerogel {
namespace {

// What an op multiplies, for either kind of product.
template <class Product, class LinearOnVector>
Product on_vector(const LinearOnVector& op, const Frame& frame) {
  Product product;
  product.weight = op.weight.get();
  product.bias = op.bias.empty() ? nullptr : op.bias.data();
  product.x = frame.operand(op.inputs[0]).data;
  product.y = frame.operand(op.output).data;
  product.residual = op.epilogue.residual ? frame.operand(op.inputs[1]).data : nullptr;
  product.activation = op.epilogue.activation;
  return product;
}

}  // namespace

GemvOp::GemvOp(const BlockRows& source, const StoredValues& values, const float* bias_data,
               Epilogue epilogue)
    : source(source), stored(values), epilogue(epilogue) {
  if (bias_data) bias.assign(bias_data, bias_data + source.rows);
}

void GemvOp::prepare(const std::vector<Value>&, const KernelTable&) {
  weight = std::make_unique<GemvWeight>(source, stored);
}

int64_t GemvOp::scratch_floats() const { return gemv_scratch_floats(*weight, 1); }

int64_t GemvOp::tasks(const Frame& frame) const {
  return worthwhile_tasks(weight->stream().tiles, weight->nbytes() / 4, frame.threads);
}

void GemvOp::run(const Frame& frame, int64_t task, int64_t tasks, float* scratch) const {
  const auto product = on_vector<GemvProduct>(*this, frame);
  const int64_t tiles = weight->stream().tiles;
  for (int64_t t = tiles * task / tasks; t < tiles * (task + 1) / tasks; ++t) {
    gemv_run_tile(product, t, scratch);
  }
}

NmOp::NmOp(const BlockRows& source, const StoredValues& values, int n, int m,
           const float* bias_data, Epilogue epilogue)
    : source(source), stored(values), n(n), m(m), epilogue(epilogue) {
  if (bias_data) bias.assign(bias_data, bias_data + source.rows);
}

void NmOp::prepare(const std::vector<Value>&, const KernelTable&) {
  weight = std::make_unique<NmWeight>(source, stored, n, m);
}

int64_t NmOp::scratch_floats() const { return nm_scratch_floats(*weight); }

int64_t NmOp::tasks(const Frame& frame) const {
  return worthwhile_tasks(nm_tiles(*weight), weight->nbytes() / 4, frame.threads);
}

void NmOp::run(const Frame& frame, int64_t task, int64_t tasks, float* scratch) const {
  const auto product = on_vector<NmProduct>(*this, frame);
  const int64_t tiles = nm_tiles(*weight);
  for (int64_t t = tiles * task / tasks; t < tiles * (task + 1) / tasks; ++t) {
    nm_run_tile(product, t, scratch);
  }
}

}  // namespace aerogel
