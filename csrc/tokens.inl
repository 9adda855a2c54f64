// Body of tokens.h for one instruction set.
#include "tokens.h"

#include "kernels.h"
#include "layers_simd.inl"
#include "simd_math.h"

#include "tokens_norm.inl"
#include "tokens_attention.inl"

namespace aerogel::AEROGEL_ISA {

extern const TokenKernels kTokenKernels;
const TokenKernels kTokenKernels = {kAttentionTile, &layer_norm, &attention};

}  // namespace aerogel::AEROGEL_ISA
