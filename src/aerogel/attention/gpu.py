"""Plans on GPUs: FlexAttention's BlockMask, and what it cannot say as gathered calls.

Reference: Dong et al., FlexAttention, arXiv 2412.05496. On CUDA forward and backward run compiled;
on the CPU FlexAttention has no backward and only serves tests.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from aerogel.attention.block_plan import BlockPlan
from aerogel.attention.call import Call
from aerogel.attention.gather import gathered_attention
from aerogel.attention.key_list_plan import KeyListPlan
from aerogel.attention.lowering import TileStream, lower_pass
from aerogel.attention.plan import Plan
from aerogel.attention.ragged import row_numbers
from aerogel.attention.ranges import KeyRanges, Pass
from aerogel.attention.shape import AttentionShape
from aerogel.attention.softmax import merge

_BLOCK = 64


def to_block_mask(
    plan: Plan,
    shape: AttentionShape,
    *,
    key_padding: Tensor | None = None,
    window: int | None = None,
    block: int = _BLOCK,
) -> BlockMask:
    """The plan's key ranges as a BlockMask over `block` x `block` tiles.

    Tiles that the plan holds whole go into the full lists; of the others, `mask_mod` keeps the
    plan's pairs, the causal rule, the window and the padding. Single keys (`extra_idx`) are not in
    it: they are a second, gathered call.

    Args:
        plan: block, span, mix or dense plan; query tiles divide into `block` rows or hold them.
        shape: sizes and causal rule.
        key_padding: (batch, k_len) bool, True at real keys.
        window: tokens.
        block: side of the BlockMask's tiles.

    Raises:
        ValueError: the plan has no ranges, or needs several passes.
    """
    shape = plan.shaped(shape)
    passes = plan.passes(shape)
    if len(passes) != 1:
        raise ValueError(f"plan: {len(passes)} passes, expected one; call `flex_attend`")
    part = Pass(passes[0].ranges, window if passes[0].window is None else passes[0].window)
    return _block_mask(part, shape, key_padding, block)


def flex_attend(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Attention of a plan with ranges on FlexAttention: o (B, Hq, Lq, Dv), lse (B, Hq, Lq).

    Raises:
        ValueError: dropout, a bias, or permuted tokens.
    """
    plan, shape = call.plan, call.shape
    special = [getattr(plan, name, None) for name in ("q_perm", "k_perm", "tile_bias")]
    if call.dropout_p or any(part is not None for part in special):
        raise ValueError("backend='flex': expected no dropout, bias and permutation")
    parts = []
    if isinstance(plan, KeyListPlan):
        return gathered_attention(q, k, v, call)
    for part in plan.passes(shape):
        window = part.window if call.window is None else call.window
        if part.window is not None and call.window is not None:
            window = min(part.window, call.window)
        mask = _block_mask(Pass(part.ranges, window), shape, call.key_padding, _BLOCK)
        parts.append(_flex(q, k, v, call, mask.to(q.device)))
        if part.ranges.token.numel():
            parts.append(
                gathered_attention(q, k, v, replace(call, plan=_listed(part.ranges, shape)))
            )
    return parts[0] if len(parts) == 1 else merge(parts)


def _flex(q: Tensor, k: Tensor, v: Tensor, call: Call, mask: BlockMask) -> tuple[Tensor, Tensor]:
    cap = call.softcap

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return score if cap is None else cap * torch.tanh(score / cap)

    options: dict[str, Any] = {"scale": call.scale, "block_mask": mask}
    options["enable_gqa"] = q.shape[1] != k.shape[1]
    if cap is not None:
        options["score_mod"] = capped
    out, lse = _compiled(q.is_cuda)(q, k, v, return_lse=True, **options)
    return out, lse


