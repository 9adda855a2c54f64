// Body of attention.h for one instruction set.
#include "attention.h"

#include "kernels.h"
#include "simd_math.h"
#include "stored_values.inl"
#include "sum_lanes.inl"
#include "transpose.inl"

#include "attention_simd.inl"
#include "attention_step.inl"
#include "attention_columns.inl"
#include "attention_panel.inl"
#include "attention_decode.inl"
#include "attention_codes.inl"
#include "attention_backward.inl"

namespace aerogel::AEROGEL_ISA {

extern const AttendKernels kAttendKernels;
const AttendKernels kAttendKernels = {&attend_tile, &decode_part, &decode_merge,
                                      &attend_tile_backward, &coded_part, &coded_prior};

}  // namespace aerogel::AEROGEL_ISA
