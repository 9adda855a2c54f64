// Products with one to a few vectors, their weights sparse or their activations. Thin: addresses and
// sizes in; patterns are checked when they are packed, strides in every run.
#include "bindings.h"
#include "gemv.h"
#include "nm.h"
#include "sparse_input.h"

namespace nb = nanobind;

namespace aerogel {
namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

StoredValues stored(uintptr_t values, int32_t type, uintptr_t scales) {
  return {pointer<const void>(values), static_cast<ValueType>(type), pointer<const float>(scales)};
}

GemvWeight* pack(uintptr_t values, int32_t type, uintptr_t scales, uintptr_t columns,
                 uintptr_t row_ptr, int64_t rows, int64_t cols, int32_t block) {
  const BlockRows source{nullptr, pointer<const int32_t>(columns), pointer<const int64_t>(row_ptr),
                         rows,    cols,                            block,
                         nullptr};
  nb::gil_scoped_release release;
  return new GemvWeight(source, stored(values, type, scales));
}

// Everything about a product but the addresses; calling it is the hot path.
struct GemvCall {
  GemvProduct product;
  int threads;

  void operator()(uintptr_t x, uintptr_t y, uintptr_t bias, uintptr_t residual) const {
    GemvProduct call = product;
    call.x = pointer<const float>(x);
    call.y = pointer<float>(y);
    call.bias = pointer<const float>(bias);
    call.residual = pointer<const float>(residual);
    nb::gil_scoped_release release;
    gemv_run(call, threads);
  }
};

void prepare(GemvCall* self, const GemvWeight& weight, int64_t tokens, int32_t activation,
             int threads) {
  GemvProduct product;
  product.weight = &weight;
  product.ldx = weight.stream().cols;
  product.ldy = product.ldr = weight.stream().rows;
  product.tokens = tokens;
  product.activation = static_cast<Activation>(activation);
  new (self) GemvCall{product, threads};
}

NmWeight* pack_nm(uintptr_t values, int32_t type, uintptr_t scales, uintptr_t columns,
                  uintptr_t row_ptr, int64_t rows, int64_t cols, int n, int m) {
  const BlockRows source{nullptr, pointer<const int32_t>(columns), pointer<const int64_t>(row_ptr),
                         rows,    cols,                            1,
                         nullptr};
  nb::gil_scoped_release release;
  return new NmWeight(source, stored(values, type, scales), n, m);
}

struct NmCall {
  NmProduct product;
  int threads;

  void operator()(uintptr_t x, uintptr_t y, uintptr_t bias, uintptr_t residual) const {
    NmProduct call = product;
    call.x = pointer<const float>(x);
    call.y = pointer<float>(y);
    call.bias = pointer<const float>(bias);
    call.residual = pointer<const float>(residual);
    nb::gil_scoped_release release;
    nm_run(call, threads);
  }
};

void prepare_nm(NmCall* self, const NmWeight& weight, int64_t tokens, int32_t activation,
                int threads) {
  NmProduct product;
  product.weight = &weight;
  product.ldx = weight.stream().cols;
  product.ldy = product.ldr = weight.stream().rows;
  product.tokens = tokens;
  product.activation = static_cast<Activation>(activation);
  new (self) NmCall{product, threads};
}

void sparse_input(uintptr_t weight, int32_t type, uintptr_t scales, int64_t ldw, int64_t inputs,
                  int64_t outputs, uintptr_t bias, uintptr_t x, uintptr_t y, uintptr_t residual,
                  int64_t tokens, float threshold, int32_t activation, int threads) {
  SparseInputArgs args;
  args.weight = stored(weight, type, scales);
  args.ldw = ldw;
  args.inputs = inputs;
  args.outputs = outputs;
  args.bias = pointer<const float>(bias);
  args.x = pointer<const float>(x);
  args.ldx = inputs;
  args.y = pointer<float>(y);
  args.residual = pointer<const float>(residual);
  args.ldy = args.ldr = outputs;
  args.tokens = tokens;
  args.threshold = threshold;
  args.activation = static_cast<Activation>(activation);
  nb::gil_scoped_release release;
  sparse_input_run(args, threads);
}

}  // namespace

void bind_gemv(nb::module_& m) {
  nb::class_<GemvWeight>(m, "GemvWeight").def_prop_ro("nbytes", &GemvWeight::nbytes);
  m.def("gemv_pack", &pack, nb::rv_policy::take_ownership);
  nb::class_<GemvCall>(m, "GemvCall")
      .def("__init__", &prepare, nb::keep_alive<1, 2>())
      .def("__call__", &GemvCall::operator());
  nb::class_<NmWeight>(m, "NmWeight").def_prop_ro("nbytes", &NmWeight::nbytes);
  m.def("nm_pack", &pack_nm, nb::rv_policy::take_ownership);
  nb::class_<NmCall>(m, "NmCall")
      .def("__init__", &prepare_nm, nb::keep_alive<1, 2>())
      .def("__call__", &NmCall::operator());
  m.def("sparse_input", &sparse_input);
}

}  // namespace aerogel
