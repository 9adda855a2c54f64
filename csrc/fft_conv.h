// Long convolutions of real float32 sequences: polynomial products modulo z^n - e^(2 pi i f).
//
// With f = 1/4 the modulus is z^n - i: the product of two real sequences of n values each is then
// y[j] + i y[j + n], the whole linear convolution without any zero padding (the right-angle
// convolution); its real part is the causal half. A sequence longer than n goes through in
// segments, and the imaginary part of one segment is what the next has to add. With f = 0 it is the
// circular convolution.
//
// A modulus z^(2h) - a splits into z^h - b and z^h + b with b = sqrt(a), and so on down to single
// points, where the product is one multiplication. Every split has one factor for all of its
// values, so values lie in the lanes and factors are broadcast; only the last 16 values of a block
// meet across lanes. Blocks are independent of each other from their split on, so a block that fits
// into a cache goes down, is multiplied and comes back up there; nothing is ever put into
// bit-reversed order.
//
// The first split, the outer one, is a small matrix: from `inputs` segments of real values to
// `blocks` complex blocks. It may have any number of parts, and leave blocks out: they are then
// zero in the filter's spectrum, and cost nothing.
//
// Complex data lie in groups of 16: 16 real parts, then 16 imaginary parts.
#pragma once

#include <cstdint>
#include <vector>

namespace aerogel {

constexpr int64_t kFftGroup = 16;
constexpr int64_t kFftTile = kFftGroup * kFftGroup;  // complex values of the smallest block
constexpr int64_t kFftMaxInputs = 16;  // of an outer step; 1 to 8 and 16 are there

// Factors of a split: b, b^2, b^3 as (re, im), filled up to a multiple of 16 bytes.
constexpr int64_t kFftSplitFloats = 8;
// Of a tile: five splits of its rows (filled up to whole lines); then, with 16 blocks in the lanes,
// b, b^2, b^3 of one split and of four.
constexpr int64_t kFftTileRowFloats = 48;
constexpr int64_t kFftTileFloats = kFftTileRowFloats + 5 * 3 * 2 * kFftGroup;

// What to compute. A real sequence of n values has n / 2 + 1 different frequencies: with f = 0 the
// blocks beyond the first half mirror the others.
struct FftConvShape {
  int64_t n;         // modulus z^n - e^(2 pi i f)
  int64_t outer;     // parts of the outer split
  int64_t blocks;    // how many of them are computed, the first ones
  int64_t inputs;    // segments of n / outer values that sequences fill at most
  bool right_angle;  // f = 1/4 instead of 0
  bool circular;     // with f = 1/4: the real + the imaginary part, not the real part alone
  bool mirrored;     // with f = 0: blocks count twice, except block 0 and block outer / 2
};

// Into how many parts a block of `size` values, a power of two above kFftTile, is split.
constexpr int64_t fft_parts(int64_t size) { return size == 2 * kFftTile ? 2 : 4; }

// A plan as the kernels read it: plain pointers, valid as long as the FftConvPlan lives.
struct FftConvTables {
  int64_t n;        // modulus z^n - e^(2 pi i f)
  int64_t block;    // complex values of a block: a power of two of at least kFftTile
  int64_t blocks;   // how many are computed
  int64_t inputs;   // segments of `block` values in the input and in the output
  const float* analysis;   // [blocks][inputs][re, im]: from input segments to blocks
  const float* synthesis;  // [blocks][inputs][of re, of im]: from blocks to output segments
  const float* adjoint;    // the same for correlations
  const float* tail;       // the same, to what the next segment adds
  const float* twiddles;   // of block q at q * twiddle_stride, in the order of use
  int64_t twiddle_stride;

  int64_t spectrum_floats() const { return blocks * 2 * block; }
};

class FftConvPlan {
 public:
  // Throws std::invalid_argument if the shape contradicts itself.
  explicit FftConvPlan(const FftConvShape& shape);
  FftConvPlan(const FftConvPlan&) = delete;
  FftConvPlan& operator=(const FftConvPlan&) = delete;

