"""Exact counts: how many entries are pruned, and which ones, to the last tie.

Every mask in aerogel comes from the functions here. A threshold (``weight > t``) miscounts on ties
and on all-zero layers; these keep exactly ``k`` entries and break ties by the lowest flat index.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from aerogel.arguments import check_choice, check_count, check_number
from aerogel.kernels.largest import comparable, largest_mask
from aerogel.kernels.nm_mask import LONGEST_GROUP, nm_mask

Rounding = Literal["round", "floor", "ceil", "round_kept"]

# Products like 0.7 * 10 miss the integer they mean by some ulps; nearer than this is the integer.
_INTEGER_SLACK = 1e-9


def pruned_count(
    numel: int,
    sparsity: float,
    *,
    rounding: Rounding = "round",
    min_keep: int = 1,
    max_pruned_fraction: float | None = None,
) -> int:
    """Number of entries to prune out of ``numel`` at ``sparsity``.

    Args:
        numel: entries that compete, >= 0.
        sparsity: wanted fraction of zeros, in [0, 1].
        rounding: how ``numel * sparsity`` becomes a count: ``"round"`` (half to even), ``"floor"``,
            ``"ceil"``; ``"round_kept"`` rounds the number kept, ``numel * (1 - sparsity)``.
        min_keep: entries that survive whatever the sparsity (as far as there are any).
        max_pruned_fraction: never prune more than ``floor(max_pruned_fraction * numel)``.

    Returns:
        The count, in [0, numel].

    Raises:
        ValueError: sparsity outside [0, 1], or an unknown rounding.
    """
    check_count("numel", numel, 0)
    check_count("min_keep", min_keep, 0)
    check_number("sparsity", sparsity, "[0, 1]")
    check_choice("rounding", rounding, get_args(Rounding))
    if rounding == "round_kept":
        count = numel - round(_snap(numel * (1.0 - sparsity)))
    else:
        count = _round_as(_snap(numel * sparsity), rounding)
    if max_pruned_fraction is not None:
        check_number("max_pruned_fraction", max_pruned_fraction, "[0, 1]")
        count = min(count, math.floor(_snap(max_pruned_fraction * numel)))
    return max(0, min(count, numel - min(min_keep, numel)))


def kept_count(
    numel: int,
    density: float,
    *,
    rounding: Rounding = "round",
    min_keep: int = 1,
    max_pruned_fraction: float | None = None,
) -> int:
    """Number of entries to keep out of ``numel`` at ``density``; see `pruned_count`."""
    check_number("density", density, "[0, 1]")
    return numel - pruned_count(
        numel,
        1.0 - density,
        rounding=rounding,
        min_keep=min_keep,
        max_pruned_fraction=max_pruned_fraction,
    )


def _round_as(value: float, rounding: Rounding) -> int:
    if rounding == "floor":
        return math.floor(value)
    return math.ceil(value) if rounding == "ceil" else round(value)


def _snap(value: float) -> float:
    nearest = round(value)
    return nearest if abs(value - nearest) <= _INTEGER_SLACK * max(1.0, abs(value)) else value


def require_finite(score: Tensor, name: str) -> None:
    """Raise ``ValueError`` naming the tensor if ``score`` holds a nan or an infinity."""
    # One cheap sum settles the ordinary case; it may overflow, so only then look at each entry.
    if score.numel() and not bool(torch.isfinite(score.sum())):
        bad = int(torch.count_nonzero(~torch.isfinite(score)))
        if bad:
            raise ValueError(f"score of {name!r} has {bad} nan or infinite entries")


def topk_mask(score: Tensor, k: int, among: Tensor | None = None) -> Tensor:
    """Bool mask of exactly the ``k`` largest entries; ties go to the lowest flat index.

    Args:
        score: any shape; no nan.
        k: entries to keep, in [0, score.numel()].
        among: bool, of the score's shape: entries that compete; all by default. At least ``k``.

    Returns:
        Bool tensor of the score's shape, ``True`` = kept.
    """
    competing = score.numel() if among is None else int(torch.count_nonzero(among))
    check_count("k", k, 0, competing)
    if k == 0:
        return torch.zeros(score.shape, dtype=torch.bool, device=score.device)
    if k == competing:
        everything = torch.ones(score.shape, dtype=torch.bool, device=score.device)
        return everything if among is None else everything & among
    return largest_mask(score, k, among)


def topk_rows(score: Tensor, k: int) -> Tensor:
    """Bool mask of the ``k`` largest entries of each row; ties go to the lowest column.

    Args:
        score: (rows, columns); no nan (``-inf`` marks entries that must lose).
        k: entries to keep in every row, in [0, columns].

    Returns:
        Bool tensor (rows, columns).
    """
    columns = score.shape[1]
    check_count("k", k, 0, columns)
    if k == 0 or k == columns or score.numel() == 0:
        return torch.full(score.shape, k > 0, dtype=torch.bool, device=score.device)
    if columns <= LONGEST_GROUP:
        return nm_mask(score, k, columns)
    score = comparable(score)
    threshold = torch.kthvalue(score, columns - k + 1, dim=1, keepdim=True).values
    above, equal = score > threshold, score == threshold
    missing = k - above.sum(dim=1, keepdim=True)
    return above | (equal & (equal.cumsum(dim=1) <= missing))
