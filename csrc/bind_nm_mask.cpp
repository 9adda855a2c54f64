// Thin: addresses and sizes in; they are checked in nm_mask.
#include "bindings.h"
#include "nm_mask.h"

namespace nb = nanobind;

namespace aerogel {
namespace {

void run(uintptr_t score, uintptr_t mask, int64_t outer, int64_t length, int64_t inner, int64_t n,
         int64_t m, bool magnitude, int threads) {
  const NmMaskArgs args{reinterpret_cast<const float*>(score), reinterpret_cast<uint8_t*>(mask),
                        outer, length, inner, n, m, magnitude};
  nb::gil_scoped_release release;
  nm_mask(args, threads);
}

}  // namespace

void bind_nm_mask(nb::module_& m) {
  m.def("nm_mask", &run);
}

}  // namespace aerogel
