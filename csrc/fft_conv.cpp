// Plans of long convolutions, and rows handed out to threads.
#include "fft_conv.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace aerogel {
namespace {

constexpr double kTau = 6.283185307179586476925286766559;
// What the four parts of a split add to a quarter of the phase: b, -b, ib, -ib.
constexpr double kQuarters[4] = {0.0, 0.5, 0.25, 0.75};
constexpr int64_t kTaskPoints = 1 << 14;  // values that are worth handing out
// Blocks lie this much further apart than they are long: they do not meet in a cache's sets.
constexpr int64_t kPadding = 2 * kFftGroup;
constexpr int64_t kLineFloats = 16;

void push_turn(std::vector<float>& out, double turns) {
  out.push_back(static_cast<float>(std::cos(kTau * turns)));
  out.push_back(static_cast<float>(std::sin(kTau * turns)));
}

void push_split(std::vector<float>& out, double phase) {
  for (int power = 1; power <= 3; ++power) push_turn(out, power * phase / 4);
  out.resize(out.size() + kFftSplitFloats - 6);
}

// b, b^2, b^3 for the moduli z^4h - e^(2 pi i phases[l]), l in the lanes.
void push_lanes(std::vector<float>& out, const std::vector<double>& phases) {
  for (int power = 1; power <= 3; ++power) {
    for (double phase : phases) out.push_back(std::cos(kTau * power * phase / 4));
    for (double phase : phases) out.push_back(std::sin(kTau * power * phase / 4));
  }
}

// The phases of the 16 blocks of a tile.
std::vector<double> tile_phases(double phase) {
  std::vector<double> phases;
  for (double first : kQuarters) {
    for (double second : kQuarters) phases.push_back((phase / 4 + first) / 4 + second);
  }
  return phases;
}

void push_tile(std::vector<float>& out, double phase) {
  const size_t begin = out.size();
  push_split(out, phase);
  for (double quarter : kQuarters) push_split(out, phase / 4 + quarter);
  out.resize(begin + kFftTileRowFloats);
  const std::vector<double> phases = tile_phases(phase);
  push_lanes(out, phases);
  for (double quarter : kQuarters) {
    std::vector<double> parts;
    for (double each : phases) parts.push_back(each / 4 + quarter);
    push_lanes(out, parts);
  }
}

// Visits the tiles of a block in the order in which the kernels do.
template <class Split, class Tile>
void walk(int64_t size, double phase, const Split& split, const Tile& tile) {
  if (size == kFftTile) return tile(phase);
  split(size, phase);
  const int64_t parts = fft_parts(size);
  for (int64_t q = 0; q < parts; ++q) {
    const double part = parts == 4 ? phase / 4 + kQuarters[q] : phase / 2 + 0.5 * q;
    walk(size / parts, part, split, tile);
  }
}

std::vector<float> twiddles_of(int64_t size, double phase) {
  std::vector<float> out;
  walk(
      size, phase,
      [&](int64_t whole, double at) {
        if (fft_parts(whole) == 4) return push_split(out, at);
        push_turn(out, at / 2);
        out.resize(out.size() + kFftSplitFloats - 2);
      },
      [&](double at) { push_tile(out, at); });
  return out;
}

std::string text(int64_t value) { return std::to_string(value); }

void check(const FftConvShape& s) {
  const int64_t block = s.outer > 0 ? s.n / s.outer : 0;
  const bool power = block >= kFftTile && (block & (block - 1)) == 0;
  if (!power || block * s.outer != s.n) {
    throw std::invalid_argument("n=" + text(s.n) + ", outer=" + text(s.outer) +
                                ": expected a power of two of at least " + text(kFftTile) +
                                " values in each part");
  }
  if (s.blocks < 1 || s.blocks > s.outer) {
    throw std::invalid_argument("blocks=" + text(s.blocks) + ": expected 1 to " + text(s.outer));
  }
  const bool known = (s.inputs >= 1 && s.inputs <= 8) || s.inputs == kFftMaxInputs;
  if (!known || s.inputs > s.outer) {
    throw std::invalid_argument("inputs=" + text(s.inputs) + ": expected 1 to 8 or " +
                                text(kFftMaxInputs) + ", at most outer=" + text(s.outer));
  }
}

double phase_of(const FftConvShape& s, int64_t q) {
  return (q + (s.right_angle ? 0.25 : 0.0)) / static_cast<double>(s.outer);
}

void check_rows(const char* name, const FftRows& rows, int64_t channels, int64_t length) {
  if (!rows.data && channels * length != 0) {
    throw std::invalid_argument(std::string(name) + ": expected an address");
  }
}

void check_taps(const FftConvTables& t, int64_t taps) {
  if (taps > t.inputs * t.block) {
    throw std::invalid_argument("taps=" + text(taps) + ": expected at most " +
                                text(t.inputs * t.block));
  }
}

// A segment of a row and all after it; past the end it is empty.
FftSignal segment(const FftRows& rows, const FftRows& gates, int64_t b, int64_t c, int64_t begin,
                  int64_t length) {
  const float* gate = gates.row(b, c);
  return {rows.row(b, c) + begin, gate ? gate + begin : nullptr, length - begin};
}

int64_t segments_of(const FftConvPlan& plan, int64_t length) {
  const FftConvTables& t = plan.tables();
  const int64_t span = t.inputs * t.block, segments = (length + span - 1) / span;
  const FftConvShape& s = plan.shape();
  const bool continues = s.right_angle && !s.circular && s.inputs == s.outer;
  if (segments > 1 && !continues) {
    throw std::invalid_argument("length=" + text(length) + ": expected at most " + text(span));
  }
  return segments;
}

int64_t stride_of(const FftConvTables& t) { return 2 * t.block + kPadding; }

void apply_mask(const FftConvTables& t, const float* mask, float* spectrum, int64_t stride) {
  for (int64_t q = 0; mask && q < t.blocks; ++q) {
    for (int64_t i = 0; i < 2 * t.block; ++i) spectrum[q * stride + i] *= mask[q * 2 * t.block + i];
  }
}

void transform_filter(const FftConvTables& t, const FftFilters& filters, int64_t c,
                      float* spectrum) {
  const FftSignal signal{filters.rows.row(0, c), nullptr, filters.taps};
  active_table().fft_conv->analyse(t, signal, spectrum, 2 * t.block);
  apply_mask(t, filters.mask, spectrum, 2 * t.block);
}

void convolve_row(const FftConvArgs& a, int64_t b, int64_t c, int64_t segments,
                  const float* spectrum, float* scratch) {
  const FftConvTables& t = a.plan->tables();
  const FftConvKernels& kernels = *active_table().fft_conv;
  const int64_t stride = stride_of(t), span = t.inputs * t.block;
  float* const work = scratch;
  float* const carry = segments > 1 ? scratch + t.blocks * stride : nullptr;
  if (carry) std::fill_n(carry, span, 0.0f);
  float* const y = a.y + (b * a.channels + c) * a.length;
  const float* const gate = a.out_gate.row(b, c);
  for (int64_t i = 0; i < segments; ++i) {
    const int64_t begin = (a.adjoint ? segments - 1 - i : i) * span;
    kernels.convolve(t, segment(a.x, a.gate, b, c, begin, a.length),
                     spectrum, a.adjoint, work, stride);
    kernels.synthesise(
        t, work, stride,
        {carry, gate ? gate + begin : nullptr, y + begin, a.length - begin, a.adjoint});
  }
}

// Adds up one channel's correlations over images and segments, then brings them back.
void correlate_channel(const FftCorrelateArgs& a, int64_t c, int64_t segments, float* scratch) {
  const FftConvTables& t = a.plan->tables();
  const FftConvKernels& kernels = *active_table().fft_conv;
  const int64_t stride = stride_of(t), floats = t.blocks * stride, span = t.inputs * t.block;
  float *const sum = scratch, *const x = scratch + floats;
  float *dy = scratch + 2 * floats, *next = scratch + 3 * floats;
  std::fill_n(sum, floats, 0.0f);
  for (int64_t b = 0; b < a.batch; ++b) {
    for (int64_t i = segments - 1; i >= 0; --i) {
      const int64_t begin = i * span;
      kernels.analyse(t, segment(a.x, a.x_gate, b, c, begin, a.length), x, stride);
      kernels.analyse(t, segment(a.dy, a.dy_gate, b, c, begin, a.length), dy, stride);
      kernels.accumulate(t, x, dy, i + 1 < segments ? next : nullptr, sum, stride);
      std::swap(dy, next);
    }
  }
  apply_mask(t, a.mask, sum, stride);
  kernels.invert(t, sum, stride);
  kernels.synthesise(t, sum, stride,
                     {nullptr, nullptr, a.dk + c * a.filter_length, a.filter_length, true});
}

}  // namespace

