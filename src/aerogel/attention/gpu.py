"""Plans on GPUs: FlexAttention's BlockMask, and what it cannot say as gathered calls.

Reference: Dong et al., FlexAttention, arXiv 2412.05496. On CUDA forward and backward run compiled;
on the CPU FlexAttention has no backward and only serves tests.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from aerogel.attention.call import Call
from aerogel.attention.gather import gathered_attention
from aerogel.attention.key_list_plan import KeyListPlan
from aerogel.attention.lowering import NO_WINDOW, TileStream, lower
from aerogel.attention.plan import Plan, head_pointers
from aerogel.attention.ragged import row_numbers
from aerogel.attention.ranges import KeyRanges, Pass
from aerogel.attention.shape import AttentionShape
from aerogel.attention.softmax import merge
from aerogel.attention.span_plan import SpanPlan

_BLOCK = 64
# Before torch 2.9 the log-sum-exp is asked for by `return_lse`.
_AUX: Any = flex.AuxRequest(lse=True) if hasattr(flex, "AuxRequest") else None
_masks: WeakKeyDictionary[Plan, dict[Any, BlockMask]] = WeakKeyDictionary()


def to_block_mask(
    plan: Plan,
    shape: AttentionShape,
    *,
    key_padding: Tensor | None = None,
    window: int | None = None,
    block: int = _BLOCK,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """The plan's key ranges as a BlockMask over `block` x `block` tiles.

    Tiles that the plan holds whole go into the full lists; of the others, `mask_mod` keeps the
    plan's pairs, the causal rule, the window and the padding. Single keys (`extra_idx`) are not in
    it: they are a second, gathered call. The mask of a plan is kept as long as the plan, for each
    shape, but not where there is padding.

    Args:
        plan: block, span, mix or dense plan, of query tiles of any size.
        shape: sizes and causal rule.
        key_padding: (batch, k_len) bool, True at real keys.
        window: tokens.
        block: side of the BlockMask's tiles.
        device: where attention will run.

    Raises:
        ValueError: the plan has no ranges.
    """
    shape = plan.shaped(shape)
    return _block_mask(plan, shape, key_padding, window, block, torch.device(device))


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
    mask = _block_mask(plan, shape, call.key_padding, call.window, _BLOCK, q.device)
    parts.append(_flex(q, k, v, call, mask))
    for part in [] if isinstance(plan, SpanPlan) else plan.passes(shape):
        if part.ranges.token.numel():
            listed = replace(call, plan=_listed(part.ranges, shape))
            parts.append(gathered_attention(q, k, v, listed))
    return parts[0] if len(parts) == 1 else merge(parts)


def _flex(q: Tensor, k: Tensor, v: Tensor, call: Call, mask: BlockMask) -> tuple[Tensor, Tensor]:
    cap = call.softcap

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return score if cap is None else cap * torch.tanh(score / cap)

    options: dict[str, Any] = {"scale": call.scale, "block_mask": mask}
    options["enable_gqa"] = q.shape[1] != k.shape[1]
    if cap is not None:
        options["score_mod"] = capped
    if _AUX is None:
        out, lse = _compiled(q.is_cuda)(q, k, v, return_lse=True, **options)
        return out, lse
    out, aux = _compiled(q.is_cuda)(q, k, v, return_aux=_AUX, **options)
    return out, aux.lse


@functools.cache
def _compiled(cuda: bool) -> Callable[..., Any]:
    """FlexAttention, compiled once where it is fast."""
    return torch.compile(flex_attention, dynamic=None) if cuda else flex_attention  # type: ignore[return-value]


def _ranges_only(passes: list[Pass]) -> list[Pass]:
    """The passes without their single keys."""
    return [
        part._replace(
            ranges=replace(
                part.ranges, token_row=part.ranges.token[:0], token=part.ranges.token[:0]
            )
        )
        for part in passes
    ]


def _block_mask(
    plan: Plan,
    shape: AttentionShape,
    key_padding: Tensor | None,
    window: int | None,
    block: int,
    device: torch.device,
) -> BlockMask:
    """The mask of a plan, made once for each shape unless there is padding."""
    if key_padding is not None:
        return _made(plan, shape, key_padding, window, block, device)
    known, key = _masks.setdefault(plan, {}), (shape, window, block, device)
    if key not in known:
        known[key] = _made(plan, shape, None, window, block, device)
    return known[key]


def _made(
    plan: Plan,
    shape: AttentionShape,
    key_padding: Tensor | None,
    window: int | None,
    block: int,
    device: torch.device,
) -> BlockMask:
    """Coverage of every tile from the lowered ranges; `mask_mod` reads spans, or the ranges."""
    streams = lower(_ranges_only(plan.passes(shape)), shape, window)
    stream = streams[0]
    n_q, n_k = shape.tiles(block), -(-shape.k_len // block)
    covered = torch.zeros(stream.batch * stream.heads * n_q * n_k, dtype=torch.int64)
    for chunk in (chunk for s in streams for chunk in s.chunks()):
        row, key, _ = chunk.tile_pairs(shape)
        place = (row // shape.q_len * n_q + row % shape.q_len // block) * n_k + key // block
        covered += torch.bincount(place.cpu(), minlength=covered.numel())
    covered = covered.view(stream.batch, stream.heads, n_q, n_k)
    rows = (torch.arange(n_q) * block + block).clamp(max=shape.q_len) - torch.arange(n_q) * block
    keys = (torch.arange(n_k) * block + block).clamp(max=shape.k_len) - torch.arange(n_k) * block
    whole = covered == rows[:, None] * keys
    if key_padding is not None:
        some = torch.nn.functional.pad(~key_padding.any(0), (0, n_k * block - shape.k_len))
        whole &= ~some.view(n_k, block).any(-1).to(whole.device)
    counts, index = _lists((covered > 0) & ~whole)
    full_counts, full_index = _lists(whole)
    keep = (
        _span_mod(plan, shape, key_padding, window, device)
        if isinstance(plan, SpanPlan)
        else _mask_mod(streams, shape, key_padding, device)
    )
    return BlockMask.from_kv_blocks(
        counts.to(device),
        index.to(device),
        full_counts.to(device),
        full_index.to(device),
        BLOCK_SIZE=(block, block),
        mask_mod=keep,
        seq_lengths=(shape.q_len, shape.k_len),
    )


def _lists(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(Bp, Hp, nQ, nK) bool as counts and indices, the unused tail 0."""
    counts = mask.sum(-1)
    order = torch.argsort((~mask).to(torch.uint8), dim=-1, stable=True)
    used = torch.arange(mask.shape[-1]) < counts[..., None]
    return counts.int(), torch.where(used, order, 0).int()


