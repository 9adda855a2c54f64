"""Which weights an N:M pattern keeps: the n largest scores of every m neighbours.

N:M training chooses its masks anew from every weight after every step, so the choice is made
without a sort, many groups at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aerogel.kernels._library import native, native_in_use

LONGEST_GROUP = 64
"""Entries of a group that the native kernel takes (`kNmMaskLongest`)."""


def nm_mask_reference(score: Tensor, n: int, m: int, axis: int = -1) -> Tensor:
    """`nm_mask` by a stable sort in torch: any dtype, any device, any m."""
    rows = score.movedim(axis, -1)
    padded = F.pad(rows, (0, -rows.shape[-1] % m), value=-torch.inf)
    groups = padded.unflatten(-1, (-1, m))
    best = groups.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    kept = torch.zeros(groups.shape, dtype=torch.bool, device=score.device)
    kept.scatter_(-1, best, True)
    return kept.flatten(-2)[..., : rows.shape[-1]].movedim(-1, axis).contiguous()


def nm_mask(
    score: Tensor,
    n: int,
    m: int,
    axis: int = -1,
    *,
    magnitude: bool = False,
    threads: int | None = None,
) -> Tensor:
    """Bool mask of the n largest of every m consecutive entries along an axis.

    Of equals the first ones are kept. A shorter last group keeps n too, or all it has. Native for
    floats up to 32 bits on the CPU and groups of up to `LONGEST_GROUP`; everything else, and
    `AEROGEL_KERNELS=reference`, takes the torch reference.

    Args:
        score: of any shape; no nan.
        n: kept of every group, in [1, m].
        m: group length.
        axis: along which groups are cut.
        magnitude: the n largest magnitudes instead.
        threads: default `torch.get_num_threads()`; the result does not depend on it.

    Returns:
        Bool tensor of the score's shape, True = kept.

    Raises:
        ValueError: not 1 <= n <= m, or threads below 1.
    """
    if not 1 <= n <= m:
        raise ValueError(f"n={n}, m={m}: expected 1 <= n <= m")
    threads = torch.get_num_threads() if threads is None else threads
    if threads < 1:
        raise ValueError(f"threads={threads}: expected at least 1")
    if not _runs_natively(score, m):
        return nm_mask_reference(score.abs() if magnitude else score, n, m, axis)
    values = score.detach().float().contiguous()
    mask = torch.empty(values.shape, dtype=torch.bool, device="cpu")
    axis %= values.dim()
    outer, length, inner = (
        values.shape[:axis].numel(),
        values.shape[axis],
        values.shape[axis + 1 :].numel(),
    )
    native().nm_mask(
        values.data_ptr(), mask.data_ptr(), outer, length, inner, n, m, magnitude, threads
    )
    return mask


def _runs_natively(score: Tensor, m: int) -> bool:
    if not score.is_cpu or score.dtype is torch.float64 or not score.is_floating_point():
        return False
    if m > LONGEST_GROUP or torch.compiler.is_compiling():
        return False
    return native_in_use() is not None
