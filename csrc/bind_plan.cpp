// The builder's and the plan's face to Python. Shapes are validated there, with errors that name the
// argument; here only what would read or write out of bounds is refused. Tensors come as addresses
// (data_ptr), which costs a third of a microsecond for a call instead of ten.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "bindings.h"
#include "plan_gemv.h"
#include "plan_group.h"
#include "plan_ops.h"
#include "plan_tokens.h"

namespace nb = nanobind;

namespace aerogel {
namespace {

using Address = uintptr_t;

const float* floats(Address address) { return reinterpret_cast<const float*>(address); }

class Builder {
 public:
  explicit Builder(int64_t batch) {
    if (batch < 1) throw std::invalid_argument("batch: expected at least 1");
    graph_.batch = batch;
  }
  Builder(const Builder&) = delete;
  Builder& operator=(const Builder&) = delete;

  int input(int64_t channels, int64_t height, int64_t width, bool vector, bool tokens) {
    const int v = graph_.add_value(channels, height, width, vector, tokens);
    graph_.inputs.push_back({v, tokens ? Layout::kTokens : Layout::kChannels});
    return v;
  }

  void output(int v, bool tokens) {
    check(v);
    graph_.outputs.push_back({v, tokens ? Layout::kTokens : Layout::kChannels});
  }

  int conv(int x, Address weight, Address bias, int64_t out_channels, int64_t groups,
           const std::vector<int64_t>& geometry, int32_t activation, int residual,
           const std::string& name) {
    const ConvSource source = conv_source(x, weight, bias, out_channels, groups, geometry);
    const Value in = value(x);
    auto op = std::make_unique<ConvOp>(source, epilogue(activation, residual));
    const bool vector = in.ld == 1 && op->columnwise();
    if (vector) op = std::make_unique<LinearOp>(source, op->epilogue);
    const int y = graph_.add_value(out_channels, source.window.out_h, source.window.out_w, vector,
                                   in.tokens && op->columnwise());
    return push(std::move(op), x, residual, y, name);
  }

  int depthwise(int x, Address weight, Address bias, int64_t out_channels,
                const std::vector<int64_t>& geometry, int32_t activation,
                const std::string& name) {
    const int64_t channels = value(x).channels;
    const ConvSource source = conv_source(x, weight, bias, out_channels, channels, geometry);
    auto op = std::make_unique<DepthwiseOp>(source, static_cast<Activation>(activation));
    const int y = graph_.add_value(out_channels, source.window.out_h, source.window.out_w, false,
                                   false);
    return push(std::move(op), x, -1, y, name);
  }

  int linear(int x, Address weight, Address bias, int64_t out_features, int32_t activation,
             int residual, const std::string& name) {
    return conv(x, weight, bias, out_features, 1, {1, 1, 1, 1, 0, 0, 1, 1}, activation, residual,
                name);
  }

  // values, columns (int32), row_ptr (int64): the arrays of BlockRows.
  int spmm(int x, Address values, Address columns, Address row_ptr, int64_t rows, int64_t cols,
           int32_t block, Address bias, const SpmmVariant& variant, int32_t activation,
           int residual, const std::string& name) {
    const Value in = value(x);
    if (cols != in.channels) throw std::invalid_argument("spmm: wrong number of columns");
    const BlockRows source{floats(values), reinterpret_cast<const int32_t*>(columns),
                           reinterpret_cast<const int64_t*>(row_ptr), rows, cols, block};
    auto op = std::make_unique<SpmmOp>(source, bias ? floats(bias) : nullptr, variant,
                                       epilogue(activation, residual));
    const int y = graph_.add_value(rows, in.height, in.width, in.ld == 1, in.tokens);
    return push(std::move(op), x, residual, y, name);
  }

  // As spmm, on a vector; values as stored_values.h says.
  int gemv(int x, Address values, int32_t type, Address scales, Address columns, Address row_ptr,
           int64_t rows, int64_t cols, int32_t block, Address bias, int32_t activation,
           int residual, const std::string& name) {
    const Value in = value(x);
    if (cols != in.channels || in.columns() != 1 || in.ld != 1) {
      throw std::invalid_argument("gemv: expected a vector of " + std::to_string(cols));
    }
    const BlockRows source{nullptr, reinterpret_cast<const int32_t*>(columns),
                           reinterpret_cast<const int64_t*>(row_ptr), rows, cols, block};
    const StoredValues stored{reinterpret_cast<const void*>(values), static_cast<ValueType>(type),
                              scales ? floats(scales) : nullptr};
    auto op = std::make_unique<GemvOp>(source, stored, bias ? floats(bias) : nullptr,
                                       epilogue(activation, residual));
    const int y = graph_.add_value(rows, 1, 1, true, false);
    return push(std::move(op), x, residual, y, name);
  }

