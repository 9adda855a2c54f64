// Thin: addresses and sizes in, checked again in spmm_check. Tensors are not passed as objects
// because a DLPack exchange costs more than many of the layers.
#include "bindings.h"
#include "kernels.h"
#include "spmm.h"

namespace nb = nanobind;

namespace aerogel {
namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

SpmmWeight* pack(uintptr_t values, uintptr_t columns, uintptr_t row_ptr, int64_t rows, int64_t cols,
                 int32_t block, const SpmmVariant& variant, int64_t ldx) {
  const BlockRows source{pointer<const float>(values), pointer<const int32_t>(columns),
                         pointer<const int64_t>(row_ptr), rows, cols, block};
  nb::gil_scoped_release release;
  return new SpmmWeight(source, variant, ldx);
}

void run(const SpmmWeight& weight, uintptr_t x, int64_t ldx, int64_t x_stride, uintptr_t y,
         int64_t ldy, int64_t y_stride, uintptr_t bias, uintptr_t residual, int64_t ldr,
         int64_t residual_stride, int64_t columns, int64_t batch, int32_t activation, bool tokens,
         bool padded, int threads) {
  SpmmArgs args;
  args.weight = &weight;
  args.bias = pointer<const float>(bias);
  args.x = pointer<const float>(x);
  args.ldx = ldx;
  args.x_stride = x_stride;
  args.y = pointer<float>(y);
  args.ldy = ldy;
  args.y_stride = y_stride;
  args.residual = pointer<const float>(residual);
  args.ldr = ldr;
  args.residual_stride = residual_stride;
  args.columns = columns;
  args.batch = batch;
  args.activation = static_cast<Activation>(activation);
  args.tokens = tokens;
  args.padded = padded;
  spmm_check(args);
  nb::gil_scoped_release release;
  spmm_run(args, threads);
}

}  // namespace

void bind_spmm(nb::module_& m) {
  nb::class_<SpmmVariant>(m, "SpmmVariant")
      .def("__init__",
           [](SpmmVariant* self, int32_t vectors, int32_t groups, int32_t k_blocks,
              int32_t row_tiles, bool pack) {
             new (self) SpmmVariant{vectors, groups, k_blocks, row_tiles, pack};
           },
           nb::arg("vectors"), nb::arg("groups"), nb::arg("k_blocks"), nb::arg("row_tiles"),
           nb::arg("pack"));
  nb::class_<SpmmWeight>(m, "SpmmWeight").def_prop_ro("nbytes", &SpmmWeight::nbytes);
  m.def("spmm_pack", &pack, nb::rv_policy::take_ownership);
  m.def("spmm_run", &run);
  m.def("spmm_max_vectors", [](int32_t groups, int32_t block) {
    return active_table().spmm->max_vectors(groups, block);
  });
}

}  // namespace aerogel
