"""Summaries of runs of tokens: a pooled key, and the value that a pooled query reads in the run.

Reference: Ren et al., Combiner, arXiv 2107.05768.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from aerogel.arguments import check_choice, check_count
from aerogel.attention.bank_plan import Bank
from aerogel.attention.block_plan import BlockPlan
from aerogel.attention.call import check_tensors
from aerogel.attention.engine import attend
from aerogel.attention.plan import Plan
from aerogel.kernels.attention_call import MAX_BLOCK_Q

Pooling = Literal["max", "mean", "sum"]
POOLINGS = ("max", "mean", "sum")


class Summaries(NamedTuple):
    """Keys and values that stand for regions.

    Attributes:
        k: (B, Hq, n, D).
        v: (B, Hq, n, Dv).
        real: (B, n) bool, False at regions of padding only, or None.
    """

    k: Tensor
    v: Tensor
    real: Tensor | None = None

    def bank(self, plan: Plan) -> Bank:
        """The bank of these summaries of which queries read what `plan` says."""
        return Bank(plan, self.k, self.v, "none", self.real)


def run_plan(length: int, size: int, device: torch.device) -> BlockPlan:
    """Every run of `size` tokens reads itself."""
    runs = -(-length // size)
    start = torch.arange(runs, device=device)[:, None] * size
    return _of_tiles(start, torch.full_like(start, size), size, length)


def others_plan(length: int, size: int, device: torch.device, own: bool | None = None) -> BlockPlan:
    """The queries of every run of `size` tokens read the summaries of other runs.

    Args:
        length: tokens.
        size: tokens of a run.
        device: of the plan.
        own: None: earlier runs only; True or False: all runs, with or without the own one.
    """
    count = -(-length // size)
    number = torch.arange(count, device=device)
    if own is None:
        first, reach = torch.zeros_like(number)[:, None], number[:, None]
    elif own:
        first, reach = torch.zeros_like(number)[:, None], torch.full_like(number, count)[:, None]
    else:
        first = torch.stack([torch.zeros_like(number), number + 1], -1)
        reach = torch.stack([number, count - 1 - number], -1)
    return _of_tiles(first, reach, size, length)


def _of_tiles(first: Tensor, reach: Tensor, size: int, length: int) -> BlockPlan:
    """Ranges (runs, K) for the rows of every run, in tiles that kernels take."""
    tile = next(n for n in range(min(size, MAX_BLOCK_Q), 0, -1) if size % n == 0)
    tiles = -(-length // tile)
    first, reach = (
        t.repeat_interleave(size // tile, 0)[None, None, :tiles] for t in (first, reach)
    )
    return BlockPlan.from_ranges(first, reach, tile, tile)


def pool(x: Tensor, size: int, how: Pooling, key_padding: Tensor | None = None) -> Tensor:
    """Elementwise maximum, mean or sum over runs: (B, H, L, D) -> (B, H, ceil(L / size), D).

    Padding takes no part; runs of nothing else are 0.
    """
    real = _runs(key_padding, x, size)
    filled = real.any(-1)[..., None]
    real = real[..., None]
    runs = pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size))
    if how == "max":
        top = runs.masked_fill(~real, -torch.inf).amax(3)
        return top.masked_fill(~filled, 0)
    total = (runs * real).sum(3)
    return total if how == "sum" else total / real.sum(3).clamp(min=1)


def _runs(key_padding: Tensor | None, x: Tensor, size: int) -> Tensor:
    """(B or 1, 1, runs, size) bool: real tokens of every run."""
    if key_padding is None:
        key_padding = torch.ones(1, x.shape[2], dtype=torch.bool, device=x.device)
    return pad(key_padding, (0, -x.shape[2] % size)).unflatten(1, (-1, size))[:, None]


def combiner_summary(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: int,
    how: Pooling = "max",
    *,
    scale: float | None = None,
    key_padding: Tensor | None = None,
    pooled_from: tuple[Tensor, Tensor] | None = None,
    share_over_group: bool = False,
    dropout_p: float = 0.0,
) -> Summaries:
    """Summaries of consecutive runs of `size` tokens; differentiable.

    A run's key is its keys pooled; its value is what its pooled query reads inside the run.

    Args:
        q: (B, Hq, L, D).
        k: (B, Hkv, L, D).
        v: (B, Hkv, L, Dv).
        size: tokens of a run; the last may be shorter.
        how: "max", "mean" or "sum", elementwise.
        scale: factor of the logits, default ``D ** -0.5``.
        key_padding: (B, L) bool, True at real tokens.
        pooled_from: queries and keys to pool instead of `q` and `k` (learned maps of them).
        share_over_group: pool queries over the heads that share a key head too; the summaries then
            have Hkv heads.
        dropout_p: of the weights inside the runs.

    Returns:
        Summaries of ceil(L / size) runs.
    """
    check_tensors(q, k, v)
    check_count("size", size)
    check_choice("how", how, ("max", "mean", "sum"))
    from_q, from_k = (q, k) if pooled_from is None else pooled_from
    queries, keys = (pool(x, size, how, key_padding) for x in (from_q, from_k))
    if share_over_group:
        grouped = queries.unflatten(1, (k.shape[1], -1))
        queries = {"max": grouped.amax, "mean": grouped.mean, "sum": grouped.sum}[how](2)
    else:
        keys = keys.repeat_interleave(q.shape[1] // k.shape[1], 1)
    runs = torch.arange(queries.shape[2], device=k.device)[None, None, :, None]
    plan = BlockPlan.from_ranges(runs * size, torch.full_like(runs, size), 1, size)
    values = attend(
        queries, k, v, plan=plan, scale=scale, key_padding=key_padding, validate=False,
        dropout_p=dropout_p,
    )  # fmt: skip
    assert isinstance(values, Tensor)
    real = None if key_padding is None else _runs(key_padding, k, size).any(-1)[:, 0]
    return Summaries(keys, values, real)


def running_summary(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: int,
    *,
    scale: float | None = None,
    key_padding: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Summaries:
    """For every token, the summary (by maximum) of its run up to and including it.

    Args:
        q: (B, Hq, L, D).
        k: (B, Hkv, L, D).
        v: (B, Hkv, L, Dv).
        size: tokens of a run; L is a multiple.
        scale: factor of the logits, default ``D ** -0.5``.
        key_padding: (B, L) bool, True at real tokens.
        dropout_p: of the weights inside the runs.

    Returns:
        Summaries of L starts of runs.
    """
    real = None
    if key_padding is not None:
        real = key_padding.unflatten(1, (-1, size)).cummax(-1).values.flatten(1)
    tops = []
    for x in (q, k):
        hidden = x if key_padding is None else x.masked_fill(~key_padding[:, None, :, None], -1e30)
        top = hidden.unflatten(2, (-1, size)).cummax(3).values.flatten(2, 3)
        tops.append(top if real is None else top.masked_fill(~real[:, None, :, None], 0))
    plan = run_plan(k.shape[2], size, k.device)
    values = attend(
        tops[0], k, v, plan=plan, scale=scale, causal=True, key_padding=key_padding,
        validate=False, dropout_p=dropout_p,
    )  # fmt: skip
    assert isinstance(values, Tensor)
    return Summaries(tops[1].repeat_interleave(q.shape[1] // k.shape[1], 1), values, real)
