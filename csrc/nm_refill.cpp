// A mask is read eight entries a word, whose lowest set bit says where the next kept entry is.
//
// Reading order: what one word keeps -> one output whose inputs are neighbours -> some outputs that
// are neighbours themselves -> one segment of a stream.
#include "nm_refill.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#include "parallel.h"

namespace aerogel {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "masks are read as little-endian words");

constexpr int64_t kWord = 8;       // mask entries of a word
// Outputs read together where they are neighbours: inputs lie pages apart, so that shorter pieces of
// each would wait for memory; what is written meanwhile stays in the first cache.
constexpr int64_t kNeighbours = 512;

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

// Where the kept entries of one output go, `width` slots apart.
struct Slots {
  float* weights = nullptr;
  int32_t* offsets = nullptr;
  int64_t width = 0;
};

// One slab of one tile: what its rows have in common.
struct Segment {
  const NmSource* source;
  int64_t k_begin, k_end;
  int32_t row_bytes;  // of activations in scratch

  int64_t group_end(int64_t k) const { return std::min(k + source->m, k_end); }
  bool of_eights(int64_t n) const {
    return source->m == kWord && source->n == n && (k_end - k_begin) % kWord == 0;
  }
  int64_t kept(int64_t k) const { return std::min(source->n, group_end(k) - k); }
};

// Stores what a word keeps, from slot `used` on but not beyond `room`; returns the next free slot,
// or one that is too high if there was not enough room.
inline int64_t store_kept(uint64_t word, const float* weight, int64_t step, int64_t k,
                          int32_t row_bytes, const Slots& to, int64_t used, int64_t room) {
  for (; word != 0; word &= word - 1, ++used) {
    if (used == room) return room + 1;
    const int64_t j = __builtin_ctzll(word) / 8;
    to.weights[used * to.width] = weight[j * step];
    to.offsets[used * to.width] = static_cast<int32_t>(k + j) * row_bytes;
  }
  return used;
}

// The same for a whole group of eight that must keep just kN. Without branches: a missing entry
// reads the last of the group, and the result says so.
template <int kN>
inline bool store_eight(uint64_t word, const float* weight, int64_t step, int32_t place,
                        int32_t row_bytes, float* weights, int32_t* offsets, int64_t width) {
  bool fits = true;
#pragma GCC unroll 2
  for (int i = 0; i < kN; ++i) {
    fits &= word != 0;
    const int64_t j = __builtin_ctzll(word | uint64_t{1} << 63) / 8;
    weights[i * width] = weight[j * step];
    offsets[i * width] = place + static_cast<int32_t>(j) * row_bytes;
    word &= word - 1;
  }
  return fits & (word == 0);
}

inline uint64_t load_word(const uint8_t* mask, int64_t entries) {
  uint64_t word = 0;
  if (entries == kWord) {
    std::memcpy(&word, mask, kWord);
  } else {
    std::memcpy(&word, mask, static_cast<size_t>(entries));
  }
  return word;
}

template <int kN>
bool fill_row_of_eights(const Segment& s, int64_t row, const Slots& to) {
  const int64_t start = row * s.source->row_step, width = to.width, end = s.k_end;
  const float* weight = s.source->weight + start;
  const uint8_t* mask = s.source->mask + start;
  float* weights = to.weights;
  int32_t* offsets = to.offsets;
  bool fits = true;
  for (int64_t k = s.k_begin; k < end; k += kWord) {
    fits &= store_eight<kN>(load_word(mask + k, kWord), weight + k, 1,
                            static_cast<int32_t>(k) * s.row_bytes, s.row_bytes, weights, offsets,
                            width);
    weights += kN * width;
    offsets += kN * width;
  }
  return fits;
}

