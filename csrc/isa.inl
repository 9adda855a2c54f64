// Body of every isa_*.cpp: all kernels, compiled for one instruction set, and their table.
#include "kernels.h"
#include "simd.h"

#include "roofline.inl"
#include "spmm.inl"

// Both use the transposes of spmm_layout.inl.
#include "layers.inl"
#include "sddmm.inl"

namespace aerogel::AEROGEL_ISA {

extern const KernelTable kTable;
const KernelTable kTable = {AEROGEL_ISA_NAME, kLanes,            &kSpmmKernels,
                            &kSddmmKernels,   &kRooflineKernels, &kLayerKernels};

}  // namespace aerogel::AEROGEL_ISA