  const FftConvTables& tables() const { return tables_; }
  const FftConvShape& shape() const { return shape_; }
  // The frequency of each complex value of a spectrum, in units of 1 / n, without f: at m stands
  // the value at e^(2 pi i (m + f) / n), the conjugate of what is usual for a real sequence.
  std::vector<int64_t> bins() const;

 private:
  FftConvShape shape_;
  std::vector<float> analysis_, synthesis_, adjoint_, tail_, twiddles_;
  FftConvTables tables_{};
};

// Rows of float32 sequences: [batch][channels][length], neighbours in a sequence adjacent.
struct FftRows {
  const float* data = nullptr;  // null: there is none (gates)
  int64_t image = 0;            // floats from image to image
  int64_t channel = 0;          // floats from channel to channel

  const float* row(int64_t b, int64_t c) const {
    return data ? data + b * image + c * channel : nullptr;
  }
};

// Real values, and what multiplies them on the way.
struct FftSignal {
  const float* data;
  const float* gate;  // or null
  int64_t length;
};

// Filters as they are, to be transformed on the way.
struct FftFilters {
  FftRows rows;  // of no image
  int64_t taps = 0;
  const float* mask = nullptr;  // [spectrum_floats], multiplies spectra; or null
};

struct FftConvArgs {
  const FftConvPlan* plan = nullptr;
  FftRows x, gate, out_gate;
  FftFilters filters;
  const float* spectra = nullptr;  // [channels][spectrum_floats], instead of filters; or null
  float* y = nullptr;              // [batch][channels][length]
  int64_t batch = 0, channels = 0, length = 0;
  bool adjoint = false;  // correlation instead: the gradient of the input
};

struct FftCorrelateArgs {
  const FftConvPlan* plan = nullptr;
  FftRows x, x_gate, dy, dy_gate;
  const float* mask = nullptr;  // [spectrum_floats], multiplies the result's spectrum; or null
  float* dk = nullptr;  // [channels][filter_length]
  int64_t batch = 0, channels = 0, length = 0, filter_length = 0;
};

// Filters to spectra, [channels][spectrum_floats].
void fft_spectra(const FftConvPlan& plan, const FftFilters& filters, int64_t channels,
                 float* spectra, int threads);
// y = out_gate * conv(gate * x). Results do not depend on `threads`.
void fft_convolve(const FftConvArgs& args, int threads);
// The gradient of the filters: the sum over images of the correlation of gate * x and gate * dy.
void fft_correlate(const FftCorrelateArgs& args, int threads);

// Where real values go: y[0 .. length) = gate * (values + carry); - carry for correlations.
struct FftEnd {
  float* carry;       // n floats, replaced by the tail; or null
  const float* gate;  // or null
  float* y;
  int64_t length;
  bool adjoint;
};

// What every instruction set provides. Spectra have blocks `stride` floats apart.
struct FftConvKernels {
  // One segment's spectrum.
  void (*analyse)(const FftConvTables& tables, const FftSignal& signal, float* spectrum,
                  int64_t stride);
  // In place: spectrum times filter (or its conjugate), back up to the blocks.
  void (*convolve)(const FftConvTables& tables, const FftSignal& signal, const float* filter,
                   bool conjugate, float* work, int64_t stride);
  // From the blocks to real values.
  void (*synthesise)(const FftConvTables& tables, const float* work, int64_t stride,
                     const FftEnd& end);
  // sum += conj(x) * (dy + i * next); `next` may be null.
  void (*accumulate)(const FftConvTables& tables, const float* x, const float* dy,
                     const float* next, float* sum, int64_t stride);
  // From spectrum to blocks, in place.
  void (*invert)(const FftConvTables& tables, float* work, int64_t stride);
};

}  // namespace aerogel
