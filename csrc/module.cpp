#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdlib>

#include "bindings.h"
#include "kernels.h"

namespace nb = nanobind;

NB_MODULE(_native, m) {
  m.def("isa", [] { return std::string(aerogel::active_table().name); });
  m.def("lanes", [] { return aerogel::active_table().lanes; });
  m.def("available_isas", &aerogel::available_isas);
  m.def("in_environment", [](const char* name) { return std::getenv(name) != nullptr; });
  m.def("set_isa", &aerogel::select_isa, nb::arg("name"));
  aerogel::bind_spmm(m);
  aerogel::bind_sddmm(m);
  aerogel::bind_gemv(m);
  aerogel::bind_masks(m);
  aerogel::bind_sparse_conv(m);
  aerogel::bind_fft_conv(m);
  aerogel::bind_roofline(m);
  aerogel::bind_plan(m);
  aerogel::bind_attention(m);
  aerogel::bind_attention_select(m);
  aerogel::bind_attention_codes(m);
  aerogel::bind_ring_step(m);
#ifdef AEROGEL_STD_THREADS
  aerogel::bind_race(m);
#endif
}
