"""The n largest of every m consecutive scores, as a mask: what N:M training asks after every step.

Reference: Mishra et al., Accelerating Sparse Deep Neural Networks, arXiv 2104.08378;
csrc/nm_select.h.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aerogel.kernels._calls import fits_native
from aerogel.kernels._library import native, native_available, reference_mode

LONGEST_GROUP = 64  # that the native kernel ranks


def ranks_natively(score: Tensor, m: int) -> bool:
    """Whether the native kernel takes these scores: float32 on the CPU, m at most 64."""
    fits = fits_native(score) and m <= LONGEST_GROUP and score.numel() > 0
    return fits and native_available() and not reference_mode()


def nm_select(score: Tensor, n: int, m: int, axis: int = 1) -> Tensor:
    """True for the n largest of every m consecutive scores along an axis; of equals the first.

    Args:
        score: any shape, no NaN (``-inf`` marks entries that must lose).
        n: kept of a group, in [0, m].
        m: group length, divides the axis.
        axis: along which groups run.

    Returns:
        Bool tensor of the score's shape.

    Raises:
        ValueError: n > m, or an axis that m does not divide.
    """
    if not 0 <= n <= m or m < 1:
        raise ValueError(f"n:m must have 0 <= n <= m and m >= 1, got {n}:{m}")
    if score.shape[axis] % m:
        raise ValueError(f"score: m={m} does not divide {score.shape[axis]} (axis {axis})")
    if not ranks_natively(score, m):
        return nm_select_reference(score, n, m, axis)
    score = score.detach().contiguous()
    mask = torch.empty(score.shape, dtype=torch.bool)
    inner = math.prod(score.shape[axis % score.dim() + 1 :])
    outer = score.numel() // (inner * m)
    native().nm_select(
        score.data_ptr(), mask.data_ptr(), outer, inner, n, m, torch.get_num_threads()
    )
    return mask


def nm_select_reference(score: Tensor, n: int, m: int, axis: int = 1) -> Tensor:
    """`nm_select` in torch."""
    last = score.detach().movedim(axis, -1)
    order = last.reshape(-1, m).argsort(dim=1, descending=True, stable=True)
    mask = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, :n], True)
    return mask.view(last.shape).movedim(-1, axis).contiguous()
