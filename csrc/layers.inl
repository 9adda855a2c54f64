// Body of layers.h for one instruction set. Order matters: each part uses the ones above it, and
// what isa.inl includes first: layers_simd.inl, gather.inl, `transpose` of spmm_layout.inl.
#include "layers.h"
#include "simd_math.h"

#include "layers_pointwise.inl"
#include "layers_conv.inl"
#include "layers_depthwise.inl"
#include "layers_pool.inl"
#include "layers_gemv.inl"

namespace aerogel::AEROGEL_ISA {

constexpr LayerKernels kLayerKernels = {
    kDenseTile,       &conv_slice,    &gemv_blocks,   &depthwise_channels, &pool_channels,
    &binary_channels, &mean_channels, &activate_span, &transpose};

}  // namespace aerogel::AEROGEL_ISA
