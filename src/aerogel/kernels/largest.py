"""Which scores are the k largest: the choice behind every mask that is not N:M.

Reference: csrc/largest.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aerogel.kernels._library import native_in_use

_MOST = 2**31 - 1  # kLargestCount


def largest_mask(score: Tensor, k: int, among: Tensor | None = None) -> Tensor:
    """Bool mask of exactly the k largest entries; of equals the first ones in flat order.

    Native for float32, float16 and bfloat16 on the CPU, in three passes over the scores.

    Args:
        score: of any shape; no nan.
        k: entries to keep, from 0 to those that compete.
        among: bool, of the score's shape: what competes. Everything by default.

    Returns:
        Bool tensor of the score's shape, True = kept.

    Raises:
        ValueError: k out of range, or `among` of another shape or type.
    """
    if among is not None and (among.shape != score.shape or among.dtype is not torch.bool):
        raise ValueError(f"among must be bool {tuple(score.shape)}, got {tuple(among.shape)}")
    native = native_in_use() if _fits(score) else None
    if native is None:
        return largest_mask_reference(score, k, among)
    values = score.detach().float().contiguous()
    competing = None if among is None else among.to(values.device).contiguous()
    mask = torch.empty(values.shape, dtype=torch.bool)
    native.largest(
        values.data_ptr(),
        0 if competing is None else competing.data_ptr(),
        mask.data_ptr(),
        values.numel(),
        k,
    )
    return mask


def selects_largest(score: Tensor) -> bool:
    """Whether `largest_mask` takes these scores natively."""
    return _fits(score) and native_in_use() is not None


def _fits(score: Tensor) -> bool:
    narrow = score.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return score.is_cpu and narrow and score.numel() <= _MOST and not torch.compiler.is_compiling()


def largest_mask_reference(score: Tensor, k: int, among: Tensor | None = None) -> Tensor:
    """`largest_mask` by a stable sort in torch: any dtype, any device."""
    flat = score.detach().flatten()
    places = torch.arange(len(flat), device=flat.device)
    if among is not None:
        places = among.to(flat.device).flatten().nonzero().flatten()
    if not 0 <= k <= len(places):
        raise ValueError(f"keep={k}: only {len(places)} entries compete")
    best = flat[places].sort(descending=True, stable=True).indices[:k]
    mask = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    mask[places[best]] = True
    return mask.view(score.shape)
