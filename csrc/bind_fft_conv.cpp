// Thin: addresses and sizes in; what they mean is checked when plans are made and run.
#include <algorithm>

#include "bindings.h"
#include "fft_conv.h"

namespace nb = nanobind;

namespace aerogel {
namespace {

const float* floats(uintptr_t address) { return reinterpret_cast<const float*>(address); }

// Address, floats from image to image, from channel to channel.
FftRows rows(const nb::tuple& t) {
  return {floats(nb::cast<uintptr_t>(t[0])), nb::cast<int64_t>(t[1]), nb::cast<int64_t>(t[2])};
}

FftConvPlan* make_plan(int64_t n, int64_t outer, int64_t blocks, int64_t inputs, bool right_angle,
                       bool circular, bool mirrored) {
  nb::gil_scoped_release release;
  return new FftConvPlan({n, outer, blocks, inputs, right_angle, circular, mirrored});
}

// Rows as above, taps, address of the mask.
FftFilters filters(const nb::tuple& t) {
  return {rows(nb::cast<nb::tuple>(t[0])), nb::cast<int64_t>(t[1]),
          floats(nb::cast<uintptr_t>(t[2]))};
}

void spectra(const FftConvPlan& plan, const nb::tuple& from, int64_t channels, uintptr_t out,
             int threads) {
  const FftFilters all = filters(from);
  nb::gil_scoped_release release;
  fft_spectra(plan, all, channels, reinterpret_cast<float*>(out), threads);
}

void convolve(const FftConvPlan& plan, const nb::tuple& x, const nb::tuple& gate,
              const nb::tuple& out_gate, const nb::tuple& from, uintptr_t spectra, uintptr_t y,
              int64_t batch, int64_t channels, int64_t length, bool adjoint, int threads) {
  const FftConvArgs args{&plan,
                         rows(x),
                         rows(gate),
                         rows(out_gate),
                         filters(from),
                         floats(spectra),
                         reinterpret_cast<float*>(y),
                         batch,
                         channels,
                         length,
                         adjoint};
  nb::gil_scoped_release release;
  fft_convolve(args, threads);
}

void correlate(const FftConvPlan& plan, const nb::tuple& x, const nb::tuple& x_gate,
               const nb::tuple& dy, const nb::tuple& dy_gate, uintptr_t mask, uintptr_t dk,
               int64_t batch, int64_t channels, int64_t length, int64_t filter_length,
               int threads) {
  const FftCorrelateArgs args{&plan,
                              rows(x),
                              rows(x_gate),
                              rows(dy),
                              rows(dy_gate),
                              floats(mask),
                              reinterpret_cast<float*>(dk),
                              batch,
                              channels,
                              length,
                              filter_length};
  nb::gil_scoped_release release;
  fft_correlate(args, threads);
}

void bins(const FftConvPlan& plan, uintptr_t out) {
  const std::vector<int64_t> found = plan.bins();
  std::copy(found.begin(), found.end(), reinterpret_cast<int64_t*>(out));
}

}  // namespace

void bind_fft_conv(nb::module_& m) {
  nb::class_<FftConvPlan>(m, "FftConvPlan")
      .def_prop_ro("spectrum_floats",
                   [](const FftConvPlan& plan) { return plan.tables().spectrum_floats(); })
      .def("bins", &bins);
  m.def("fft_conv_plan", &make_plan, nb::rv_policy::take_ownership);
  m.def("fft_spectra", &spectra);
  m.def("fft_convolve", &convolve);
  m.def("fft_correlate", &correlate);
}

}  // namespace aerogel
