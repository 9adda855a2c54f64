// A race on purpose, in builds for ThreadSanitizer only: a check that finds nothing must be known to
// find what is there.
#include <atomic>
#include <vector>

#include "bindings.h"
#include "parallel.h"

namespace nb = nanobind;

namespace aerogel {
namespace {

// Two tasks write neighbouring spans of one array, the first `overlap` floats too many: the mistake
// that a kernel's tail would make.
void write_neighbours(int overlap) {
  constexpr int kSpan = 64;
  std::vector<float> out(2 * kSpan);
  std::atomic<int> begun{0};
  parallel_tasks(2, 2, [&](int64_t task) {
    // Both have begun before either writes; a relaxed counter puts the writes in no order.
    begun.fetch_add(1, std::memory_order_relaxed);
    while (begun.load(std::memory_order_relaxed) < 2) std::this_thread::yield();
    const int64_t begin = task * kSpan, end = begin + kSpan + (task == 0 ? overlap : 0);
    for (int64_t i = begin; i < end; ++i) out[static_cast<size_t>(i)] = static_cast<float>(task);
  });
}

}  // namespace

void bind_race(nb::module_& m) {
  m.def("write_neighbours", &write_neighbours, nb::arg("overlap"),
        nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace aerogel
