// Memory in pages of 2 MiB, where the system has them and gives them on request (Linux). The planes of
// an arena are rows many KiB apart: with small pages, reading a panel of columns takes an address
// translation per channel, and an arena of several MiB more of them than a second-level table holds.
#pragma once

#include <cstddef>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace aerogel {

constexpr size_t kHugePage = size_t{2} << 20;  // on x86-64 and on ARM with pages of 4 KiB

// Asks for huge pages in the whole ones of [begin, begin + bytes); begin lies on the boundary of one.
// Whether the system heeds it changes nothing but time.
inline void advise_huge_pages(void* begin, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, Linux 6.1: also what the allocator used before
  const size_t whole = bytes / kHugePage * kHugePage;
  if (whole > 0 && madvise(begin, whole, MADV_HUGEPAGE) == 0) madvise(begin, whole, kCollapse);
#else
  static_cast<void>(begin);
  static_cast<void>(bytes);
#endif
}

}  // namespace aerogel