@functools.cache
def _compiled(cuda: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """FlexAttention, compiled once where it is fast."""
    return torch.compile(flex_attention, dynamic=None) if cuda else flex_attention  # type: ignore[return-value]


def _block_mask(
    part: Pass, shape: AttentionShape, key_padding: Tensor | None, block: int
) -> BlockMask:
    """Coverage of every tile from the lowered ranges, and a `mask_mod` that reads the ranges."""
    only_ranges = replace(part.ranges, token_row=part.ranges.token[:0], token=part.ranges.token[:0])
    stream = lower_pass(Pass(only_ranges, part.window), shape, key_padding)
    n_q, n_k = shape.tiles(block), -(-shape.k_len // block)
    planes = stream.batch * stream.heads
    covered = torch.zeros(planes * n_q * n_k, dtype=torch.int64)
    for chunk in stream.chunks():
        row, key, _ = chunk.tile_pairs(shape)
        place = (row // shape.q_len * n_q + row % shape.q_len // block) * n_k + key // block
        covered += torch.bincount(place.cpu(), minlength=covered.numel())
    covered = covered.view(stream.batch, stream.heads, n_q, n_k)
    rows = (torch.arange(n_q) * block + block).clamp(max=shape.q_len) - torch.arange(n_q) * block
    keys = (torch.arange(n_k) * block + block).clamp(max=shape.k_len) - torch.arange(n_k) * block
    whole = covered == rows[:, None] * keys
    if key_padding is not None and stream.batch == 1:
        some = torch.nn.functional.pad(~key_padding.any(0), (0, n_k * block - shape.k_len))
        whole &= ~some.view(n_k, block).any(-1).to(whole.device)
    counts, index = _lists((covered > 0) & ~whole)
    full_counts, full_index = _lists(whole)
    return BlockMask.from_kv_blocks(
        counts,
        index,
        full_counts,
        full_index,
        BLOCK_SIZE=(block, block),
        mask_mod=_mask_mod(stream, shape, key_padding),
        seq_lengths=(shape.q_len, shape.k_len),
    )


def _lists(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(Bp, Hp, nQ, nK) bool as counts and indices, the unused tail 0."""
    counts = mask.sum(-1)
    order = torch.argsort((~mask).to(torch.uint8), dim=-1, stable=True)
    used = torch.arange(mask.shape[-1]) < counts[..., None]
    return counts.int(), torch.where(used, order, 0).int()


def _mask_mod(
    stream: TileStream, shape: AttentionShape, key_padding: Tensor | None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Whether a pair is in the plan: a bit per (query tile, key)."""
    tiles = shape.tiles(stream.block_q)
    table = torch.zeros(stream.batch, stream.heads, tiles, shape.k_len, dtype=torch.bool)
    row = row_numbers(stream.tile_ptr)
    lane = torch.arange(64)
    inside = lane < stream.length[:, None]
    key = (stream.start[:, None] + lane)[inside].long()
    table.view(-1, shape.k_len)[row[:, None].expand(-1, 64)[inside], key] = True
    heads_per = max(1, shape.q_heads // stream.heads)
    offset, window, causal = shape.q_offset, stream.window, shape.causal
    block_q, many = stream.block_q, stream.batch > 1
    on_device: dict[torch.device, tuple[Tensor, Tensor | None]] = {}

    def tables(device: torch.device) -> tuple[Tensor, Tensor | None]:
        if device not in on_device:
            padding = None if key_padding is None else key_padding.to(device)
            on_device[device] = (table.to(device), padding)
        return on_device[device]

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, j: Tensor) -> Tensor:
        held, padding = tables(q.device)
        keep = held[b if many else b * 0, h // heads_per if stream.heads > 1 else h * 0,
                    q // block_q, j]  # fmt: skip
        if causal:
            keep = keep & (j <= q + offset)
        if window is not None:
            keep = keep & (q + offset - j < window)
        if padding is not None:
            keep = keep & padding[b, j]
        return keep

    return mask_mod


def _listed(ranges: KeyRanges, shape: AttentionShape) -> KeyListPlan:
    """The single keys of query tiles as key lists of their rows."""
    counts = torch.bincount(ranges.token_row, minlength=ranges.rows)
    tiles = counts.view(ranges.batch, ranges.heads, ranges.tiles)
    tile_ptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    row = torch.arange(shape.q_len) // ranges.block_q
    rows = tiles[:, :, row]
    plane = torch.arange(ranges.batch * ranges.heads).view(ranges.batch, ranges.heads, 1)
    first = tile_ptr[plane * ranges.tiles + row]
    lane = torch.arange(max(1, int(counts.max())))
    inside = lane < rows[..., None]
    at = (first[..., None] + lane)[inside]
    from aerogel.attention.plan import head_pointers

    return KeyListPlan(head_pointers(rows), ranges.token[at].int())


__all__ = ["BlockPlan", "flex_attend", "to_block_mask"]
