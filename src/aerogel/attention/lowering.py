"""Lowering: key ranges become `TileStream`, the runs of tiles that kernels read.

A tile is at most 64 keys for one query tile: contiguous keys, or with the bit GATHER a part of a
list of keys. With the bit EDGE, every (row, key) of it is compared with the causal rule and,
without the bit NO_WINDOW, with the window; other tiles need no comparison. Padding is a matter of
the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aerogel.attention.ragged import count_rows, merge_ranges, pointers, row_numbers, within
from aerogel.attention.ranges import KeyRanges, Pass
from aerogel.attention.shape import AttentionShape
from aerogel.kernels import lower_ranges, native_in_use

EDGE, GATHER, NO_WINDOW = 1, 2, 4
TILE_KEYS = 64
_COUNTED = 4096  # tiles of single keys whose pairs are listed at a time


@dataclass(frozen=True, eq=False)
class TileStream:
    """Tiles of every query tile, in the form of `aerogel.kernels.attention`.

    Attributes:
        tile_ptr: (rows + 1,) int64, rows = batch * heads * tiles.
        kind: (T,) uint8, bits EDGE, GATHER, NO_WINDOW.
        start: (T,) int32, first key, or first entry of `gather_idx`.
        length: (T,) int16, 1 to 64 keys.
        gather_idx: int32 keys of the gather tiles.
        tile_bias: (T,) float32 additive logits, or None.
        batch, heads, block_q: as in `KeyRanges`.
        window: (heads,) int64, 0 for none: EDGE rows keep keys with ``p - j < window``.
        window_block: above 1, windows count blocks of so many tokens; for kernels alone, the
            methods below count tokens.
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
    window: Tensor | None = None
    window_block: int = 1

    def tile_pairs(
        self, shape: AttentionShape, chosen: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Every allowed (row, key), once per tile that holds it.

        Args:
            shape: sizes and causal rule.
            chosen: numbers of the tiles to look at, default all.

        Returns:
            row: numbers in (batch, heads, q_len), key: in [0, k_len), tile; int64 each.
        """
        tiles = shape.tiles(self.block_q)
        tile_row = row_numbers(self.tile_ptr)
        if chosen is None:
            chosen = torch.arange(self.kind.numel(), device=self.kind.device)
        place, number = within(self.length.long()[chosen])
        tile = chosen[place]
        first = self.start.long()[tile] + number
        key = first
        kind = self.kind[tile]
        gathered = (kind & GATHER) > 0
        if self.gather_idx.numel():
            listed = self.gather_idx.long()[first.clamp(max=self.gather_idx.numel() - 1)]
            key = torch.where(gathered, listed, first)
        lanes = torch.arange(self.block_q, device=key.device)
        row = (tile_row[tile] % tiles * self.block_q)[:, None] + lanes
        keep = row < shape.q_len
        edge = ((kind & EDGE) > 0)[:, None]
        distance = row + shape.q_offset - key[:, None]
        plane = (tile_row[tile] // tiles)[:, None]
        if shape.causal:
            keep &= ~edge | (distance >= 0)
        if self.window is not None:
            window = self.window[plane % self.heads]
            free = ~edge | ((kind & NO_WINDOW) > 0)[:, None] | (window == 0)
            keep &= free | (distance < window)
        where = keep.nonzero(as_tuple=True)
        rows = (plane * shape.q_len + row)[where]
        return rows, key[where[0]], tile[where[0]]

    def strip_mask(self, shape: AttentionShape, rows: slice) -> Tensor:
        """(batch, heads, rows, k_len) bool: the pairs of some query rows."""
        tiles = shape.tiles(self.block_q)
        at = row_numbers(self.tile_ptr) % tiles * self.block_q
        chosen = ((at < rows.stop) & (at + self.block_q > rows.start)).nonzero().flatten()
        row, key, _ = self.tile_pairs(shape, chosen)
        plane, row = row // shape.q_len, row % shape.q_len - rows.start
        size = rows.stop - rows.start
        mask = torch.zeros(self.batch * self.heads, size, shape.k_len, dtype=torch.bool)
        inside = (row >= 0) & (row < size)
        mask[plane[inside], row[inside], key[inside]] = True
        return mask.view(self.batch, self.heads, size, shape.k_len)

    def row_counts(self, shape: AttentionShape) -> Tensor:
        """Keys of each query row: (batch, heads, q_len) int64.

        Only tiles of single keys that the causal rule or a window cuts are looked at pair by pair.
        """
        tiles = shape.tiles(self.block_q)
        row = row_numbers(self.tile_ptr)
        edge, gathered = (self.kind & EDGE) > 0, (self.kind & GATHER) > 0
        counts = torch.zeros(self.batch * self.heads * tiles, self.block_q, dtype=torch.int64)
        whole, cut = ~edge, edge & ~gathered
        counts += torch.bincount(
            row[whole].cpu(), self.length[whole].double().cpu(), len(counts)
        ).long()[:, None]
        counts.index_add_(0, row[cut].cpu(), self._range_counts(shape, row, cut).cpu())
        counts = counts.view(self.batch * self.heads, -1)[:, : shape.q_len].clone()
        for part in (edge & gathered).nonzero().flatten().split(_COUNTED):
            each = self.tile_pairs(shape, part)[0]
            counts += count_rows(each.cpu(), counts.numel()).view_as(counts)
        return counts.view(self.batch, self.heads, shape.q_len)

    def _range_counts(self, shape: AttentionShape, row: Tensor, cut: Tensor) -> Tensor:
        """(tiles, block_q) int64: keys that each row reads of the range tiles where `cut`."""
        start = self.start[cut].long()[:, None]
        end = start + self.length[cut].long()[:, None]
        tiles = shape.tiles(self.block_q)
        lanes = torch.arange(self.block_q, device=row.device)
        position = shape.q_offset + (row[cut] % tiles * self.block_q)[:, None] + lanes
        if shape.causal:
            end = torch.minimum(end, position + 1)
        if self.window is not None:
            own = self.window[row[cut] // tiles % self.heads]
            own = own.masked_fill((self.kind[cut] & NO_WINDOW) > 0, 0)[:, None]
            start = torch.where(own > 0, torch.maximum(start, position - own + 1), start)
        return (end - start).clamp(min=0).expand(-1, self.block_q)

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


def lower(passes: list[Pass], shape: AttentionShape, window: int | None = None) -> list[TileStream]:
    """Passes as streams; a pass without and one with a window run as one stream where they can.

    Args:
        passes: of a plan; together they share one softmax.
        shape: sizes and causal rule of the call.
        window: tokens, a further window for every pass.
    """
    streams: list[TileStream] = []
    for part in passes:
        stream = lower_pass(part.narrowed(window), shape)
        if streams and _fusible(streams[-1], stream):
            stream = _fused(streams.pop(), stream)
        streams.append(stream)
    return streams


def _fusible(far: TileStream, near: TileStream) -> bool:
    sizes = [(s.batch, s.heads, s.block_q) for s in (far, near)]
    windows = far.window is None and near.window is not None
    return windows and sizes[0] == sizes[1] and far.tile_bias is None and near.tile_bias is None


def _fused(far: TileStream, near: TileStream) -> TileStream:
    row = torch.cat([row_numbers(far.tile_ptr), row_numbers(near.tile_ptr)])
    order = torch.argsort(row, stable=True)
    moved = torch.where((near.kind & GATHER) > 0, near.start + far.gather_idx.numel(), near.start)
    return replace(
        near,
        tile_ptr=far.tile_ptr + near.tile_ptr,
        kind=torch.cat([far.kind | NO_WINDOW, near.kind])[order],
        start=torch.cat([far.start, moved])[order],
        length=torch.cat([far.length, near.length])[order],
        gather_idx=torch.cat([far.gather_idx, near.gather_idx]),
    )


def count_pairs(passes: list[Pass], shape: AttentionShape) -> Tensor:
    """Keys that each query row reads, over all passes: (Bp, Hp, q_len) int64."""
    batch = max(part.ranges.batch for part in passes)
    heads = max(part.ranges.heads for part in passes)
    total = torch.zeros(batch, heads, shape.q_len, dtype=torch.int64)
    for stream in lower(passes, shape):
        total += stream.row_counts(shape)
    return total


def lower_pass(part: Pass, shape: AttentionShape) -> TileStream:
    """Cuts the ranges and tokens of one pass into tiles.

    Tiles that no row of theirs can read are left out.
    """
    ranges, window = part
    if ranges.row.is_cpu and native_in_use() is not None:
        return _lower_natively(part, shape)
    row, start, length, source = _range_tiles(ranges, shape, window)
    kind = _cut(ranges, shape, window, row, start, start + length - 1)
    tokens = _token_tiles(ranges, shape, window)
    if tokens[0].numel():
        order = torch.argsort(torch.cat([row, tokens[0]]), stable=True)
        row, start, length, kind = (
            torch.cat([a, b])[order]
            for a, b in zip((row, start, length, kind), tokens[:4], strict=True)
        )
    bias = None
    if ranges.bias is not None:
        if source is None:
            raise ValueError("bias: expected `source` with it")
        bias = ranges.bias[source].float()
        if tokens[0].numel():
            bias = torch.cat([bias, bias.new_zeros(tokens[0].numel())])[order]
    return TileStream(
        pointers(count_rows(row, ranges.rows)),
        kind.to(torch.uint8),
        start.int(),
        length.to(torch.int16),
        tokens[4].int(),
        bias,
        ranges.batch,
        ranges.heads,
        ranges.block_q,
        window,
    )


def _lower_natively(part: Pass, shape: AttentionShape) -> TileStream:
    ranges, window = part
    tokens = ranges.token.numel() > 0
    tile_ptr, kind, start, length, gather_idx, source = lower_ranges(
        pointers(count_rows(ranges.row, ranges.rows)),
        ranges.start,
        ranges.length,
        Bp=ranges.batch,
        Hp=ranges.heads,
        block_q=ranges.block_q,
        q_len=shape.q_len,
        k_len=shape.k_len,
        q_offset=shape.q_offset,
        causal=shape.causal,
        window=window,
        token_ptr=pointers(count_rows(ranges.token_row, ranges.rows)) if tokens else None,
        token=ranges.token if tokens else None,
        separate=ranges.bias is not None,
    )
    bias = None
    if ranges.bias is not None and ranges.source is not None and source is not None:
        known = ranges.bias[ranges.source[source.clamp(min=0).long()]].float()
        bias = torch.where(source >= 0, known, 0)
    sizes = (ranges.batch, ranges.heads, ranges.block_q)
    return TileStream(tile_ptr, kind, start, length, gather_idx, bias, *sizes, window)


def _window_start(ranges: KeyRanges, shape: AttentionShape, window: Tensor, row: Tensor) -> Tensor:
    """First key that the first query of each tile reads under its head's window."""
    own = window[row // ranges.tiles % ranges.heads]
    return torch.where(own > 0, ranges.first_positions(row, shape) - own + 1, 0)


def _range_tiles(
    ranges: KeyRanges, shape: AttentionShape, window: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Row, start, length and source of range tiles, cut to what some row of the tile may read."""
    row = ranges.row
    start = ranges.start.clamp(min=0)
    end = (ranges.start + ranges.length).clamp(max=shape.k_len)
    if shape.causal:
        end = torch.minimum(end, ranges.last_positions(row, shape) + 1)
    if window is not None:
        start = torch.maximum(start, _window_start(ranges, shape, window, row))
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
    window: Tensor | None,
    row: Tensor,
    lowest: Tensor,
    highest: Tensor,
) -> Tensor:
    """EDGE where the causal rule or the window cuts tiles with these keys, else 0."""
    cut = torch.zeros_like(row, dtype=torch.bool)
    if shape.causal:
        cut |= highest > ranges.first_positions(row, shape)
    if window is not None:
        own = window[row // ranges.tiles % ranges.heads]
        cut |= (own > 0) & (lowest <= ranges.last_positions(row, shape) - own)
    return torch.where(cut, EDGE, 0)


def _token_tiles(
    ranges: KeyRanges, shape: AttentionShape, window: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Row, start, length, kind of gather tiles, and the list of keys they point into."""
    row, token = ranges.token_row, ranges.token
    keep = token < shape.k_len
    if shape.causal:
        keep &= token <= ranges.last_positions(row, shape)
    if window is not None:
        keep &= token >= _window_start(ranges, shape, window, row)
    row, token = row[keep], token[keep]
    counts = count_rows(row, ranges.rows)
    tile_row, number = within((counts + TILE_KEYS - 1) // TILE_KEYS)
    start = pointers(counts)[:-1][tile_row] + number * TILE_KEYS
    length = (counts[tile_row] - number * TILE_KEYS).clamp(max=TILE_KEYS)
    if not tile_row.numel():
        return tile_row, start, length, tile_row, token
    lowest, highest = token[start], token[start + length - 1]
    kind = _cut(ranges, shape, window, tile_row, lowest, highest) | GATHER
    return tile_row, start, length, kind, token