FftConvPlan::FftConvPlan(const FftConvShape& shape) : shape_(shape) {
  check(shape);
  const int64_t block = shape.n / shape.outer;
  const double scale = 1.0 / static_cast<double>(shape.n);
  for (int64_t q = 0; q < shape.blocks; ++q) {
    const bool once = !shape.mirrored || q == 0 || 2 * q == shape.outer;
    const double share = once ? scale : 2 * scale, phase = phase_of(shape, q);
    for (int64_t p = 0; p < shape.inputs; ++p) {
      const double re = share * std::cos(kTau * p * phase), im = share * std::sin(kTau * p * phase);
      push_turn(analysis_, p * phase);
      const double mixed = shape.circular ? 1.0 : 0.0;  // of the imaginary part
      synthesis_.push_back(re - mixed * im);
      synthesis_.push_back(im + mixed * re);
      adjoint_.push_back(re + mixed * im);
      adjoint_.push_back(im - mixed * re);
      tail_.push_back(-im);
      tail_.push_back(re);
    }
    const std::vector<float> twiddles = twiddles_of(block, phase);
    twiddles_.insert(twiddles_.end(), twiddles.begin(), twiddles.end());
  }
  tables_ = {shape.n,
             block,
             shape.blocks,
             shape.inputs,
             analysis_.data(),
             synthesis_.data(),
             adjoint_.data(),
             tail_.data(),
             twiddles_.data(),
             static_cast<int64_t>(twiddles_.size()) / shape.blocks};
}

