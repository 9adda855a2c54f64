// Body of layers.h for one instruction set. Order matters: each part uses the ones above it.
#include "layers.h"

#include "activate.inl"
#include "gather.inl"
#include "kernels.h"
#include "layers_simd.inl"
#include "simd_math.h"
#include "transpose.inl"

#include "layers_pointwise.inl"
#include "layers_conv.inl"
#include "layers_direct.inl"
#include "layers_depthwise_pairs.inl"
#include "layers_depthwise_strips.inl"
#include "layers_depthwise.inl"
#include "layers_pool.inl"
#include "layers_gemv.inl"

namespace aerogel::AEROGEL_ISA {

extern const LayerKernels kLayerKernels;
const LayerKernels kLayerKernels = {
    kDenseTile,          &conv_slice,              &direct_rows,   &gemv_blocks,
    &depthwise_channels, &depthwise_rows_together, &pool_channels, &binary_channels,
    &mean_channels,      &activate_span,           &transpose};

}  // namespace aerogel::AEROGEL_ISA
