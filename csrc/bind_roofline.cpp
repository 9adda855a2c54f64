// Timings of the roofline micro-benchmarks on a number of threads at once.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <new>
#include <vector>

#include "bindings.h"
#include "kernels.h"
#include "parallel.h"
#include "roofline.h"

namespace nb = nanobind;

namespace aerogel {
namespace {

constexpr std::align_val_t kLine{64};
constexpr int kSinkFloats = 64;

struct AlignedDelete {
  void operator()(float* p) const { ::operator delete[](p, kLine); }
};
using AlignedFloats = std::unique_ptr<float[], AlignedDelete>;

AlignedFloats aligned_floats(int64_t n) {
  AlignedFloats p(static_cast<float*>(::operator new[](n * sizeof(float), kLine)));
  std::fill_n(p.get(), n, 0.0f);
  return p;
}

// Seconds that `work(buffer, sink)` takes when every thread does it on its own buffer.
template <class Work>
double time_on_threads(int threads, int64_t floats, Work work) {
  std::vector<AlignedFloats> buffers, sinks;
  for (int t = 0; t < threads; ++t) {
    buffers.push_back(aligned_floats(floats));
    sinks.push_back(aligned_floats(kSinkFloats));
    work(buffers[t].get(), sinks[t].get());
  }
  const auto begin = std::chrono::steady_clock::now();
  run_team(threads, [&](int thread, int granted) {
    for (int t = thread; t < threads; t += granted) work(buffers[t].get(), sinks[t].get());
  });
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

double fma_gflops(int threads, int64_t rounds) {
  const RooflineKernels& kernels = *active_table().roofline;
  std::atomic<int64_t> operations{0};  // every thread reports the same number
  const double seconds = time_on_threads(threads, kSinkFloats, [&](float*, float* sink) {
    operations.store(kernels.fma(rounds, sink), std::memory_order_relaxed);
  });
  return 1e-9 * static_cast<double>(operations.load()) * threads / seconds;
}

double load_gbps(int threads, int64_t bytes, int64_t rounds) {
  const RooflineKernels& kernels = *active_table().roofline;
  const int64_t floats = std::max<int64_t>(bytes / 512, 1) * 128;
  const double seconds = time_on_threads(threads, floats, [&](float* p, float* sink) {
    kernels.load(p, floats, rounds, sink);
  });
  return 1e-9 * static_cast<double>(floats) * 4.0 * rounds * threads / seconds;
}

}  // namespace

void bind_roofline(nb::module_& m) {
  m.def("fma_gflops", &fma_gflops, nb::arg("threads"), nb::arg("rounds"),
        nb::call_guard<nb::gil_scoped_release>());
  m.def("load_gbps", &load_gbps, nb::arg("threads"), nb::arg("bytes"), nb::arg("rounds"),
        nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace aerogel