bool fill_row(const Segment& s, int64_t row, const Slots& to) {
  if (s.of_eights(1)) return fill_row_of_eights<1>(s, row, to);
  if (s.of_eights(2)) return fill_row_of_eights<2>(s, row, to);
  const float* weight = s.source->weight + row * s.source->row_step;
  const uint8_t* mask = s.source->mask + row * s.source->row_step;
  int64_t used = 0;
  for (int64_t k = s.k_begin; k < s.k_end; k += s.source->m) {
    const int64_t end = s.group_end(k), room = used + s.kept(k);
    for (int64_t at = k; at < end; at += kWord) {
      const uint64_t word = load_word(mask + at, std::min(kWord, end - at));
      used = store_kept(word, weight + at, 1, at, s.row_bytes, to, used, room);
    }
    if (used != room) return false;
  }
  return true;
}

// Byte i of word j becomes byte j of word i: halves, quarters and eighths change places.
inline void transpose_bytes(uint64_t (&words)[kWord]) {
  const auto exchange = [&](int distance, uint64_t low) {
    for (int i = 0; i < kWord; ++i) {
      if (i & distance) continue;
      uint64_t &a = words[i], &b = words[i + distance];
      const uint64_t changed = (a >> (8 * distance) ^ b) & low;
      b ^= changed;
      a ^= changed << (8 * distance);
    }
  };
  exchange(4, 0x00000000ffffffffu);
  exchange(2, 0x0000ffff0000ffffu);
  exchange(1, 0x00ff00ff00ff00ffu);
}

template <int kN>
bool fill_neighbours_of_eights(const Segment& s, int64_t row, int64_t count, const Slots* to) {
  const int64_t step = s.source->column_step, end = s.k_end;
  float* weights[kNeighbours];
  int32_t* offsets[kNeighbours];
  for (int64_t i = 0; i < count; ++i) {
    weights[i] = to[i].weights;
    offsets[i] = to[i].offsets;
  }
  bool fits = true;
  for (int64_t k = s.k_begin; k < end; k += kWord) {
    for (int64_t first = 0; first < count; first += kWord) {
      const int64_t place = k * step + row + first;
      uint64_t words[kWord];
      for (int64_t j = 0; j < kWord; ++j) {
        words[j] = load_word(s.source->mask + place + j * step, kWord);
      }
      transpose_bytes(words);
      for (int64_t i = 0; i < kWord; ++i) {
        const int64_t width = to[first + i].width;
        fits &= store_eight<kN>(words[i], s.source->weight + place + i, step,
                                static_cast<int32_t>(k) * s.row_bytes, s.row_bytes,
                                weights[first + i], offsets[first + i], width);
        weights[first + i] += kN * width;
        offsets[first + i] += kN * width;
      }
    }
  }
  return fits;
}

