// N:M training: which weights both products of a step keep, and the packed forms they read, from
// one reading of the dense weight.
//
// A way of a weight is a product that reads it: forward sums over the inputs of an output and keeps
// n of every m of them; backward sums over the outputs and keeps n of every m of those. Of equals
// the first are kept, as by nm_mask; a shorter last group keeps n too, or all it has. Every group
// keeps as many entries at any time, so that a packed weight keeps its runs, rows and sizes, and
// only weights and offsets are written.
//
// Plain data and function pointers only in the second half: the files compiled once per instruction
// set include this one.
#pragma once

#include <cstdint>
#include <memory>

#include "spmm.h"

namespace aerogel {

constexpr int64_t kNmPackLongest = 32;  // entries of a group

// What to do for one way; nothing where both are null.
struct NmWay {
  SpmmWeight* packed = nullptr;  // (outputs, inputs) of its product; from nm_packed or alike
  uint8_t* mask = nullptr;       // (rows, cols) of 0 and 1
};

// A dense weight, (rows, cols) = (outputs, inputs) of the forward product.
struct NmPackArgs {
  const float* weight;
  int64_t rows, cols;
  int64_t n, m;
  NmWay forward, backward;
  bool given = false;  // masks are read, not chosen and written
};

// A weight of the structure of all n:m weights, to be filled by nm_pack.
std::unique_ptr<SpmmWeight> nm_packed(int64_t rows, int64_t cols, int64_t n, int64_t m,
                                      const SpmmVariant& variant);

// Nobody may be multiplying meanwhile. Returns false if some group of a given mask does not keep
// just so many; what was packed then holds nothing of use until the next call. Throws
// std::invalid_argument for impossible patterns and packed weights of another structure.
bool nm_pack(const NmPackArgs& args, int threads);

// Whether the packed weights of one output are those of a dense weight at their places; that of
// output r and input k is number r * row_step + k * column_step.
bool nm_holds(const SpmmWeight& packed, const float* weight, int64_t row_step, int64_t column_step,
              int64_t output);

// Some outputs that are neighbours in a group: step s of theirs is at weights[s * stride].
struct NmPackLanes {
  float* weights;
  int32_t* offsets;
  int64_t stride, count;  // 1 <= count <= lanes of a vector
};

// One way of one tile of the weight: `outputs` by `inputs` of its product, whole groups.
struct NmPackTask {
  const float* weight;  // of the first output and input
  uint8_t* mask;        // likewise, or null
  int64_t ld;           // of both
  bool neighbours;      // outputs lie side by side, inputs ld apart; else the other way round
  int64_t outputs, inputs;
  int64_t readable;  // floats from `weight` to the end of its row
  int64_t n, m;
  bool given;
  int32_t input, row_bytes;  // the first input's number, and bytes of an activation in scratch
  const NmPackLanes* lanes;  // of all outputs in turn, or null: not packed
};

constexpr int64_t kNmPackOutputs = 128, kNmPackInputs = 128;  // of a task at most
constexpr int64_t kNmPackTransposed = 32;                      // outputs that are no neighbours

struct NmPackKernels {
  int64_t lanes;
  bool (*pack)(const NmPackTask& task);  // false: see nm_pack
};

}  // namespace aerogel
