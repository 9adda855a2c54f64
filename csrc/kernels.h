// The table of kernels that every instruction set fills, and the one that cpuid picks.
#pragma once

#include <string>
#include <vector>

namespace aerogel {

struct SpmmKernels;      // spmm.h: sparse weights x dense activations
struct SddmmKernels;     // sddmm.h: the gradients of sparse weights
struct GemvKernels;      // gemv.h: sparse weights x one to a few vectors
struct NmKernels;        // nm.h: the same for N:M weights
struct NmMaskKernels;    // nm_mask.h: which weights N:M training keeps
struct LargestKernels;   // largest.h: which scores are the k largest
struct ZeroPrunedKernels;  // zero_pruned.h: masks on weights and gradients
struct GatherRowsKernels;  // gather_rows.h: lookups in tables of nonzeros
struct NmPackKernels;    // nm_pack.h: the same, and their packed form
struct SparseInputKernels;  // sparse_input.h: weights x activations with zeros
struct FftConvKernels;   // fft_conv.h: long convolutions
struct LayerKernels;     // layers.h: the dense layers between them
struct RooflineKernels;  // roofline.h: micro-benchmarks of the machine's limits
struct TokenKernels;     // tokens.h: what transformers need besides
struct AttendKernels;    // attention.h: attention over lists of keys
struct SelectKernels;    // attention_select.h: which keys

// Constant-initialised (table.inl): loading the library runs no code of an instruction set that the
// CPU may lack.
struct KernelTable {
  const char* name;  // "avx512", "avx2", "neon" or "generic"
  int lanes;         // float32 lanes of one vector
  const SpmmKernels* spmm;
  const SddmmKernels* sddmm;
  const RooflineKernels* roofline;
  const LayerKernels* layers;
  const GemvKernels* gemv;
  const NmKernels* nm;
  const NmMaskKernels* nm_mask;
  const LargestKernels* largest;
  const ZeroPrunedKernels* zero_pruned;
  const GatherRowsKernels* gather_rows;
  const NmPackKernels* nm_pack;
  const SparseInputKernels* sparse_input;
  const TokenKernels* tokens;
  const AttendKernels* attention;
  const SelectKernels* select;
  const FftConvKernels* fft_conv;
};

// The table in use. Chosen once from cpuid; AEROGEL_ISA in the environment or select_isa override it.
const KernelTable& active_table();

// Names of the instruction sets that were compiled in and that this CPU can run, best first.
std::vector<std::string> available_isas();

// Throws std::invalid_argument naming the available ones.
void select_isa(const std::string& name);

}  // namespace aerogel