  // As gemv, for a weight of single rows that is n:m along its inputs.
  int nm(int x, Address values, int32_t type, Address scales, Address columns, Address row_ptr,
         int64_t rows, int64_t cols, int n, int m, Address bias, int32_t activation, int residual,
         const std::string& name) {
    const Value in = value(x);
    if (cols != in.channels || in.columns() != 1 || in.ld != 1) {
      throw std::invalid_argument("nm: expected a vector of " + std::to_string(cols));
    }
    const BlockRows source{nullptr, reinterpret_cast<const int32_t*>(columns),
                           reinterpret_cast<const int64_t*>(row_ptr), rows, cols, 1};
    const StoredValues stored{reinterpret_cast<const void*>(values), static_cast<ValueType>(type),
                              scales ? floats(scales) : nullptr};
    auto op = std::make_unique<NmOp>(source, stored, n, m, bias ? floats(bias) : nullptr,
                                     epilogue(activation, residual));
    const int y = graph_.add_value(rows, 1, 1, true, false);
    return push(std::move(op), x, residual, y, name);
  }

  // The arrays of BlockRows, each row a flattened kernel: (in / groups, kernel_h, kernel_w).
  int sparse_conv(int x, Address values, Address columns, Address row_ptr, int64_t rows,
                  int64_t cols, int32_t block, Address bias, int64_t groups,
                  const std::vector<int64_t>& geometry, const SpmmVariant& variant,
                  int32_t activation, int residual, const std::string& name) {
    const Value in = value(x);
    const Window window = make_window(in.height, in.width, geometry);
    if (groups < 1 || cols * groups != in.channels * window.kernel_h * window.kernel_w) {
      throw std::invalid_argument("sparse_conv: wrong number of columns");
    }
    const BlockRows source{floats(values), reinterpret_cast<const int32_t*>(columns),
                           reinterpret_cast<const int64_t*>(row_ptr), rows, cols, block};
    auto op = std::make_unique<SparseConvOp>(source, bias ? floats(bias) : nullptr, groups, window,
                                             variant, epilogue(activation, residual));
    const int y = graph_.add_value(rows, window.out_h, window.out_w, false, false);
    return push(std::move(op), x, residual, y, name);
  }

  int binary(int x, int y, int32_t kind, int32_t activation, const std::string& name) {
    const Value a = value(x), b = value(y);
    const bool broadcast = b.columns() == 1 && a.columns() != 1;
    if (a.channels != b.channels || (!broadcast && a.columns() != b.columns())) {
      throw std::invalid_argument("binary: shapes differ");
    }
    auto op = std::make_unique<BinaryOp>(static_cast<Binary>(kind), broadcast,
                                         static_cast<Activation>(activation));
    const int z = graph_.add_value(a.channels, a.height, a.width, a.ld == 1, a.tokens);
    return push(std::move(op), x, y, z, name);
  }

  int activation(int x, int32_t kind, const std::string& name) {
    const Value a = value(x);
    auto op = std::make_unique<ActivationOp>(static_cast<Activation>(kind));
    const int y = graph_.add_value(a.channels, a.height, a.width, a.ld == 1, a.tokens);
    return push(std::move(op), x, -1, y, name);
  }

  int pool(int x, int32_t kind, const std::vector<int64_t>& geometry, bool ceil_mode,
           const std::string& name) {
    const Window window = make_window(value(x).height, value(x).width, geometry, ceil_mode);
    constexpr int64_t kWidest = 1024;
    if ((window.kernel_w - 1) * window.dilation_w + 1 > kWidest) {
      throw std::invalid_argument("kernel: expected a width of at most 1024");
    }
    const int64_t channels = value(x).channels;
    const int y = graph_.add_value(channels, window.out_h, window.out_w, false, false);
    return push(std::make_unique<PoolOp>(static_cast<Pool>(kind), window), x, -1, y, name);
  }

  int mean(int x, const std::string& name) {
    const int y = graph_.add_value(value(x).channels, 1, 1, true, false);
    return push(std::make_unique<MeanOp>(), x, -1, y, name);
  }

  int reshape(int x, int64_t channels, int64_t height, int64_t width, const std::string& name) {
    const Value a = value(x);
    const int64_t columns = height * width;
    const bool same = columns == a.columns() && channels == a.channels;
    const bool vector = (columns == 1 || a.columns() == 1) &&
                        channels * columns == a.channels * a.columns();
    if (!same && !vector) throw std::invalid_argument("reshape: expected from or to a vector");
    const int y = graph_.add_value(channels, height, width, columns == 1, false);
    return push(std::make_unique<CopyOp>(), x, -1, y, name);
  }

  int constant(Address data, int64_t channels, int64_t height, int64_t width, bool vector) {
    return graph_.add_constant(floats(data), channels, height, width, vector);
  }

