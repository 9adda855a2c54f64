// Thin: addresses and sizes in, checked again in spmm_check. Tensors are not passed as objects
// because a DLPack exchange costs more than many of the layers.
#include "bindings.h"
#include "kernels.h"
#include "nm_pack.h"
#include "spmm.h"

namespace nb = nanobind;

namespace aerogel {
namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void update(SpmmWeight& weight, uintptr_t values) {
  nb::gil_scoped_release release;
  weight.update(pointer<const float>(values));
}

SpmmWeight* nm_structure(int64_t rows, int64_t cols, int64_t n, int64_t m,
                         const SpmmVariant& variant) {
  nb::gil_scoped_release release;
  return nm_packed(rows, cols, n, m, variant).release();
}

bool pack_nm(uintptr_t weight, int64_t rows, int64_t cols, int64_t n, int64_t m,
             SpmmWeight* forward, uintptr_t forward_mask, SpmmWeight* backward,
             uintptr_t backward_mask, bool given, int threads) {
  const NmPackArgs args{pointer<const float>(weight), rows, cols, n, m,
                        {forward, pointer<uint8_t>(forward_mask)},
                        {backward, pointer<uint8_t>(backward_mask)}, given};
  nb::gil_scoped_release release;
  return nm_pack(args, threads);
}

bool holds_nm(const SpmmWeight& packed, uintptr_t weight, int64_t row_step, int64_t column_step,
              int64_t output) {
  return nm_holds(packed, pointer<const float>(weight), row_step, column_step, output);
}

// order: the number of every value, int32, or 0 for 0, 1, 2, ...
SpmmWeight* pack_updatable(uintptr_t values, uintptr_t order, uintptr_t columns, uintptr_t row_ptr,
                           int64_t rows, int64_t cols, int32_t block, const SpmmVariant& variant,
                           int64_t ldx) {
  const BlockRows source{pointer<const float>(values),    pointer<const int32_t>(columns),
                         pointer<const int64_t>(row_ptr), rows,
                         cols,                            block,
                         pointer<const int32_t>(order)};
  nb::gil_scoped_release release;
  return new SpmmWeight(source, variant, ldx, true);
}

SpmmWeight* pack(uintptr_t values, uintptr_t columns, uintptr_t row_ptr, int64_t rows, int64_t cols,
                 int32_t block, const SpmmVariant& variant, int64_t ldx) {
  const BlockRows source{pointer<const float>(values), pointer<const int32_t>(columns),
                         pointer<const int64_t>(row_ptr), rows, cols, block,
                         nullptr};
  nb::gil_scoped_release release;
  return new SpmmWeight(source, variant, ldx);
}

// Everything about a product but the addresses; calling it is the hot path.
struct SpmmCall {
  SpmmArgs args;
  int threads;

  void operator()(uintptr_t x, uintptr_t y, uintptr_t bias, uintptr_t residual) const {
    SpmmArgs call = args;
    call.x = pointer<const float>(x);
    call.y = pointer<float>(y);
    call.bias = pointer<const float>(bias);
    call.residual = pointer<const float>(residual);
    spmm_check(call);
    nb::gil_scoped_release release;
    spmm_run(call, threads);
  }
};

void prepare(SpmmCall* self, const SpmmWeight& weight, int64_t ldx, int64_t x_stride, int64_t ldy,
             int64_t y_stride, int64_t ldr, int64_t residual_stride, int64_t columns, int64_t batch,
             int32_t activation, bool tokens, int threads) {
  SpmmArgs args;
  args.weight = &weight;
  args.ldx = ldx;
  args.x_stride = x_stride;
  args.ldy = ldy;
  args.y_stride = y_stride;
  args.ldr = ldr;
  args.residual_stride = residual_stride;
  args.columns = columns;
  args.batch = batch;
  args.activation = static_cast<Activation>(activation);
  args.tokens = tokens;
  new (self) SpmmCall{args, threads};
}

}  // namespace

void bind_spmm(nb::module_& m) {
  nb::class_<SpmmVariant>(m, "SpmmVariant")
      .def("__init__",
           [](SpmmVariant* self, int32_t vectors, int32_t groups, int32_t k_blocks,
              int32_t row_tiles, bool pack, int32_t column_tiles) {
             new (self) SpmmVariant{vectors, groups, k_blocks, row_tiles, pack, column_tiles};
           },
           nb::arg("vectors"), nb::arg("groups"), nb::arg("k_blocks"), nb::arg("row_tiles"),
           nb::arg("pack"), nb::arg("column_tiles") = 1);
  nb::class_<SpmmWeight>(m, "SpmmWeight")
      .def_prop_ro("nbytes", &SpmmWeight::nbytes)
      .def("update", &update);
  m.def("spmm_pack", &pack, nb::rv_policy::take_ownership);
  m.def("spmm_pack_updatable", &pack_updatable, nb::rv_policy::take_ownership);
  m.def("nm_packed", &nm_structure, nb::rv_policy::take_ownership);
  m.def("nm_pack_ways", &pack_nm, nb::arg("weight"), nb::arg("rows"), nb::arg("cols"), nb::arg("n"),
        nb::arg("m"), nb::arg("forward").none(), nb::arg("forward_mask"),
        nb::arg("backward").none(), nb::arg("backward_mask"), nb::arg("given"),
        nb::arg("threads"));
  m.def("nm_holds", &holds_nm);
  nb::class_<SpmmCall>(m, "SpmmCall")
      .def("__init__", &prepare, nb::keep_alive<1, 2>())
      .def("__call__", &SpmmCall::operator());
  m.def("spmm_lockstep", [] { return active_table().spmm->lockstep; });
  m.def("spmm_max_vectors", [](int32_t groups, int32_t block) {
    return active_table().spmm->max_vectors(groups, block);
  });
}

}  // namespace aerogel
