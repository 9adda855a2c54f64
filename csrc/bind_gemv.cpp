// Products with one to a few vectors, their weights sparse or their activations; N:M masks; lookups
// in sparse tables. Thin: addresses and sizes in; patterns are checked when they are packed, strides
// in every run, ids and columns of a table in Python.
#include "bindings.h"
#include "gather_rows.h"
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

NmWeight* pack_nm(uintptr_t values, int32_t type, uintptr_t scales, uintptr_t columns,
                  uintptr_t row_ptr, int64_t rows, int64_t cols, int n, int m) {
  const BlockRows source{nullptr, pointer<const int32_t>(columns), pointer<const int64_t>(row_ptr),
                         rows,    cols,                            1,
                         nullptr};
  nb::gil_scoped_release release;
  return new NmWeight(source, stored(values, type, scales), n, m);
}

// Everything about a product but the addresses; calling it is the hot path.
template <class Weight>
struct VectorCall {
  VectorProduct<Weight> product;
  int threads;

  void operator()(uintptr_t x, uintptr_t y, uintptr_t bias, uintptr_t residual) const {
    VectorProduct<Weight> call = product;
    call.x = pointer<const float>(x);
    call.y = pointer<float>(y);
    call.bias = pointer<const float>(bias);
    call.residual = pointer<const float>(residual);
    nb::gil_scoped_release release;
    run(call, threads);
  }

  static void run(const GemvProduct& call, int threads) { gemv_run(call, threads); }
  static void run(const NmProduct& call, int threads) { nm_run(call, threads); }
};

template <class Weight>
void prepare(VectorCall<Weight>* self, const Weight& weight, int64_t tokens, int32_t activation,
             int threads) {
  VectorProduct<Weight> product;
  product.weight = &weight;
  product.ldx = weight.stream().cols;
  product.ldy = product.ldr = weight.stream().rows;
  product.tokens = tokens;
  product.activation = static_cast<Activation>(activation);
  new (self) VectorCall<Weight>{product, threads};
}

template <class Weight>
void bind_weight(nb::module_& m, const char* weight, const char* call) {
  nb::class_<Weight>(m, weight).def_prop_ro("nbytes", &Weight::nbytes);
  nb::class_<VectorCall<Weight>>(m, call)
      .def("__init__", &prepare<Weight>, nb::keep_alive<1, 2>())
      .def("__call__", &VectorCall<Weight>::operator());
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

bool gather(uintptr_t values, bool half, uintptr_t columns, bool narrow, uintptr_t row_ptr,
            int64_t rows, uintptr_t ids, bool wide_ids, uintptr_t out, int64_t count, int64_t dim,
            int64_t nonzeros, int threads) {
  GatherRowsArgs args;
  args.values = pointer<const void>(values);
  args.columns = pointer<const void>(columns);
  args.row_ptr = pointer<const int64_t>(row_ptr);
  args.ids = pointer<const void>(ids);
  args.out = pointer<float>(out);
  args.count = count;
  args.dim = dim;
  args.rows = rows;
  args.nonzeros = nonzeros;
  args.half = half;
  args.narrow = narrow;
  args.wide_ids = wide_ids;
  nb::gil_scoped_release release;
  return gather_rows(args, threads);
}

int64_t above(uintptr_t matrix, int64_t rows, int64_t columns, uintptr_t limits, uintptr_t at_row,
              uintptr_t at_column, uintptr_t found, int64_t room) {
  const AboveArgs args{pointer<const float>(matrix), rows, columns, pointer<const float>(limits),
                       pointer<int64_t>(at_row), pointer<int64_t>(at_column), pointer<float>(found),
                       room};
  nb::gil_scoped_release release;
  return entries_above(args);
}

}  // namespace

void bind_gemv(nb::module_& m) {
  bind_weight<GemvWeight>(m, "GemvWeight", "GemvCall");
  m.def("gemv_pack", &pack, nb::rv_policy::take_ownership);
  bind_weight<NmWeight>(m, "NmWeight", "NmCall");
  m.def("nm_pack", &pack_nm, nb::rv_policy::take_ownership);
  m.def("entries_above", &above);
  m.def("gather_rows", &gather);
  m.def("sparse_input", &sparse_input);
}

}  // namespace aerogel