  int layer_norm(int x, Address weight, Address bias, float epsilon, const std::string& name) {
    const Value a = value(x);
    auto op = std::make_unique<NormOp>(a.channels, weight ? floats(weight) : nullptr,
                                       bias ? floats(bias) : nullptr, epsilon);
    const int y = graph_.add_value(a.channels, a.height, a.width, a.ld == 1, a.tokens);
    return push(std::move(op), x, -1, y, name);
  }

  int attention(const std::vector<int>& operands, const AttentionShape& shape,
                const std::string& name) {
    for (int operand : operands) check(operand);
    if (operands.size() < 3) throw std::invalid_argument("attention: expected q, k and v");
    const Value q = value(operands[0]), k = value(operands[1]), v = value(operands[2]);
    const int64_t shared = shape.groups > 0 ? shape.heads / shape.groups : 0;
    const auto has_rows = [](const Value& of, int64_t first, int64_t count) {
      return first >= 0 && count > 0 && first + count <= of.channels;
    };
    if (shared < 1 || shape.heads % shape.groups || shape.sequences < 1 ||
        !has_rows(q, shape.q_row, shape.heads * shape.head_dim) ||
        !has_rows(k, shape.k_row, shared * shape.head_dim) ||
        !has_rows(v, shape.v_row, shared * shape.value_dim) || k.columns() != v.columns() ||
        q.columns() % shape.sequences || k.columns() % shape.sequences) {
      throw std::invalid_argument("attention: shapes contradict each other");
    }
    const int64_t queries = q.columns() / shape.sequences, keys = k.columns() / shape.sequences;
    const int64_t masks = (shape.mask_per_sequence ? shape.sequences : 1) *
                          (shape.mask_per_head ? shape.heads : 1) *
                          (shape.mask_per_query ? queries : 1);
    if (operands.size() > 3) {
      const Value mask = value(operands[3]);
      if (mask.channels != keys || mask.columns() != masks) {
        throw std::invalid_argument("mask: expected a row per key");
      }
    }
    auto op = std::make_unique<AttentionOp>(shape, queries, keys);
    const int y = graph_.add_value(shape.heads * shape.value_dim, 1, q.columns(), false, q.tokens);
    push(std::move(op), operands[0], -1, y, name);
    graph_.ops.back()->inputs = operands;
    return y;
  }

  int columns(int x, int64_t start, int64_t step, int64_t count, const std::string& name) {
    const Value a = value(x);
    if (start < 0 || step < 1 || count < 1 || start + (count - 1) * step >= a.columns()) {
      throw std::invalid_argument("columns: expected some that the value has");
    }
    const int y = graph_.add_value(a.channels, 1, count, count == 1, a.tokens && count > 1);
    return push(std::make_unique<ColumnsOp>(start, step), x, -1, y, name);
  }

  int concat(const std::vector<int>& parts, const std::string& name) {
    if (parts.empty()) throw std::invalid_argument("concat: expected at least one value");
    const int64_t channels = value(parts[0]).channels;
    int64_t count = 0;
    for (int part : parts) {
      if (value(part).channels != channels) {
        throw std::invalid_argument("concat: expected values of as many features");
      }
      count += value(part).columns();
    }
    const int y = graph_.add_value(channels, 1, count, false, value(parts.back()).tokens);
    push(std::make_unique<ConcatOp>(), parts[0], -1, y, name);
    graph_.ops.back()->inputs = parts;
    return y;
  }

  Plan* build(int64_t bands_from, int64_t bands_budget, int64_t parts) {
    if (graph_.outputs.empty()) throw std::invalid_argument("outputs: expected at least one");
    graph_.bands = {bands_from, bands_budget};
    graph_.parts = parts;
    return new Plan(std::move(graph_));
  }

 private:
  void check(int v) const {
    if (v < 0 || static_cast<size_t>(v) >= graph_.values.size()) {
      throw std::out_of_range("value: not one of this builder");
    }
  }

  const Value& value(int v) const {
    check(v);
    return graph_.values[static_cast<size_t>(v)];
  }

  ConvSource conv_source(int x, Address weight, Address bias, int64_t out_channels, int64_t groups,
                         const std::vector<int64_t>& geometry) const {
    const Value in = value(x);
    if (groups < 1 || in.channels % groups || out_channels % groups) {
      throw std::invalid_argument("groups: expected a divisor of both channel counts");
    }
    return {floats(weight), bias ? floats(bias) : nullptr, out_channels, in.channels, groups,
            make_window(in.height, in.width, geometry)};
  }

  Epilogue epilogue(int32_t activation, int residual) const {
    if (residual >= 0) check(residual);
    return {static_cast<Activation>(activation), residual >= 0};
  }

