#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>

#include "huge_pages.h"
#include "layers_weights.h"

namespace aerogel {

namespace {

constexpr std::align_val_t alignment_of(bool huge) {
  return std::align_val_t{huge ? kHugePage : size_t{64}};
}

// Outputs o in [0, out) with 0 <= o * stride - pad + offset < in.
TapRange inside(int64_t in, int64_t out, int64_t stride, int64_t pad, int64_t offset) {
  const int64_t shift = pad - offset;  // the tap reads o * stride - shift
  const int64_t first = shift > 0 ? (shift + stride - 1) / stride : 0;
  const int64_t last = in - 1 + shift < 0 ? 0 : (in - 1 + shift) / stride + 1;
  const int64_t begin = std::min(first, out);
  return {begin, std::max(begin, std::min(last, out))};
}

int64_t window_size(int64_t in, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation,
                    bool ceil_mode) {
  const int64_t room = in + 2 * pad - dilation * (kernel - 1) - 1;
  if (room < 0) throw std::invalid_argument("kernel: larger than the padded input");
  const int64_t out = (room + (ceil_mode ? stride - 1 : 0)) / stride + 1;
  return ceil_mode && (out - 1) * stride >= in + pad ? out - 1 : out;
}

}  // namespace

Window make_window(int64_t in_h, int64_t in_w, const std::vector<int64_t>& g, bool ceil_mode) {
  if (g.size() != 8) throw std::invalid_argument("geometry: expected eight numbers");
  Window w{in_h, in_w, 0, 0, g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7]};
  for (size_t i = 0; i < 8; ++i) {
    if (g[i] < (i == 4 || i == 5 ? 0 : 1)) throw std::invalid_argument("geometry: too small");
  }
  w.out_h = window_size(in_h, w.kernel_h, w.stride_h, w.pad_h, w.dilation_h, ceil_mode);
  w.out_w = window_size(in_w, w.kernel_w, w.stride_w, w.pad_w, w.dilation_w, ceil_mode);
  return w;
}

FloatBuffer::FloatBuffer(int64_t size) : size_(size) {
  const size_t bytes = static_cast<size_t>(std::max<int64_t>(size, 1)) * sizeof(float);
  const bool huge = bytes >= kHugePage;
  data_ = {static_cast<float*>(::operator new(bytes, alignment_of(huge))), Free{huge}};
  if (huge) advise_huge_pages(data_.get(), bytes);
  std::memset(data_.get(), 0, bytes);
}

void FloatBuffer::Free::operator()(float* pointer) const { ::operator delete(pointer, alignment_of(huge)); }

Taps::Taps(const Window& w) {
  for (int64_t kx = 0; kx < w.kernel_w; ++kx) {
    x.push_back(inside(w.in_w, w.out_w, w.stride_w, w.pad_w, kx * w.dilation_w));
  }
  for (int64_t ky = 0; ky < w.kernel_h; ++ky) {
    y.push_back(inside(w.in_h, w.out_h, w.stride_h, w.pad_h, ky * w.dilation_h));
  }
}

std::vector<WindowTap> window_taps(int64_t channels, int64_t kernel_h, int64_t kernel_w) {
  std::vector<WindowTap> taps;
  for (int64_t k = 0; k < channels * kernel_h * kernel_w; ++k) {
    taps.push_back({static_cast<int32_t>(k / (kernel_h * kernel_w)),
                    static_cast<int32_t>(k / kernel_w % kernel_h),
                    static_cast<int32_t>(k % kernel_w)});
  }
  return taps;
}

int64_t strip_floats(const Window& w, int64_t columns) {
  if (w.stride_w != 1) return 0;
  const StripShape narrow = strip_shape(w, std::min(columns, w.out_w), 2);
  const StripShape wide = strip_shape(w, columns, (columns - 1) / w.out_w + 2);
  return 2 * std::max(strip_size(narrow), strip_size(wide));
}

