"""Which scores are the k largest: the choice behind every mask that is not N:M.

Reference: csrc/largest.h.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from aerogel.kernels._library import native_in_use

_MOST = 2**31 - 1  # kLargestCount
_TIE_CHUNK = 1 << 20


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
    mask = torch.empty(values.shape, dtype=torch.bool, device="cpu")
    native.largest(
        values.data_ptr(),
        0 if competing is None else competing.data_ptr(),
        mask.data_ptr(),
        values.numel(),
        k,
    )
    return mask


def _fits(score: Tensor) -> bool:
    narrow = score.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return score.is_cpu and narrow and score.numel() <= _MOST and not torch.compiler.is_compiling()


def largest_mask_reference(score: Tensor, k: int, among: Tensor | None = None) -> Tensor:
    """`largest_mask` in torch by selection, which is linear work: any dtype, any device."""
    flat = comparable(score).flatten()
    if among is not None:
        places = among.to(flat.device).flatten().nonzero().flatten()
        mask = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
        mask[places] = largest_mask_reference(flat[places], k)
        return mask.view(score.shape)
    if not 0 <= k <= len(flat):
        raise ValueError(f"keep={k}: only {len(flat)} entries compete")
    if k == 0:
        return torch.zeros(score.shape, dtype=torch.bool, device=flat.device)
    threshold = kth_largest(flat, k)
    kept = flat > threshold
    _fill_ties(kept, flat, threshold, k - int(torch.count_nonzero(kept)))
    return kept.view(score.shape)


def _fill_ties(kept: Tensor, flat: Tensor, threshold: Tensor, missing: int) -> None:
    """Keep the first ``missing`` entries equal to the threshold, in index order."""
    # In chunks, because a tensor of equal scores would need an index for each of its entries.
    for start in range(0, flat.numel(), _TIE_CHUNK):
        ties = flat[start : start + _TIE_CHUNK] == threshold
        found = int(torch.count_nonzero(ties))
        if found > missing:
            ties[ties.nonzero().flatten()[missing:]] = False
        kept[start : start + _TIE_CHUNK] |= ties
        missing -= min(found, missing)
        if missing == 0:
            return


def kth_largest(score: Tensor, k: int) -> Tensor:
    """The ``k``-th largest value (1 = the largest) of all entries, as a 0-dim tensor."""
    flat = comparable(score).flatten()
    if not 1 <= k <= flat.numel():
        raise ValueError(f"k must be in [1, {flat.numel()}], got {k}")
    if flat.device.type == "cpu":
        # torch.kthvalue also permutes an int64 index per entry, three times the memory traffic.
        place = flat.numel() - k
        return torch.from_numpy(np.partition(flat.numpy(), place)[place : place + 1].copy())[0]
    return torch.kthvalue(flat, flat.numel() - k + 1).values


def comparable(score: Tensor) -> Tensor:
    """The score detached, in a type that every selection kernel supports."""
    score = score.detach()
    return score.float() if score.dtype in (torch.float16, torch.bfloat16) else score
