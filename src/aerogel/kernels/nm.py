"""N:M weights on one to a few vectors: the same products as `gemv`, from fewer bytes.

Of every m consecutive inputs an output reads at most n. Where the stored places of a packed weight
are so, an index takes 2 or 3 bits instead of a byte, and a permutation fetches what sixteen outputs
read of a group at once: 4.25 bytes a non-zero in float32 at 2:4, 2.25 in bfloat16, 1.25 in int8.
`gemv` and plans use it by themselves. For many vectors `spmm` is faster, whatever the pattern.

Reference: Mishra et al., Accelerating Sparse Deep Neural Networks, arXiv 2104.08378 (2:4);
csrc/nm.h describes the format.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from aerogel.kernels._calls import kept_stream, pack_stored, version
from aerogel.kernels._library import isa, native
from aerogel.kernels.formats import BlockRowWeight, entry_indices

NM_PATTERNS = ((1, 4), (2, 4), (1, 8), (2, 8))
# An N:M mask is nearly full in its kept places; a very sparse random one meets N:M by accident, and
# is cheaper in `gemv`'s own stream, which stores no zeros.
LEAST_GROUP_FILL = 0.9


def nm_pattern(
    weight: BlockRowWeight, least_fill: float = LEAST_GROUP_FILL
) -> tuple[int, int] | None:
    """The tightest pattern (n, m) that the stored places of a weight follow.

    Args:
        weight: packed (out, in) weight; only one of single rows (block 1) has a pattern.
        least_fill: how full its groups must be on the whole, in [0, 1].

    Returns:
        One of `NM_PATTERNS`, or None.
    """
    if weight.block != 1 or not len(weight.columns):
        return None
    key = ("n:m", least_fill)
    if key not in weight._defaults:
        weight._defaults[key] = _find_pattern(weight, least_fill)
    found: tuple[int, int] | None = weight._defaults[key]
    return found


def _find_pattern(weight: BlockRowWeight, least_fill: float) -> tuple[int, int] | None:
    rows, cols = weight.shape
    at_row, at_col = entry_indices(
        weight.columns, weight.row_ptr, weight.shape, weight.block, len(weight.columns)
    )
    for n, m in NM_PATTERNS:
        groups = math.ceil(cols / m)
        counts = torch.bincount(at_row * groups + at_col // m, minlength=rows * groups)
        if int(counts.max()) <= n and len(at_col) >= least_fill * n * rows * (cols // m):
            return n, m
    return None


def native_nm_weight(weight: BlockRowWeight, n: int, m: int) -> Any:
    """The native n:m stream of a weight, packed once and then kept; `.nbytes` is what is read.

    Args:
        weight: float32, bfloat16 or int8 weight of single rows on the CPU.
        n: most stored places of a group.
        m: inputs of a group; see `NM_PATTERNS`.

    Raises:
        ValueError: a group holds more, or the weight has blocks of rows.
    """
    if weight.block != 1:
        raise ValueError(f"weight: has blocks of {weight.block} rows, expected single rows")
    key = ("nm", n, m, isa(), version(weight))
    return kept_stream(weight, key, lambda: pack_stored(weight, native().nm_pack, n, m))
