"""Lowering: key ranges become `TileStream`, the runs of tiles that kernels read.

A tile is at most 64 keys for one query tile. FULL and EDGE tiles are contiguous keys, GATHER tiles
point into a list of keys. In EDGE tiles every (row, key) is compared with the causal rule, the
window and the padding; the other tiles need no comparison.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aerogel.attention.ragged import count_rows, merge_ranges, pointers, row_numbers, within
from aerogel.attention.ranges import KeyRanges, Pass
from aerogel.attention.shape import AttentionShape

FULL, EDGE, GATHER, GATHER_EDGE = 0, 1, 2, 3
TILE_KEYS = 64


@dataclass(frozen=True, eq=False)
class TileStream:
    """Tiles of every query tile, in the form of `aerogel.kernels.attention`.

    Attributes:
        tile_ptr: (rows + 1,) int64, rows = batch * heads * tiles.
        kind: (T,) uint8, FULL, EDGE, GATHER or GATHER_EDGE.
        start: (T,) int32, first key, or first entry of `gather_idx`.
        length: (T,) int16, 1 to 64 keys.
        gather_idx: int32 keys of the gather tiles.
        tile_bias: (T,) float32 additive logits, or None.
        batch, heads, block_q: as in `KeyRanges`.
        window: tokens; EDGE rows at position p keep keys j with ``p - j < window``.
    """

    tile_ptr: Tensor
    kind: Tensor
    start: Tensor
    length: Tensor
    gather_idx: Tensor
    tile_bias: Tensor | None
    batch: int
    heads: int
    block_q: int
    window: int | None = None

    def tile_pairs(
        self, shape: AttentionShape, key_padding: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Every allowed (row, key), once per tile that holds it.

        Returns:
            row: numbers in (batch, heads, q_len), key: in [0, k_len), tile; int64 each.
        """
        tiles = shape.tiles(self.block_q)
        tile_row = row_numbers(self.tile_ptr)
        tile, number = within(self.length.long())
        first = self.start.long()[tile] + number
        key = first
        gathered = self.kind[tile] >= GATHER
        if self.gather_idx.numel():
            listed = self.gather_idx.long()[first.clamp(max=self.gather_idx.numel() - 1)]
            key = torch.where(gathered, listed, first)
        lanes = torch.arange(self.block_q, device=key.device)
        row = (tile_row[tile] % tiles * self.block_q)[:, None] + lanes
        keep = row < shape.q_len
        edge = ((self.kind[tile] & 1) == 1)[:, None]
        distance = row + shape.q_offset - key[:, None]
        if shape.causal:
            keep &= ~edge | (distance >= 0)
        if self.window is not None:
            keep &= ~edge | (distance < self.window)
        plane = (tile_row[tile] // tiles)[:, None]
        if key_padding is not None:
            batch = (plane // self.heads).expand(-1, 1)
            keep &= ~edge | key_padding[batch, key[:, None]]
        where = keep.nonzero(as_tuple=True)
        rows = (plane * shape.q_len + row)[where]
        return rows, key[where[0]], tile[where[0]]

    def row_counts(self, shape: AttentionShape) -> Tensor:
        """Keys of each query row: (batch, heads, q_len) int64."""
        total = torch.zeros(self.batch * self.heads * shape.q_len, dtype=torch.int64)
        for part in self.chunks():
            row = part.tile_pairs(shape)[0]
            total += count_rows(row.cpu(), total.numel())
        return total.view(self.batch, self.heads, shape.q_len)

    def chunks(self, tiles: int = 4096) -> list[TileStream]:
        """The same rows in streams of at most `tiles` tiles each."""
        parts = []
        for begin in range(0, self.kind.numel(), tiles):
            cut = slice(begin, begin + tiles)
            ptr = (self.tile_ptr - begin).clamp(0, self.kind[cut].numel())
            bias = None if self.tile_bias is None else self.tile_bias[cut]
            parts.append(
                replace(
                    self,
                    tile_ptr=ptr,
                    kind=self.kind[cut],
                    start=self.start[cut],
                    length=self.length[cut],
                    tile_bias=bias,
                )
            )
        return parts


def count_pairs(passes: list[Pass], shape: AttentionShape) -> Tensor:
    """Keys that each query row reads, over all passes: (Bp, Hp, q_len) int64."""
    batch = max(part.ranges.batch for part in passes)
    heads = max(part.ranges.heads for part in passes)
    total = torch.zeros(batch, heads, shape.q_len, dtype=torch.int64)
    for part in passes:
        total += lower_pass(part, shape).row_counts(shape)
    return total


def lower_pass(part: Pass, shape: AttentionShape, key_padding: Tensor | None = None) -> TileStream:
    """Cuts ranges and tokens into tiles.

    Args:
        part: ranges and window.
        shape: sizes and causal rule of the call.
        key_padding: (batch, k_len) bool, True where the key is real.

    Returns:
        The stream; tiles that no row of theirs can read are left out.
    """
    ranges, window = part
    padding = None if key_padding is None else _Padding.of(key_padding, ranges.batch)
    row, start, length, source = _range_tiles(ranges, shape, window)
    bad, void = _padded(padding, ranges, row, start, length)
    kind = _cut(ranges, shape, window, row, start, start + length - 1) | bad
    kept = ~void
    row, start, length, kind = row[kept], start[kept], length[kept], kind[kept]
    tokens = _token_tiles(ranges, shape, window, padding)
    gather_idx = tokens[4]
    if tokens[0].numel():
        row = torch.cat([row, tokens[0]])
        start = torch.cat([start, tokens[1]])
        length = torch.cat([length, tokens[2]])
        kind = torch.cat([kind, tokens[3]])
        order = torch.argsort(row, stable=True)
        row, start, length, kind = row[order], start[order], length[order], kind[order]
    bias = None
    if ranges.bias is not None:
        if source is None:
            raise ValueError("bias: expected `source` with it")
        bias = ranges.bias[source[kept]].float()
        if tokens[0].numel():
            bias = torch.cat([bias, bias.new_zeros(tokens[0].numel())])[order]
    return TileStream(
        pointers(count_rows(row, ranges.rows)),
        kind.to(torch.uint8),
        start.int(),
        length.to(torch.int16),
        gather_idx.int(),
        bias,
        ranges.batch,
        ranges.heads,
        ranges.block_q,
        window,
    )


def _range_tiles(
    ranges: KeyRanges, shape: AttentionShape, window: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Row, start, length and source of range tiles, cut to what some row of the tile may read."""
    row = ranges.row
    start = ranges.start.clamp(min=0)
    end = (ranges.start + ranges.length).clamp(max=shape.k_len)
    if shape.causal:
        end = torch.minimum(end, ranges.last_positions(row, shape) + 1)
    if window is not None:
        start = torch.maximum(start, ranges.first_positions(row, shape) - window + 1)
    keep = end > start
    row, start, end = row[keep], start[keep], end[keep]
    source = None
    if ranges.bias is None:
        row, start, end = merge_ranges(row, start, end, shape.k_len)
    elif ranges.source is not None:
        source = ranges.source[keep]
    piece, number = within((end - start + TILE_KEYS - 1) // TILE_KEYS)
    begin = start[piece] + number * TILE_KEYS
    length = (end[piece] - begin).clamp(max=TILE_KEYS)
    return row[piece], begin, length, None if source is None else source[piece]


def _cut(
    ranges: KeyRanges,
    shape: AttentionShape,
    window: int | None,
    row: Tensor,
    lowest: Tensor,
    highest: Tensor,
) -> Tensor:
    """Whether the causal rule or the window cuts tiles with these keys: bool."""
    cut = torch.zeros_like(row, dtype=torch.bool)
    if shape.causal:
        cut |= highest > ranges.first_positions(row, shape)
    if window is not None:
        cut |= lowest <= ranges.last_positions(row, shape) - window
    return cut


@dataclass(frozen=True)
class _Padding:
    """Prefix counts of keys that are padding for some, and for every, batch element of a row."""

    some: Tensor  # (Bp, k_len + 1)
    every: Tensor

    @classmethod
    def of(cls, key_padding: Tensor, batch: int) -> _Padding:
        absent = ~key_padding
        if batch == 1:
            absent = torch.stack([absent.any(0), absent.all(0)])
        else:
            absent = torch.stack([absent, absent])
        counts = absent.view(2, batch, -1).long().cumsum(-1)
        both = torch.nn.functional.pad(counts, (1, 0))
        return cls(both[0], both[1])


def _padded(
    padding: _Padding | None, ranges: KeyRanges, row: Tensor, start: Tensor, length: Tensor
) -> tuple[Tensor, Tensor]:
    """Whether padding cuts a range, and whether it leaves nothing of it."""
    if padding is None:
        nothing = torch.zeros_like(row, dtype=torch.bool)
        return nothing, nothing
    batch = row // (ranges.heads * ranges.tiles)
    some = padding.some[batch, start + length] - padding.some[batch, start]
    every = padding.every[batch, start + length] - padding.every[batch, start]
    return some > 0, every == length


def _token_tiles(
    ranges: KeyRanges, shape: AttentionShape, window: int | None, padding: _Padding | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Row, start, length, kind of gather tiles, and the list of keys they point into."""
    row, token = ranges.token_row, ranges.token
    keep = token < shape.k_len
    if shape.causal:
        keep &= token <= ranges.last_positions(row, shape)
    if window is not None:
        keep &= token > ranges.first_positions(row, shape) - window
    bad, void = _padded(
        padding, ranges, row, token.clamp(max=shape.k_len - 1), torch.ones_like(token)
    )
    keep &= ~void
    row, token, bad = row[keep], token[keep], bad[keep]
    counts = count_rows(row, ranges.rows)
    tile_row, number = within((counts + TILE_KEYS - 1) // TILE_KEYS)
    start = pointers(counts)[:-1][tile_row] + number * TILE_KEYS
    length = (counts[tile_row] - number * TILE_KEYS).clamp(max=TILE_KEYS)
    cut = tile_row.new_zeros(tile_row.shape, dtype=torch.bool)
    if tile_row.numel():
        cut = _cut(ranges, shape, window, tile_row, token[start], token[start + length - 1])
        padded = torch.nn.functional.pad(bad.long().cumsum(0), (1, 0))
        cut |= padded[start + length] > padded[start]
    kind = torch.where(cut, GATHER_EDGE, GATHER)
    return tile_row, start, length, kind, token
