// What a plan prepares once per layer and owns: packed weights, border masks, tap ranges.
#pragma once

#include <memory>
#include <vector>

#include "layers.h"

namespace aerogel {

// A zeroed, cache-line-aligned block of floats; a large one lies in huge pages.
class FloatBuffer {
 public:
  FloatBuffer() = default;
  explicit FloatBuffer(int64_t size);
  float* data() { return data_.get(); }
  const float* data() const { return data_.get(); }
  int64_t size() const { return size_; }

 private:
  struct Free {
    bool huge;
    void operator()(float* pointer) const;
  };
  std::unique_ptr<float, Free> data_;
  int64_t size_ = 0;
};

// The window of (kernel, stride, padding, dilation), two numbers each, over such planes, with torch's
// output size. In ceil_mode a window may stick out at the end, but must start inside. Throws
// std::invalid_argument if the numbers are too small or the kernel is larger than the padded input.
Window make_window(int64_t in_h, int64_t in_w, const std::vector<int64_t>& geometry,
                   bool ceil_mode = false);

// The taps of so many channels, in the order of a flattened weight.
std::vector<WindowTap> window_taps(int64_t channels, int64_t kernel_h, int64_t kernel_w);

struct Taps {
  explicit Taps(const Window& window);
  std::vector<TapRange> x, y;
};

// The borrowed, PyTorch-ordered weight of a convolution: [out][in / groups][kernel_h][kernel_w].
struct ConvSource {
  const float* weight;
  const float* bias;  // or null
  int64_t out_channels, in_channels, groups;
  Window window;
};

class ConvWeight {
 public:
  ConvWeight(const ConvSource& source, const DenseTile& tile);
  const ConvLayer& layer() const { return layer_; }
  int64_t nbytes() const { return 4 * (weight_.size() + bias_.size()); }

 private:
  Taps taps_;
  std::vector<WindowTap> depths_;
  FloatBuffer weight_, bias_;
  ConvLayer layer_;
};

class DepthwiseWeight {
 public:
  DepthwiseWeight(const ConvSource& source, int64_t lanes);
  const DepthwiseLayer& layer() const { return layer_; }

 private:
  void make_tiles(int64_t lanes);

  Taps taps_;
  FloatBuffer weight_, bias_, masks_, zeros_;
  std::vector<DepthwiseTile> tiles_;
  DepthwiseLayer layer_;
};

}  // namespace aerogel
