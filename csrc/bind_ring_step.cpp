// Thin: rings from addresses and sizes, which the caller has checked.
#include <nanobind/stl/vector.h>

#include <utility>

#include "bindings.h"
#include "ring_step.h"

namespace nb = nanobind;

namespace aerogel {
namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using Sizes = std::vector<int64_t>;

}  // namespace

void bind_ring_step(nb::module_& m) {
  nb::class_<Rings>(m, "Rings")
      .def("__init__",
           [](Rings* rings, uintptr_t keys, uintptr_t values, uintptr_t positions, int64_t slots,
              int64_t key_bytes, int64_t value_bytes, Sizes offsets, Sizes sinks, Sizes windows,
              Sizes strides, Sizes firsts, int64_t block, Sizes padded) {
             new (rings) Rings{pointer<char>(keys), pointer<char>(values),
                               pointer<int64_t>(positions), slots, key_bytes, value_bytes,
                               std::move(offsets), std::move(sinks), std::move(windows),
                               std::move(strides), std::move(firsts), block, std::move(padded)};
           })
      .def("write", [](const Rings& rings, int64_t position, uintptr_t keys, int64_t key_batch,
                       int64_t key_head, uintptr_t values, int64_t value_batch,
                       int64_t value_head) {
        write_rings(rings, position, {pointer<const char>(keys), key_batch, key_head},
                    {pointer<const char>(values), value_batch, value_head});
      });
}

}  // namespace aerogel
