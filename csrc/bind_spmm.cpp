#include "bindings.h"
#include "spmm.h"

namespace nb = nanobind;

namespace aerogel {

void bind_spmm(nb::module_&) {}

}  // namespace aerogel
