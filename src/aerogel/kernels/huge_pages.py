"""Memory for large buffers that are read from scattered places.

A page of 4 KiB holds sixteen rows of a head with 64 float32 channels: a decoding step over
scattered keys looks up an address translation for each run that it reads, and evicts those of
everybody else. Pages of 2 MiB make that vanish: measured, 1/16 of 32k keys in runs of 16 come from
memory 1.3 times as fast.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import sys
from collections.abc import Callable

from torch import Tensor

HUGE_PAGE = 2 << 20  # bytes, on x86-64 and on ARM with pages of 4 KiB
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # asm-generic/mman-common.h


def empty_rows(like: Tensor, *shape: int) -> Tensor:
    """A new tensor as `like`, in huge pages where the system has them and that costs no memory.

    That is on Linux on the CPU, if one block of rows, what the last two dimensions span, fills a
    huge page or more: then blocks that are filled from their first row on touch no page that stays
    unused but one. Such a tensor begins on the boundary of a huge page, without which a buffer of
    two would lie in one: its storage is up to a page longer, in addresses, not in memory.

    Args:
        like: gives dtype and device.
        shape: (..., rows, channels).

    Returns:
        What `like.new_empty` returns.
    """
    item = like.element_size()
    if not like.is_cpu or item * shape[-1] * shape[-2] < HUGE_PAGE or _madvise() is None:
        return like.new_empty(*shape)
    count = math.prod(shape)
    longer = like.new_empty(count + HUGE_PAGE // item)
    begin = -longer.data_ptr() % HUGE_PAGE // item
    buffer = longer[begin : begin + count].view(shape)
    _ask(buffer.data_ptr(), count * item)
    return buffer


def _ask(address: int, size: int) -> bool:
    """Asks for huge pages within [address, address + size); True where the system took note."""
    advise = _madvise()
    begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    whole = (address + size - begin) // mmap.PAGESIZE * mmap.PAGESIZE
    if advise is None or whole <= 0:
        return False
    taken = advise(begin, whole, _MADV_HUGEPAGE) == 0
    if taken:  # what the allocator had used before has small pages; Linux 6.1 and later move them
        advise(begin, whole, _MADV_COLLAPSE)
    return taken


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        call = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    call.restype = ctypes.c_int
    found: Callable[[int, int, int], int] = call
    return found
