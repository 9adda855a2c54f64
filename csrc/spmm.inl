#include "simd_math.h"
#include "spmm.h"

namespace aerogel::AEROGEL_ISA {
namespace {
int32_t max_vectors(int32_t, int32_t) { return 8; }
void run_panel(const SpmmPanel&) {}
}  // namespace
constexpr SpmmKernels kSpmmKernels = {kLanes, &max_vectors, &run_panel};
}  // namespace aerogel::AEROGEL_ISA
