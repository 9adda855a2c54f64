// Body of every isa_*.cpp: all kernels, compiled for one instruction set, and their table.
#include "kernels.h"
#include "simd.h"

#include "spmm.inl"
#include "roofline.inl"
#if __has_include("layers.inl")
#include "layers.inl"
#define AEROGEL_LAYERS &kLayerKernels
#else
#define AEROGEL_LAYERS nullptr
#endif

namespace aerogel::AEROGEL_ISA {

extern const KernelTable kTable;
const KernelTable kTable = {AEROGEL_ISA_NAME, kLanes, &kSpmmKernels, &kRooflineKernels,
                            AEROGEL_LAYERS};

}  // namespace aerogel::AEROGEL_ISA
