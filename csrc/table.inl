// The table of one instruction set's kernels, each family compiled on its own.
#include "kernels.h"
#include "simd.h"

namespace aerogel::AEROGEL_ISA {

extern const SpmmKernels kSpmmKernels;
extern const SddmmKernels kSddmmKernels;
extern const RooflineKernels kRooflineKernels;
extern const LayerKernels kLayerKernels;
extern const GemvKernels kGemvKernels;
extern const NmKernels kNmKernels;
extern const NmMaskKernels kNmMaskKernels;
extern const LargestKernels kLargestKernels;
extern const ZeroPrunedKernels kZeroPrunedKernels;
extern const GatherRowsKernels kGatherRowsKernels;
extern const NmPackKernels kNmPackKernels;
extern const SparseInputKernels kSparseInputKernels;
extern const TokenKernels kTokenKernels;
extern const AttendKernels kAttendKernels;
extern const SelectKernels kSelectKernels;
extern const FftConvKernels kFftConvKernels;

extern const KernelTable kTable;
const KernelTable kTable = {AEROGEL_ISA_NAME,     kLanes,
                            &kSpmmKernels,        &kSddmmKernels,
                            &kRooflineKernels,    &kLayerKernels,
                            &kGemvKernels,        &kNmKernels,
                            &kNmMaskKernels,      &kLargestKernels,
                            &kZeroPrunedKernels,  &kGatherRowsKernels,
                            &kNmPackKernels,      &kSparseInputKernels,
                            &kTokenKernels,       &kAttendKernels,
                            &kSelectKernels,      &kFftConvKernels};

}  // namespace aerogel::AEROGEL_ISA
