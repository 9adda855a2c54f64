"""The patterns of Combiner that lay the sequence out as a grid of rows: axial and mixture.

Reference: Ren et al., arXiv 2107.05768, section 4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from aerogel.attention.bank_plan import Bank
from aerogel.attention.engine import attend
from aerogel.attention.key_list_plan import KeyListPlan
from aerogel.attention.selector import AttentionContext
from aerogel.attention.summaries import Summaries, run_plan, running_summary


def axial_banks(
    ctx: AttentionContext,
    width: int,
    row_keys: Callable[[AttentionContext, Tensor, Tensor], Tensor],
    dropout_p: float = 0.0,
) -> tuple[Bank, ...]:
    """Own row directly; each earlier row through the own column.

    Args:
        ctx: the causal call.
        width: tokens of a row.
        row_keys: from the call, the attention of each token over its whole row, and the same
            attention over the row's keys, to the keys of the summaries.
        dropout_p: of the weights inside the rows.
    """
    own = run_plan(ctx.shape.k_len, width, ctx.q.device)
    rows, weighted = (
        attend(
            ctx.q,
            ctx.k,
            x,
            plan=own,
            scale=ctx.scale,
            key_padding=ctx.key_padding,
            validate=False,
            dropout_p=dropout_p,
        )
        for x in (ctx.v, ctx.k)
    )
    assert isinstance(rows, Tensor)
    assert isinstance(weighted, Tensor)
    keys = row_keys(ctx, rows, weighted)
    keys = keys.repeat_interleave(rows.shape[1] // keys.shape[1], 1)
    position = torch.arange(ctx.shape.k_len, device=ctx.q.device)
    row, column = position // width, position % width
    number = torch.arange(int(row[-1]) + 1, device=position.device)
    index = torch.where(number < row[:, None], number * width + column[:, None], -1)
    plan = KeyListPlan.from_index(index[None, None])
    return Bank(own), Summaries(keys, rows, ctx.key_padding).bank(plan)


def mixture_banks(ctx: AttentionContext, width: int, dropout_p: float = 0.0) -> tuple[Bank, ...]:
    """Own row and column directly; columns above, and rows to both sides, as running summaries.

    Without the causal rule, columns below and later rows too.

    Args:
        ctx: the call.
        width: tokens of a row.
        dropout_p: of the weights inside the summaries.

    Raises:
        ValueError: not causal, and the length is no multiple of `width`.
    """
    length, causal = ctx.shape.k_len, ctx.shape.causal
    missing = -length % width
    if missing and not causal:
        raise ValueError(f"{length} tokens: expected a multiple of seg_len={width} if not causal")
    grid = replace(
        ctx,
        q=pad(ctx.q, (0, 0, 0, missing)),
        k=pad(ctx.k, (0, 0, 0, missing)),
        v=pad(ctx.v, (0, 0, 0, missing)),
        key_padding=None if ctx.key_padding is None else pad(ctx.key_padding, (0, missing)),
    )
    height = (length + missing) // width
    position = torch.arange(length, device=ctx.q.device)[:, None]
    s, u = position // width, position % width
    row, column = (torch.arange(n, device=ctx.q.device) for n in (height, width))
    other = row < s if causal else row != s
    beside = torch.where(column <= u if causal else column >= 0, s * width + column, -1)
    above = torch.where(other, row * width + u, -1)
    banks = [Bank(_lists(torch.cat([above, beside], -1)))]
    up = torch.where((column != u) & (s > 0), (s - 1) * width + column, -1)
    left = torch.where(other & (u > 0), row * width + u - 1, -1)
    right = torch.where(other & (u < width - 1), row * width + u + 1, -1)
    wanted = [(up, True, False), (left, False, False), (right, False, True)]
    if not causal:
        down = torch.where((column != u) & (s < height - 1), (s + 1) * width + column, -1)
        wanted.append((down, True, True))
    for index, by_column, backward in wanted:
        if bool((index >= 0).any()):
            found = _running(grid, height, width, by_column, backward, dropout_p)
            banks.append(found.bank(_lists(index)))
    return tuple(banks)


def _lists(index: Tensor) -> KeyListPlan:
    return KeyListPlan.from_index(index[None, None])


def _running(
    ctx: AttentionContext,
    height: int,
    width: int,
    by_column: bool,
    backward: bool,
    dropout_p: float,
) -> Summaries:
    """Running summaries along rows or columns, from either end, in the order of the tokens."""
    order = torch.arange(height * width, device=ctx.q.device).view(height, width)
    if by_column:
        order = order.T
    if backward:
        order = order.flip(-1)
    order = order.flatten()
    back = torch.argsort(order)
    real = None if ctx.key_padding is None else ctx.key_padding[:, order]
    q, k, v = (x[:, :, order] for x in (ctx.q, ctx.k, ctx.v))
    found = running_summary(
        q,
        k,
        v,
        height if by_column else width,
        scale=ctx.scale,
        key_padding=real,
        dropout_p=dropout_p,
    )
    kept = None if found.real is None else found.real[:, back]
    return Summaries(found.k[:, :, back], found.v[:, :, back], kept)
