// A few kilobytes in all: what counts is that a step makes one call, whose code is small, where
// attention has just swept the caches.
#include "ring_step.h"

#include <cstring>

namespace aerogel {

void write_rings(const Rings& rings, int64_t position, NewRows keys, NewRows values) {
  const int64_t batches = static_cast<int64_t>(rings.padded.size());
  const int64_t heads = static_cast<int64_t>(rings.offsets.size());
  for (int64_t b = 0; b < batches; ++b) {
    const int64_t real = position - rings.padded[b];
    if (real < 0) continue;
    for (int64_t h = 0; h < heads; ++h) {
      const auto write = [&](int64_t place) {
        const int64_t slot = b * rings.slots + rings.offsets[h] + place;
        std::memcpy(rings.keys + slot * rings.key_bytes,
                    keys.data + b * keys.batch + h * keys.head, rings.key_bytes);
        std::memcpy(rings.values + slot * rings.value_bytes,
                    values.data + b * values.batch + h * values.head, rings.value_bytes);
        rings.positions[slot] = position;
      };
      const int64_t sink = rings.sinks[h], window = rings.windows[h], stride = rings.strides[h];
      if (real < sink) {
        write(real);
      } else if (window > 0) {
        write(sink + (real - sink) % window);
      }
      const int64_t number = real / rings.block - rings.firsts[h];
      if (stride > 0 && number >= 0 && number % stride == 0) {
        write(sink + window + number / stride * rings.block + real % rings.block);
      }
    }
  }
}

}  // namespace aerogel