// `count` outputs from `row` on, at most kNeighbours.
bool fill_neighbours(const Segment& s, int64_t row, int64_t count, const Slots* to) {
  if (count % kWord == 0) {
    if (s.of_eights(1)) return fill_neighbours_of_eights<1>(s, row, count, to);
    if (s.of_eights(2)) return fill_neighbours_of_eights<2>(s, row, count, to);
  }
  const int64_t step = s.source->column_step;
  int64_t used[kNeighbours] = {};
  for (int64_t k = s.k_begin, all = 0; k < s.k_end; k += s.source->m) {
    const int64_t end = s.group_end(k);
    all += s.kept(k);
    for (int64_t at = k; at < end; at += kWord) {
      for (int64_t first = 0; first < count; first += kWord) {
        const int64_t place = at * step + row + first, wide = std::min(kWord, count - first);
        uint64_t words[kWord] = {};
        for (int64_t j = 0; j < std::min(kWord, end - at); ++j) {
          words[j] = load_word(s.source->mask + place + j * step, wide);
        }
        transpose_bytes(words);
        for (int64_t i = 0; i < wide; ++i) {
          used[first + i] = store_kept(words[i], s.source->weight + place + i, step, at,
                                       s.row_bytes, to[first + i], used[first + i], all);
        }
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      if (used[i] != all) return false;
    }
  }
  return true;
}

// The rows of a segment in the order of the stream, whose structure `nm_refill` has checked.
bool fill_segment(const Segment& s, const SpmmStream& stream, int64_t segment) {
  // The stream's memory belongs to a weight that the caller lets us change.
  const auto weights = const_cast<float*>(stream.weights);
  const auto offsets = const_cast<int32_t*>(stream.offsets);
  SpmmSegment at = stream.segments[segment];
  const int64_t end = stream.segments[segment + 1].run;
  Slots pending[kNeighbours];
  int64_t first = 0, count = 0;  // outputs that wait in `pending`
  const auto flush = [&] {
    const bool fits = fill_neighbours(s, first, count, pending);
    count = 0;
    return fits;
  };
  for (; at.run < end; ++at.run) {
    const SpmmRun& run = stream.runs[at.run];
    const int64_t entries = static_cast<int64_t>(run.steps) * run.width;
    for (int32_t g = 0; g < run.groups; ++g) {
      for (int32_t r = 0; r < run.width; ++r, ++at.row) {
        const int64_t row = stream.rows[at.row];
        const Slots to{weights + at.weight + r, offsets + at.offset + r, run.width};
        if (s.source->column_step == 1) {
          if (!fill_row(s, row, to)) return false;
          continue;
        }
        if (count == kNeighbours || (count > 0 && row != first + count)) {
          if (!flush()) return false;
        }
        if (count == 0) first = row;
        pending[count++] = to;
      }
      at.weight += (entries + 3) & ~int64_t{3};
      at.offset += entries;
    }
  }
  return count == 0 || flush();
}

void check(const SpmmWeight& weight, const NmSource& source) {
  const SpmmStream& s = weight.stream();
  if (source.n < 1 || source.n > source.m) {
    fail("n=" + std::to_string(source.n) + ", m=" + std::to_string(source.m) +
         ": expected 1 <= n <= m");
  }
  if (!weight.variant().pack) fail("weight: expected one whose variant packs");
  if (source.row_step != 1 && source.column_step != 1) fail("source: expected neighbours");
  for (int64_t segment = 0; segment < s.tiles * s.slabs; ++segment) {
    const int64_t slab = segment % s.slabs, tile = segment / s.slabs;
    const Segment part{&source, s.slab_cols[slab], s.slab_cols[slab + 1], 0};
    int64_t steps = 0, rows = 0;
    for (int64_t k = part.k_begin; k < part.k_end; k += source.m) steps += part.kept(k);
    bool fits = part.k_begin % source.m == 0;
    for (int64_t r = s.segments[segment].run; r < s.segments[segment + 1].run; ++r) {
      fits = fits && s.runs[r].steps == steps && s.runs[r].block == 1;
      rows += static_cast<int64_t>(s.runs[r].groups) * s.runs[r].width;
    }
    if (!fits || rows != s.tile_rows[tile + 1] - s.tile_rows[tile]) {
      fail("weight: expected single rows, and " + std::to_string(source.n) + " of every " +
           std::to_string(source.m) + " inputs in slabs of whole groups");
    }
  }
}

}  // namespace

bool nm_refill(SpmmWeight& weight, const NmSource& source, int threads) {
  check(weight, source);
  const SpmmStream& s = weight.stream();
  const int32_t row_bytes = weight.variant().vectors * weight.kernels().lanes * 4;
  std::atomic<bool> fits{true};
  parallel_tasks(s.tiles * s.slabs, threads, [&](int64_t segment) {
    if (!fits.load(std::memory_order_relaxed)) return;
    const int64_t slab = segment % s.slabs;
    const Segment part{&source, s.slab_cols[slab], s.slab_cols[slab + 1], row_bytes};
    if (!fill_segment(part, s, segment)) fits = false;
  });
  return fits;
}

}  // namespace aerogel
