// As in bind_spmm.cpp: addresses and sizes in.
#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "kernels.h"
#include "sparse_conv.h"

namespace nb = nanobind;

namespace aerogel {
namespace {

SparseConvWeight* pack(uintptr_t values, uintptr_t columns, uintptr_t row_ptr, int64_t rows,
                       int64_t cols, int32_t block, int64_t groups, int64_t in_h, int64_t in_w,
                       const std::vector<int64_t>& geometry, const SpmmVariant& variant) {
  const BlockRows source{reinterpret_cast<const float*>(values),
                         reinterpret_cast<const int32_t*>(columns),
                         reinterpret_cast<const int64_t*>(row_ptr), rows, cols, block};
  const Window window = make_window(in_h, in_w, geometry);
  nb::gil_scoped_release release;
  return new SparseConvWeight(source, groups, window, variant);
}

// Panels of an image, or of several side by side if these may, and floats that a panel needs of each
// input channel.
std::vector<int64_t> panels(int64_t in_h, int64_t in_w, const std::vector<int64_t>& geometry,
                            const SpmmVariant& variant, int64_t images) {
  Window window = make_window(in_h, in_w, geometry);
  if (images > 1 && is_point(window)) window = over_picked(window);
  const bool group = StripLayout::takes_group(window);
  const StripLayout layout(window, variant, active_table().lanes, group ? images : 1);
  const Strips& strips = layout.strips();
  const int64_t columns = images * window.out_h * window.out_w;
  const int64_t side_by_side = (columns + strips.columns - 1) / strips.columns;
  return {strips.masks ? side_by_side : strips.panels(window), strips.channel};
}

// Everything about a convolution but the addresses; calling it is the hot path.
class SparseConvCall {
 public:
  SparseConvCall(const SparseConvWeight& weight, int64_t ldx, int64_t x_stride, int64_t ldr,
                 int64_t residual_stride, int64_t batch, int32_t activation, int threads)
      : threads_(threads) {
    const int64_t groups = static_cast<int64_t>(weight.groups().size());
    const int64_t columns = weight.window().out_h * weight.window().out_w;
    args_.weight = &weight;
    SpmmArgs& p = args_.product;
    p.ldx = ldx;
    p.x_stride = x_stride;
    p.ldy = columns;
    p.y_stride = groups * weight.group_outputs() * columns;
    p.ldr = ldr;
    p.residual_stride = residual_stride;
    p.columns = columns;
    p.batch = batch;
    p.activation = static_cast<Activation>(activation);
  }

  void operator()(uintptr_t x, uintptr_t y, uintptr_t bias, uintptr_t residual) const {
    SparseConvArgs call = args_;
    call.product.x = reinterpret_cast<const float*>(x);
    call.product.y = reinterpret_cast<float*>(y);
    call.product.bias = reinterpret_cast<const float*>(bias);
    call.product.residual = reinterpret_cast<const float*>(residual);
    sparse_conv_check(call);
    nb::gil_scoped_release release;
    sparse_conv_run(call, threads_);
  }

 private:
  int threads_;
  SparseConvArgs args_;
};

}  // namespace

void bind_sparse_conv(nb::module_& m) {
  nb::class_<SparseConvWeight>(m, "SparseConvWeight")
      .def_prop_ro("nbytes", &SparseConvWeight::nbytes);
  m.def("sparse_conv_pack", &pack, nb::rv_policy::take_ownership);
  m.def("sparse_conv_panels", &panels);
  nb::class_<SparseConvCall>(m, "SparseConvCall")
      .def(nb::init<const SparseConvWeight&, int64_t, int64_t, int64_t, int64_t, int64_t, int32_t,
                    int>(),
           nb::keep_alive<1, 2>())
      .def("__call__", &SparseConvCall::operator());
}

}  // namespace aerogel