  int push(std::unique_ptr<Op> op, int x, int second, int output, const std::string& name) {
    op->name = name;
    op->inputs = {x};
    if (second >= 0) {
      const Value &b = value(second), &out = value(output);
      const auto* binary = dynamic_cast<const BinaryOp*>(op.get());
      if (!binary && (b.channels != out.channels || b.columns() != out.columns())) {
        throw std::invalid_argument("residual: expected the shape of the output");
      }
      op->inputs.push_back(second);
    }
    op->output = output;
    graph_.ops.push_back(std::move(op));
    return output;
  }

  Graph graph_;
};

template <class Pointer>
std::vector<Pointer> pointers(const std::vector<Address>& addresses, size_t expected) {
  if (addresses.size() != expected) throw std::invalid_argument("tensors: wrong number of them");
  std::vector<Pointer> out;
  for (Address address : addresses) out.push_back(reinterpret_cast<Pointer>(address));
  return out;
}

void run_plan(Plan& plan, const std::vector<Address>& inputs, const std::vector<Address>& outputs,
              int threads, bool together) {
  const auto in = pointers<const float*>(inputs, plan.input_count());
  const auto out = pointers<float*>(outputs, plan.output_count());
  const nb::gil_scoped_release release;
  plan.run(in.data(), out.data(), threads, together ? Sharing::kOperations : Sharing::kImages);
}

std::vector<std::pair<std::string, double>> profile_plan(Plan& plan,
                                                         const std::vector<Address>& inputs,
                                                         const std::vector<Address>& outputs,
                                                         int threads) {
  const auto in = pointers<const float*>(inputs, plan.input_count());
  const auto out = pointers<float*>(outputs, plan.output_count());
  std::vector<StepTime> times;
  {
    const nb::gil_scoped_release release;
    plan.run(in.data(), out.data(), threads, Sharing::kOperations, &times);
  }
  std::vector<std::pair<std::string, double>> rows;
  for (StepTime& time : times) rows.emplace_back(std::move(time.name), time.seconds);
  return rows;
}

}  // namespace

void bind_plan(nb::module_& m) {
  nb::class_<Plan>(m, "Plan")
      .def("run", &run_plan, nb::arg("inputs"), nb::arg("outputs"), nb::arg("threads"),
           nb::arg("together") = false)
      .def("profile", &profile_plan, nb::arg("inputs"), nb::arg("outputs"), nb::arg("threads"))
      .def("fill_idle_arenas", &Plan::fill_idle_arenas, nb::arg("value"))
      .def_prop_ro("arena_bytes", &Plan::arena_bytes);
  m.def("plan_group_images", &group_images, nb::arg("columns"), nb::arg("batch"),
        nb::arg("threads"));
  nb::class_<AttentionShape>(m, "AttentionShape")
      .def(nb::init<>())
      .def_rw("heads", &AttentionShape::heads)
      .def_rw("groups", &AttentionShape::groups)
      .def_rw("head_dim", &AttentionShape::head_dim)
      .def_rw("value_dim", &AttentionShape::value_dim)
      .def_rw("q_row", &AttentionShape::q_row)
      .def_rw("k_row", &AttentionShape::k_row)
      .def_rw("v_row", &AttentionShape::v_row)
      .def_rw("sequences", &AttentionShape::sequences)
      .def_rw("scale", &AttentionShape::scale)
      .def_rw("empty_is_zero", &AttentionShape::empty_is_zero)
      .def_rw("mask_per_sequence", &AttentionShape::mask_per_sequence)
      .def_rw("mask_per_head", &AttentionShape::mask_per_head)
      .def_rw("mask_per_query", &AttentionShape::mask_per_query);
  nb::class_<Builder>(m, "PlanBuilder")
      .def(nb::init<int64_t>(), nb::arg("batch"))
      .def("input", &Builder::input)
      .def("output", &Builder::output)
      .def("conv", &Builder::conv)
      .def("depthwise", &Builder::depthwise)
      .def("linear", &Builder::linear)
      .def("spmm", &Builder::spmm)
      .def("gemv", &Builder::gemv)
      .def("nm", &Builder::nm)
      .def("sparse_conv", &Builder::sparse_conv)
      .def("binary", &Builder::binary)
      .def("activation", &Builder::activation)
      .def("pool", &Builder::pool)
      .def("mean", &Builder::mean)
      .def("reshape", &Builder::reshape)
      .def("constant", &Builder::constant)
      .def("layer_norm", &Builder::layer_norm)
      .def("attention", &Builder::attention)
      .def("columns", &Builder::columns)
      .def("concat", &Builder::concat)
      .def("build", &Builder::build, nb::arg("bands_from") = 0, nb::arg("bands_budget") = 0,
           nb::arg("parts") = 1, nb::rv_policy::take_ownership);
}

}  // namespace aerogel
