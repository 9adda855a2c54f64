// Scratch of one thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace aerogel {

// Grows, never shrinks, lives as long as its owner; 64-byte aligned.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { release(); }

  float* at_least(int64_t floats) {
    if (floats > size_) {
      release();
      data_ = static_cast<float*>(
          ::operator new(static_cast<size_t>(floats) * sizeof(float), kAlignment));
      size_ = floats;
    }
    return data_;
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  void release() {
    ::operator delete(data_, kAlignment);
    data_ = nullptr;
    size_ = 0;
  }
  float* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace aerogel
