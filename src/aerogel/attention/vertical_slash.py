"""Columns and diagonals of an attention matrix: how strong they are, and which keys they cover."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from aerogel.attention.block_plan import BlockPlan
from aerogel.attention.plan import head_pointers
from aerogel.attention.ragged import count_rows

_COLUMN_CHUNK = 1 << 22  # (tile, column) pairs tested at a time


def diagonal_sums(weights: Tensor, positions: Tensor) -> Tensor:
    """Sums attention along diagonals.

    Args:
        weights: (B, H, n, L) attention of n rows.
        positions: (n,) or (B, n) int64 position of each row.

    Returns:
        (B, H, L): at offset o the sum over rows of ``weights[i, positions[i] - o]``; terms before
        the first key are dropped.
    """
    batch, heads, rows, length = weights.shape
    positions = positions.expand(batch, rows)
    if rows and bool((positions.diff(dim=-1) == 1).all()):
        return _skewed_sums(weights, positions[:, -1])
    offset = positions[:, :, None] - torch.arange(length, device=weights.device)
    place = torch.where((offset < 0) | (offset >= length), length, offset)
    sums = weights.new_zeros(batch, heads, length + 1)
    flat = place[:, None].expand_as(weights).flatten(2)
    return sums.scatter_add(2, flat, weights.flatten(2))[..., :length]


def _skewed_sums(weights: Tensor, last: Tensor) -> Tensor:
    """`diagonal_sums` of neighbouring rows: each is laid one place left of the one before.

    In that layout diagonals are columns: column c holds offset ``last - c``.
    """
    batch, heads, rows, length = weights.shape
    width = length + rows
    skewed = weights.new_zeros(batch, heads, rows * width)
    outer = skewed.stride()[:2]
    view = skewed.as_strided((batch, heads, rows, length), (*outer, width - 1, 1), rows - 1)
    view.copy_(weights)
    columns = skewed.view(batch, heads, rows, width).sum(2)
    column = last[:, None] - torch.arange(length, device=weights.device)
    inside = (column >= 0) & (column < width)
    found = columns.gather(2, column.clamp(0, width - 1)[:, None].expand(-1, heads, -1))
    return found * inside[:, None]


def vertical_slash_plan(
    columns: Tensor,
    offsets: Tensor,
    k_len: int,
    q_len: int | None = None,
    *,
    block: int = 64,
    merge: Literal["official", "tight"] = "official",
) -> BlockPlan:
    """The keys of some columns and diagonals, for every tile of `block` query rows.

    Each diagonal becomes a band as wide as a tile, so that a tile reads whole runs of keys. With
    "official" (MInference's kernel), bands that come within a block of each other are joined by
    whole blocks; with "tight" the union of the bands is kept and no more.

    Args:
        columns: (B, H, v) int64 keys, ascending.
        offsets: (B, H, s) int64 distances of keys behind their query, ascending; with 0.
        k_len: keys.
        q_len: query rows, the last of the sequence; default all.
        block: rows and keys of a tile.
        merge: "official" or "tight".

    Raises:
        ValueError: offset 0 is missing somewhere, or the lists are out of range.
    """
    q_len = k_len if q_len is None else q_len
    for name, index in (("columns", columns), ("offsets", offsets)):
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= k_len):
            raise ValueError(f"{name}: expected 0 to {k_len - 1}")
    if offsets.shape[-1] == 0 or bool((offsets[..., 0] != 0).any()):
        raise ValueError("offsets: expected offset 0 in every head")
    tiles = -(-q_len // block)
    ends = k_len - q_len + (torch.arange(tiles, device=offsets.device) + 1) * block
    if merge == "tight":
        plan = _tight_bands(offsets, ends, block)
    elif merge == "official":
        plan = _joined_bands(offsets, ends, k_len, block)
    else:
        raise ValueError(f"merge={merge!r}: expected 'official' or 'tight'")
    return _with_columns(plan, columns, k_len)


def _joined_bands(offsets: Tensor, ends: Tensor, k_len: int, block: int) -> BlockPlan:
    """Bands joined by whole blocks, all tiles of all heads in step.

    In terms of the distance x from a tile's end, the next piece of a tile ends at
    ``min(x - block, the largest offset below x)``, whatever the tile: one table serves all.
    """
    batch, heads, _ = offsets.shape
    planes, tiles = batch * heads, ends.numel()
    top = int(ends[-1])
    marks = torch.full((planes, top + 2), -1, device=offsets.device)
    marks.scatter_(1, offsets.flatten(0, 1).clamp(max=top) + 1, offsets.flatten(0, 1))
    below = torch.cummax(marks, 1).values.flatten()  # of a head, at x: the largest offset < x
    lane = torch.arange(planes * tiles, device=offsets.device)
    table, end = lane // tiles * (top + 2), ends[lane % tiles]
    x = torch.minimum(below[table + end], end - block)
    found = []
    while lane.numel():
        found.append((lane, end - x - block))
        following = below[table + x.clamp(min=0)]
        more = (x > 0) & (following >= 0)
        lane, table, end = lane[more], table[more], end[more]
        x = torch.minimum(following[more], x[more] - block)
    row, start = (torch.cat(column) for column in zip(*found, strict=True))
    inside = start < k_len
    row, start = row[inside], start[inside]
    order = torch.argsort(row, stable=True)
    counts = count_rows(row, planes * tiles).view(batch, heads, tiles)
    return BlockPlan(block, block, head_pointers(counts), start[order].int(), True)


def _tight_bands(offsets: Tensor, ends: Tensor, block: int) -> BlockPlan:
    last = (ends[:, None] - offsets[:, :, None]).clamp(min=block)
    inside = offsets[:, :, None] < ends[:, None]
    length = torch.where(inside, block, 0)
    return BlockPlan.from_ranges(last - block, length, block, block)


def _with_columns(plan: BlockPlan, columns: Tensor, k_len: int) -> BlockPlan:
    """Adds the columns that lie before the last band of a tile and in none of its bands."""
    row, start, length = plan.tile_ranges()
    batch, heads, most = columns.shape
    planes, tiles = batch * heads, plan.row_ptr.shape[-1] - 1
    listed = columns.reshape(planes, most)
    span = k_len + plan.block_k  # past every end of a band
    sorted_keys = (listed + torch.arange(planes, device=row.device)[:, None] * span).flatten()

    def columns_before(key: Tensor, plane: Tensor) -> Tensor:
        return torch.searchsorted(sorted_keys, key + plane * span) - plane * most

    first, past = (columns_before(key, row // tiles) for key in (start, start + length))
    last = plan.row_ptr.view(planes, tiles + 1)[:, 1:].flatten() - 1
    until = columns_before(start[last], torch.arange(planes * tiles, device=row.device) // tiles)
    number = torch.arange(most, device=row.device)
    lists = []
    step = max(1, _COLUMN_CHUNK // max(1, tiles * most))
    for begin in range(0, planes, step):
        end = min(begin + step, planes)
        here = slice(*torch.searchsorted(row, row.new_tensor([begin, end]) * tiles).tolist())
        at = (row[here] - begin * tiles) * (most + 1)
        bounds = torch.zeros(
            (end - begin) * tiles * (most + 1), dtype=torch.int8, device=row.device
        )
        one = torch.ones_like(at, dtype=torch.int8)
        bounds.index_add_(0, at + first[here], one).index_add_(0, at + past[here], -one)
        held = bounds.view(-1, most + 1).cumsum(1, dtype=torch.int8)[:, :most] > 0
        keep = ~held & (number < until[begin * tiles : end * tiles, None])
        key = listed[begin:end].repeat_interleave(tiles, 0)
        lists.append((keep.sum(-1), key[keep]))
    counts = torch.cat([count for count, _ in lists]).view(batch, heads, tiles)
    return BlockPlan(
        plan.block_q,
        plan.block_k,
        plan.row_ptr,
        plan.col,
        True,
        plan.tile_len,
        head_pointers(counts),
        torch.cat([keys for _, keys in lists]).int(),
    )