ConvWeight::ConvWeight(const ConvSource& source, const DenseTile& tile) : taps_(source.window) {
  const Window& w = source.window;
  ConvLayer& l = layer_;
  l.window = w;
  l.groups = source.groups;
  l.group_inputs = source.in_channels / source.groups;
  l.group_outputs = source.out_channels / source.groups;
  l.depth = l.group_inputs * w.kernel_h * w.kernel_w;
  l.row_blocks = (l.group_outputs + tile.rows - 1) / tile.rows;
  l.pointwise = w.kernel_h == 1 && w.kernel_w == 1 && w.stride_h == 1 && w.stride_w == 1 &&
                w.pad_h == 0 && w.pad_w == 0;
  const int64_t rows = l.row_blocks * tile.rows;
  weight_ = FloatBuffer(l.groups * rows * l.depth);
  bias_ = FloatBuffer(l.groups * rows);

  float* to = weight_.data();
  for (int64_t g = 0; g < l.groups; ++g) {
    const float* from = source.weight + g * l.group_outputs * l.depth;
    for (int64_t k0 = 0; k0 < l.depth; k0 += kConvDepthBlock) {
      const int64_t k1 = std::min(k0 + kConvDepthBlock, l.depth);
      for (int64_t r0 = 0; r0 < rows; r0 += tile.rows) {
        for (int64_t k = k0; k < k1; ++k) {
          for (int64_t r = r0; r < r0 + tile.rows; ++r) {
            *to++ = r < l.group_outputs ? from[r * l.depth + k] : 0.0f;
          }
        }
      }
    }
    if (source.bias) {
      std::copy_n(source.bias + g * l.group_outputs, l.group_outputs, bias_.data() + g * rows);
    }
  }
  l.weight = weight_.data();
  l.bias = bias_.data();
  l.taps_x = taps_.x.data();
  l.taps_y = taps_.y.data();
  depths_ = window_taps(l.group_inputs, w.kernel_h, w.kernel_w);
  l.depths = depths_.data();
}

DepthwiseWeight::DepthwiseWeight(const ConvSource& source, int64_t lanes)
    : taps_(source.window),
      weight_(source.out_channels * source.window.kernel_h * source.window.kernel_w),
      bias_(source.out_channels) {
  std::copy_n(source.weight, weight_.size(), weight_.data());
  if (source.bias) std::copy_n(source.bias, bias_.size(), bias_.data());
  layer_ = DepthwiseLayer{source.window,
                          source.out_channels / source.in_channels,
                          weight_.data(),
                          bias_.data(),
                          taps_.x.data(),
                          taps_.y.data(),
                          nullptr,
                          0,
                          nullptr};
  const Window& w = source.window;
  const bool square = w.kernel_h == w.kernel_w && w.stride_h == w.stride_w;
  const bool known = (w.kernel_w == 3 || w.kernel_w == 5) && w.stride_w <= 2;
  const bool plain = w.dilation_h == 1 && w.dilation_w == 1 && w.pad_w < w.kernel_w &&
                     w.out_h * w.out_w > 1;
  if (square && known && plain) make_tiles(lanes);
}

// Vectors of one output row step by whole vectors; the last one is moved back so that it ends with
// the row, where the row is long enough.
void DepthwiseWeight::make_tiles(int64_t lanes) {
  const Window& w = layer_.window;
  zeros_ = FloatBuffer(w.in_w + 2 * kReadSlack);
  for (int64_t start = 0; start < w.out_w; start += lanes) {
    tiles_.push_back({std::max<int64_t>(0, std::min(start, w.out_w - lanes)), nullptr});
  }
  const int64_t mask_size = w.kernel_w * lanes;
  masks_ = FloatBuffer(static_cast<int64_t>(tiles_.size()) * mask_size);
  float* mask = masks_.data();
  for (DepthwiseTile& tile : tiles_) {
    bool border = false;
    for (int64_t kx = 0; kx < w.kernel_w; ++kx) {
      const TapRange range = taps_.x[static_cast<size_t>(kx)];
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const int64_t ox = tile.start + lane;
        const uint32_t bits = ox >= range.first && ox < range.last ? 0xffffffffu : 0u;
        std::memcpy(mask + kx * lanes + lane, &bits, sizeof bits);
        border = border || (bits == 0 && ox < w.out_w);
      }
    }
    if (border || w.out_w < lanes) tile.mask = mask;
    mask += mask_size;
  }
  layer_.tiles = tiles_.data();
  layer_.tile_count = static_cast<int64_t>(tiles_.size());
  layer_.zeros = zeros_.data() + kReadSlack;
}

}  // namespace aerogel
