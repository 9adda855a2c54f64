"""Choosing keys by score: exact counts, ties to the lowest index, scores in float32."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from aerogel.arguments import check_count, check_number
from aerogel.kernels import largest_keys, selects_natively

_SORTED_BELOW = 256  # entries: sorting all of them is as fast as finding the largest


def stable_topk(x: Tensor, k: int) -> Tensor:
    """Indices of the k largest entries of the last dimension, ascending; ties: lowest index.

    Args:
        x: (..., n) scores.
        k: 0 to n.

    Returns:
        (..., k) int64.

    Raises:
        ValueError: k is out of range.
    """
    check_count("k", k, 0, x.shape[-1])
    if k in (0, x.shape[-1]):
        return torch.arange(k, device=x.device).expand(*x.shape[:-1], k).clone()
    if x.dtype != torch.float64 and x.is_floating_point() and selects_natively(x):
        return largest_keys(x, k)
    if x.shape[-1] < _SORTED_BELOW or bool(x.isnan().any()):
        order = torch.sort(x, dim=-1, descending=True, stable=True).indices
        return order[..., :k].sort(dim=-1).values
    least = torch.topk(x, k, sorted=False).values.amin(-1, keepdim=True)
    keep, tied = x > least, x == least
    missing = k - keep.sum(-1, keepdim=True)
    if bool((tied.sum(-1, keepdim=True) > missing).any()):
        tied &= tied.cumsum(-1) <= missing
    return (keep | tied).nonzero()[:, -1].view(*x.shape[:-1], k)


def topk_mass(x: Tensor, mass: float, *, min_keep: int = 1) -> Tensor:
    """The smallest set of entries whose sum reaches a share of each row's total.

    Args:
        x: (..., n) non-negative weights.
        mass: share of the sum, in (0, 1].
        min_keep: entries that are kept at least.

    Returns:
        (..., n) bool.

    Raises:
        ValueError: mass is out of range.
    """
    check_number("mass", mass, "(0, 1]")
    check_count("min_keep", min_keep, 0)
    x = x.float()
    ordered, order = torch.sort(x, dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    total = x.sum(-1, keepdim=True)
    keep = before < mass * total if mass < 1 else torch.ones_like(ordered, dtype=torch.bool)
    keep[..., :min_keep] = True
    return torch.zeros_like(keep).scatter(-1, order, keep)


def share_over_group(
    scores: Tensor, kv_heads: int, how: Literal["max", "mean", "sum"] = "mean"
) -> Tensor:
    """Scores of query heads united over the group that shares a key head.

    Args:
        scores: (batch, q_heads, ...).
        kv_heads: key heads; divides q_heads.
        how: "max", "mean" or "sum" over the heads of a group.

    Returns:
        (batch, kv_heads, ...).
    """
    check_count("kv_heads", kv_heads)
    if scores.shape[1] % kv_heads:
        raise ValueError(f"scores: {scores.shape[1]} heads, expected a multiple of {kv_heads}")
    grouped = scores.unflatten(1, (kv_heads, -1))
    if how == "max":
        return grouped.amax(2)
    if how not in ("mean", "sum"):
        raise ValueError(f"how={how!r}: expected 'max', 'mean' or 'sum'")
    return grouped.mean(2) if how == "mean" else grouped.sum(2)
