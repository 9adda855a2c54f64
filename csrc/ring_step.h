// Writing one token into the rings of a KV cache: of each key head its sinks, the ring of its window,
// and the blocks on its stride, all heads side by side.
#pragma once

#include <cstdint>
#include <vector>

namespace aerogel {

struct Rings {
  char *keys, *values;            // [batch][slots] rows
  int64_t* positions;             // [batch][slots], position of the token in each slot
  int64_t slots;                  // of all heads
  int64_t key_bytes, value_bytes;  // of a row
  std::vector<int64_t> offsets, sinks, windows;  // per key head; its slots begin at its offset
  std::vector<int64_t> strides, firsts;  // per key head: keeps blocks first, first + stride, ...
  int64_t block;                         // tokens of one
  std::vector<int64_t> padded;  // per batch element: tokens of padding before the first real one
};

// Rows of new tokens, [batch][heads]; strides in bytes.
struct NewRows {
  const char* data;
  int64_t batch, head;
};

// Writes the token at `position` of every batch element and head; padding is passed over.
void write_rings(const Rings& rings, int64_t position, NewRows keys, NewRows values);

}  // namespace aerogel