def _span_mod(
    plan: SpanPlan,
    shape: AttentionShape,
    key_padding: Tensor | None,
    limit: int | None,
    device: torch.device,
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Whether a pair is in a span, from the positions alone."""
    unit = 1 if plan.granularity == "token" else plan.block
    sink, window, stride, phase, dense = (
        t.to(device) for t in (plan.sink * unit, plan.window, plan.stride, plan.phase, plan.dense)
    )
    period = stride.clamp(min=1)
    first = None if plan.first is None else plan.first.to(device)
    padding = None if key_padding is None else key_padding.to(device)
    heads_per = 0 if sink.numel() == 1 else shape.q_heads // sink.numel()
    offset, block = shape.q_offset, plan.block

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, j: Tensor) -> Tensor:
        head = h // heads_per if heads_per else h * 0
        begin = 0 if first is None else first[b]
        row, since = q + offset - begin, j - begin
        keep = (since < sink[head]) | (row // unit - since // unit < window[head]) | dense[head]
        column = (since // block + phase[head]) % period[head] == 0
        keep = (keep | ((stride[head] > 0) & column)) & (since >= 0) & (since <= row)
        if limit is not None:
            keep = keep & (row - since < limit)
        return keep if padding is None else keep & padding[b, j]

    return mask_mod


def _mask_mod(
    streams: list[TileStream],
    shape: AttentionShape,
    key_padding: Tensor | None,
    device: torch.device,
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Whether a pair is in the plan, by what each stream holds and its windows."""
    stream = streams[0]
    heads_per = max(1, shape.q_heads // stream.heads)
    offset, causal = shape.q_offset, shape.causal
    shared_batch, shared_heads = stream.batch == 1, stream.heads == 1
    tables = [(part.block_q, _held(part, shape).to(device)) for part in streams]
    windows = [None if part.window is None else part.window.to(device) for part in streams]
    padding = None if key_padding is None else key_padding.to(device)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, j: Tensor) -> Tensor:
        plan_head = h * 0 if shared_heads else h // heads_per
        row = b * 0 if shared_batch else b
        keep = j < 0
        for (block_q, held), window in zip(tables, windows, strict=True):
            bits = held[row, plan_head, q // block_q, j]
            found = bits > 0
            if window is not None:
                limit = window[plan_head]
                found = found & ((bits < 2) | (limit == 0) | (q + offset - j < limit))
            keep = keep | found
        if causal:
            keep = keep & (j <= q + offset)
        if padding is not None:
            keep = keep & padding[b, j]
        return keep

    return mask_mod


def _held(part: TileStream, shape: AttentionShape) -> Tensor:
    """(batch, heads, query tiles, k_len) uint8: 1 where a tile holds a key, 2 under its window."""
    tiles = shape.tiles(part.block_q)
    table = torch.zeros(part.batch, part.heads, tiles, shape.k_len, dtype=torch.uint8)
    row = row_numbers(part.tile_ptr)
    lane = torch.arange(64)
    inside = lane < part.length[:, None]
    key = (part.start[:, None] + lane)[inside].long()
    bits = 1 + ((part.kind & NO_WINDOW) == 0).to(torch.uint8)
    at = (row[:, None].expand(-1, 64)[inside], key)
    table.view(-1, shape.k_len)[at] = bits[:, None].expand(-1, 64)[inside]
    return table


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
    return KeyListPlan(head_pointers(rows), ranges.token[at].int())
