"""`SpanPlan`: sinks, windows and strides, known from the positions alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from aerogel.attention.plan import Plan, check_dims
from aerogel.attention.ragged import sorted_by
from aerogel.attention.ranges import KeyRanges, Pass, expand_tiles
from aerogel.attention.shape import AttentionShape

_TILE = 64
_LARGEST_TILE = 128


@dataclass(frozen=True, eq=False)
class SpanPlan(Plan):
    """Keys by position, per head; always causal.

    A query at position p reads keys ``j <= p`` with ``j < sink``, or ``p - j < window``, or
    ``stride > 0`` and ``(j // block + phase) % stride == 0``; with ``granularity="block"``, sink
    and window count blocks: ``j // block < sink``, ``p // block - j // block < window``.

    Args:
        sink, window, stride, phase: (Hp,) int32; stride and phase count blocks.
        block: keys per block.
        dense: (Hp,) bool, heads that read all keys.
        granularity: "token" or "block".
    """

    sink: Tensor
    window: Tensor
    stride: Tensor
    phase: Tensor
    dense: Tensor
    block: int = 64
    granularity: Literal["token", "block"] = "token"

    @classmethod
    def uniform(
        cls,
        sink: int,
        window: int,
        *,
        heads: int = 1,
        stride: int = 0,
        phase: int = 0,
        block: int = 64,
        granularity: Literal["token", "block"] = "token",
    ) -> SpanPlan:
        """The same span for all heads."""
        counts = [torch.full((heads,), n, dtype=torch.int32) for n in (sink, window, stride, phase)]
        dense = torch.zeros(heads, dtype=torch.bool)
        return cls(counts[0], counts[1], counts[2], counts[3], dense, block, granularity)

    @property
    def dims(self) -> tuple[int, int]:
        return 1, self.sink.numel()

    @property
    def is_causal(self) -> bool:
        return True

    def validate(self, shape: AttentionShape) -> None:
        check_dims(self, shape)
        for name in ("sink", "window", "stride", "phase", "dense"):
            value: Tensor = getattr(self, name)
            expected = torch.bool if name == "dense" else torch.int32
            if value.shape != self.sink.shape or value.dim() != 1 or value.dtype != expected:
                raise ValueError(
                    f"{name}: {value.dtype} {tuple(value.shape)}, expected {expected} "
                    f"{tuple(self.sink.shape)}"
                )
            if name not in ("phase", "dense") and bool((value < 0).any()):
                raise ValueError(f"{name}: {value.tolist()}, expected no negative entry")
        if self.block < 1 or self.granularity not in ("token", "block"):
            raise ValueError(f"block={self.block}, granularity={self.granularity!r}: out of range")

    def cache_tokens(self) -> list[int | None]:
        """Keys that each head must keep to go on decoding; None where it must keep all."""
        unit = 1 if self.granularity == "token" else self.block
        sizes: list[int | None] = []
        for head in range(self.sink.numel()):
            all_keys = bool(self.dense[head]) or int(self.stride[head]) > 0
            kept = (int(self.sink[head]) + int(self.window[head])) * unit
            sizes.append(None if all_keys else kept)
        return sizes

    def _mask(self, shape: AttentionShape) -> Tensor:
        p = shape.positions(self.device)[:, None]
        j = torch.arange(shape.k_len, device=self.device)
        sink, window, stride, phase = (
            t.long().view(-1, 1, 1) for t in (self.sink, self.window, self.stride, self.phase)
        )
        unit = 1 if self.granularity == "token" else self.block
        keep = (j // unit < sink) | (p // unit - j // unit < window)
        keep |= (stride > 0) & ((j // self.block + phase) % stride.clamp(min=1) == 0)
        keep |= self.dense.view(-1, 1, 1)
        return (keep & (j <= p))[None]

    def passes(self, shape: AttentionShape) -> list[Pass]:
        if self.granularity == "block":
            return [Pass(self._block_ranges(shape))]
        return self._token_passes(shape)

    def _tile(self, shape: AttentionShape) -> int:
        """Query rows per tile, such that no tile crosses the edge of a block."""
        size = math.gcd(self.block, shape.q_offset)
        return size if size <= _LARGEST_TILE else math.gcd(size, _LARGEST_TILE)

    def _block_ranges(self, shape: AttentionShape) -> KeyRanges:
        tile = self._tile(shape)
        tiles = shape.tiles(tile)
        at = (shape.q_offset + torch.arange(tiles, device=self.device) * tile) // self.block
        reach = (at + 1)[None]  # blocks up to the tile's own
        lowest = torch.where(self.dense[:, None], 0, reach - self.window[:, None].long())
        sink = torch.minimum(self.sink[:, None].long(), reach)
        spans = [
            (torch.zeros_like(sink), sink),
            (lowest.clamp(min=0), reach.expand_as(lowest)),
        ]
        return self._joined(tile, tiles, spans, reach)

    def _joined(
        self, tile: int, tiles: int, spans: list[tuple[Tensor, Tensor]], reach: Tensor
    ) -> KeyRanges:
        """Ranges of (heads, tiles) block spans and of the stride's blocks below `reach`."""
        heads = self.sink.numel()
        rows = torch.arange(heads * tiles, device=self.device)
        row = rows.repeat(len(spans))
        start = torch.cat([begin.flatten() for begin, _ in spans]) * self.block
        end = torch.cat([finish.flatten() for _, finish in spans]) * self.block
        stride_row, column = self._stride_blocks(reach.expand(heads, tiles))
        row = torch.cat([row, stride_row])
        start = torch.cat([start, column * self.block])
        end = torch.cat([end, (column + 1) * self.block])
        return _sorted_ranges(heads, tile, tiles, row, start, end)

    def _stride_blocks(self, reach: Tensor) -> tuple[Tensor, Tensor]:
        """Tile and number of each stride block below `reach` (heads, tiles)."""
        stride = self.stride.long()[:, None]
        first = (-self.phase.long()[:, None]) % stride.clamp(min=1)
        counts = (reach - first + stride - 1) // stride.clamp(min=1)
        counts = torch.where(stride > 0, counts.clamp(min=0), 0)
        head, tile, number = expand_tiles(counts)
        row = head * reach.shape[1] + tile
        return row, first[head, 0] + number * stride[head, 0]

    def _token_passes(self, shape: AttentionShape) -> list[Pass]:
        """Sinks and strides in one pass; in another the windows, without those keys."""
        tiles = shape.tiles(_TILE)
        first = shape.q_offset + torch.arange(tiles, device=self.device) * _TILE
        last = torch.minimum(first + _TILE, first.new_tensor(shape.q_offset + shape.q_len)) - 1
        heads = self.sink.numel()
        rows = torch.arange(heads * tiles, device=self.device)
        far = torch.where(self.dense[:, None], shape.k_len, self.sink[:, None].long())
        stride_row, column = self._stride_blocks((last // self.block + 1).expand(heads, -1))
        row = torch.cat([rows, stride_row])
        start = torch.cat([torch.zeros_like(rows), column * self.block])
        end = torch.cat([far.expand(heads, tiles).flatten(), (column + 1) * self.block])
        passes = [Pass(_sorted_ranges(heads, _TILE, tiles, row, start, end))]
        windowed = (self.window > 0) & ~self.dense
        if bool(windowed.any()):
            window = torch.where(windowed, self.window.long(), 0)
            passes.append(Pass(self._window_ranges(windowed, first, last), window))
        return passes if bool((end > start).any()) else passes[-1:]

    def _window_ranges(self, wanted: Tensor, first: Tensor, last: Tensor) -> KeyRanges:
        """The window of the wanted heads without their sink and their stride's blocks."""
        heads, tiles = wanted.numel(), first.numel()
        sink = self.sink.long()[:, None]
        window = self.window.long()[:, None]
        low = torch.maximum(sink, (first - window + 1).clamp(min=0))
        high = torch.where(wanted[:, None], (last + 1)[None], 0).expand(heads, tiles)
        period = self.stride.long()[:, None] * self.block
        plain = period == 0
        period = torch.where(plain, 1 << 40, period)
        shift = (self.phase.long() * self.block)[:, None]
        # Gap n between stride blocks: n * period - shift + block up to (n + 1) * period - shift.
        lowest = torch.div(low + shift, period, rounding_mode="floor")
        counts = torch.div(high - 1 + shift, period, rounding_mode="floor") - lowest + 1
        counts = torch.where(high > low, counts, 0)
        head, tile, number = expand_tiles(counts)
        step = period[head, 0]
        begin = (lowest[head, tile] + number) * step - shift[head, 0]
        gap = torch.where(plain[head, 0], 0, self.block)
        start = torch.maximum(begin + gap, low[head, tile])
        end = torch.minimum(begin + step, high[head, tile])
        return _sorted_ranges(heads, _TILE, tiles, head * tiles + tile, start, end)


def _sorted_ranges(
    heads: int, tile: int, tiles: int, row: Tensor, start: Tensor, end: Tensor
) -> KeyRanges:
    keep = end > start
    row, start, end = row[keep], start[keep], end[keep]
    order = sorted_by(row, start, int(start.max()) if start.numel() else 0)
    row, start, end = row[order], start[order], end[order]
    return KeyRanges.of(1, heads, tile, tiles, row, start, end - start)
