// Thin: addresses and sizes in; they are checked in nm_mask, largest and zero_pruned.
#include "bindings.h"
#include "largest.h"
#include "nm_mask.h"
#include "zero_pruned.h"

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

void select_largest(uintptr_t score, uintptr_t among, uintptr_t mask, int64_t count, int64_t keep) {
  const LargestArgs args{reinterpret_cast<const float*>(score),
                         reinterpret_cast<const uint8_t*>(among), reinterpret_cast<uint8_t*>(mask),
                         count, keep};
  nb::gil_scoped_release release;
  largest(args);
}

bool zero(uintptr_t tensor, uintptr_t mask, int64_t count, int width, int threads) {
  const ZeroPrunedArgs args{reinterpret_cast<void*>(tensor),
                            reinterpret_cast<const uint32_t*>(mask), count, width};
  nb::gil_scoped_release release;
  return zero_pruned(args, threads);
}

}  // namespace

void bind_masks(nb::module_& m) {
  m.def("largest", &select_largest);
  m.def("nm_mask", &run);
  m.def("zero_pruned", &zero);
}

}  // namespace aerogel