std::vector<int64_t> FftConvPlan::bins() const {
  std::vector<int64_t> out;
  const double own = shape_.right_angle ? 0.25 : 0.0;
  for (int64_t q = 0; q < shape_.blocks; ++q) {
    walk(
        tables_.block, phase_of(shape_, q), [](int64_t, double) {},
        [&](double phase) {
          const std::vector<double> phases = tile_phases(phase);
          for (double first : kQuarters) {
            for (double second : kQuarters) {
              for (double each : phases) {
                const double turns = (each / 4 + first) / 4 + second;
                const auto bin = std::llround(turns * static_cast<double>(shape_.n) - own);
                out.push_back(((bin % shape_.n) + shape_.n) % shape_.n);
              }
            }
          }
        });
  }
  return out;
}

void fft_spectra(const FftConvPlan& plan, const FftFilters& filters, int64_t channels,
                 float* spectra, int threads) {
  const FftConvTables& t = plan.tables();
  check_rows("filters", filters.rows, channels, filters.taps);
  check_taps(t, filters.taps);
  parallel_tasks(channels, threads, [&](int64_t c) {
    transform_filter(t, filters, c, spectra + c * t.spectrum_floats());
  });
}

void fft_convolve(const FftConvArgs& a, int threads) {
  check_rows("x", a.x, a.batch * a.channels, a.length);
  const FftConvTables& t = a.plan->tables();
  const int64_t segments = segments_of(*a.plan, a.length), rows = a.batch * a.channels;
  if (segments == 0 || rows == 0) return;
  const int64_t floats = t.blocks * stride_of(t) + (segments > 1 ? t.inputs * t.block : 0);
  if (!a.spectra && threads > 1 && a.channels < threads) {  // too few to share out by channel
    std::vector<float> spectra(a.channels * t.spectrum_floats());
    fft_spectra(*a.plan, a.filters, a.channels, spectra.data(), threads);
    FftConvArgs prepared = a;
    prepared.spectra = spectra.data();
    return fft_convolve(prepared, threads);
  }
  if (!a.spectra) {
    check_rows("filters", a.filters.rows, a.channels, a.filters.taps);
    check_taps(t, a.filters.taps);
    parallel_tasks(a.channels, threads, [&](int64_t c) {
      thread_local Scratch scratch;
      float* const work = scratch.at_least(floats + t.spectrum_floats() + kLineFloats);
      // The spectrum is read while it is still in a cache.
      float* const spectrum = work + (floats + kLineFloats - 1) / kLineFloats * kLineFloats;
      transform_filter(t, a.filters, c, spectrum);
      for (int64_t b = 0; b < a.batch; ++b) convolve_row(a, b, c, segments, spectrum, work);
    });
    return;
  }
  const int64_t each = std::max<int64_t>(1, kTaskPoints / a.length);  // rows of a task
  parallel_tasks((rows + each - 1) / each, threads, [&](int64_t task) {
    thread_local Scratch scratch;
    float* const work = scratch.at_least(floats);
    const int64_t end = std::min(rows, (task + 1) * each);
    // A channel's images follow each other: they share its spectrum.
    for (int64_t i = task * each; i < end; ++i) {
      const int64_t c = i / a.batch;
      convolve_row(a, i % a.batch, c, segments, a.spectra + c * t.spectrum_floats(), work);
    }
  });
}

void fft_correlate(const FftCorrelateArgs& a, int threads) {
  check_rows("x", a.x, a.batch * a.channels, a.length);
  check_rows("dy", a.dy, a.batch * a.channels, a.length);
  const FftConvTables& t = a.plan->tables();
  const int64_t segments = segments_of(*a.plan, a.length);
  check_taps(t, a.filter_length);
  const int64_t floats = 4 * t.blocks * stride_of(t);
  parallel_tasks(a.channels, threads, [&](int64_t c) {
    thread_local Scratch scratch;
    correlate_channel(a, c, segments, scratch.at_least(floats));
  });
}

}  // namespace aerogel
