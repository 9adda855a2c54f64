// Thin: addresses and sizes in; patterns are checked when they are made, strides in sddmm_run.
#include "bindings.h"
#include "sddmm.h"

namespace nb = nanobind;

namespace aerogel {
namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

SddmmPattern* make_pattern(uintptr_t columns, uintptr_t row_ptr, int64_t rows, int64_t cols,
                           int32_t block) {
  const BlockRows source{nullptr, pointer<const int32_t>(columns), pointer<const int64_t>(row_ptr),
                         rows,    cols,                            block,
                         nullptr};
  nb::gil_scoped_release release;
  return new SddmmPattern(source);
}

void run(const SddmmPattern& pattern, uintptr_t x, int64_t x_row, int64_t x_image, uintptr_t dy,
         int64_t dy_row, int64_t dy_image, uintptr_t values, int64_t columns, int64_t batch,
         bool tokens, int threads) {
  SddmmArgs args;
  args.pattern = &pattern;
  args.x = {pointer<const float>(x), x_row, x_image};
  args.dy = {pointer<const float>(dy), dy_row, dy_image};
  args.values = pointer<float>(values);
  args.columns = columns;
  args.batch = batch;
  args.tokens = tokens;
  nb::gil_scoped_release release;
  sddmm_run(args, threads);
}

}  // namespace

void bind_sddmm(nb::module_& m) {
  nb::class_<SddmmPattern>(m, "SddmmPattern");
  m.def("sddmm_pattern", &make_pattern, nb::rv_policy::take_ownership);
  m.def("sddmm", &run);
}

}  // namespace aerogel
