// Body of every isa_*.cpp: all kernels, compiled for one instruction set, and their table.
#include "kernels.h"
#include "simd.h"

#include "roofline.inl"
#include "layers_simd.inl"
#include "gather.inl"  // uses layers_simd.inl
#include "spmm.inl"    // uses gather.inl
#include "layers.inl"  // uses all three
#include "sddmm.inl"   // uses the transposes of spmm.inl

namespace aerogel::AEROGEL_ISA {

extern const KernelTable kTable;
const KernelTable kTable = {AEROGEL_ISA_NAME, kLanes,            &kSpmmKernels,
                            &kSddmmKernels,   &kRooflineKernels, &kLayerKernels};

}  // namespace aerogel::AEROGEL_ISA
