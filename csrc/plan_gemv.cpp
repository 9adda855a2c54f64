#include "plan_gemv.h"

namespace aerogel {

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
  GemvProduct product;
  product.weight = weight.get();
  product.bias = bias.empty() ? nullptr : bias.data();
  product.x = frame.operand(inputs[0]).data;
  product.y = frame.operand(output).data;
  product.residual = epilogue.residual ? frame.operand(inputs[1]).data : nullptr;
  product.activation = epilogue.activation;
  const int64_t tiles = weight->stream().tiles;
  for (int64_t t = tiles * task / tasks; t < tiles * (task + 1) / tasks; ++t) {
    gemv_run_tile(product, t, scratch);
  }
}

}  // namespace aerogel
