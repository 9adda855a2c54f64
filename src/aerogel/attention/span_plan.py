"""`SpanPlan`: sinks, windows and strides, known from the positions alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from aerogel.attention.lowering import TileStream
from aerogel.attention.plan import Plan, check_dims
from aerogel.attention.ragged import sorted_by
from aerogel.attention.ranges import KeyRanges, Pass, expand_tiles
from aerogel.attention.shape import AttentionShape
from aerogel.kernels import lower_spans, native_in_use

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
        first: (B,) int32, first real key of each batch element; sinks and blocks count from there,
            and keys before it are not read. Default 0.
    """

    sink: Tensor
    window: Tensor
    stride: Tensor
    phase: Tensor
    dense: Tensor
    block: int = 64
    granularity: Literal["token", "block"] = "token"
    first: Tensor | None = None

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
        return 1 if self.first is None else self.first.numel(), self.sink.numel()

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
        if self.first is not None and self.first.dtype != torch.int32:
            raise ValueError(f"first: {self.first.dtype}, expected int32")
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
        rows = self._rows()
        window, stride, phase = (t.view(-1, 1, 1) for t in (rows.window, rows.stride, rows.phase))
        unit = 1 if self.granularity == "token" else self.block
        begin = rows.begin.view(-1, 1, 1)
        since, row = j - begin, p - begin
        keep = (j < rows.sink_end.view(-1, 1, 1)) | (row // unit - since // unit < window)
        keep |= (stride > 0) & ((since // self.block + phase) % stride.clamp(min=1) == 0)
        keep |= rows.dense.view(-1, 1, 1)
        keep &= (since >= 0) & (j <= p)
        return keep.view(*self.dims, shape.q_len, shape.k_len)

    def streams(self, shape: AttentionShape, window: int | None = None) -> list[TileStream]:
        """Tiles of 64 rows, straight from the spans: small blocks share the keys of a tile.

        A row's own window, in blocks where the plan counts them, is left to the kernel.
        """
        native = self.sink.is_cpu and native_in_use() is not None
        if window is not None or self.first is not None or not native:
            return super().streams(shape, window)
        by_block = self.granularity == "block"
        spans = (self.sink, self.window, self.stride, self.phase, self.dense)
        tiles = lower_spans(
            *spans, block=self.block, by_block=by_block, block_q=_TILE, q_len=shape.q_len,
            k_len=shape.k_len, q_offset=shape.q_offset,
        )  # fmt: skip
        sizes = (1, self.sink.numel(), _TILE)
        unit = self.block if by_block else 1
        return [TileStream(*tiles[:5], None, *sizes, self.window.long(), unit)]

    def passes(self, shape: AttentionShape) -> list[Pass]:
        return self._block_pass(shape) if self.granularity == "block" else self._token_passes(shape)

    def _rows(self) -> _Rows:
        """The spans of all batch elements and heads."""
        batch, heads = self.dims
        unit = 1 if self.granularity == "token" else self.block
        begin = torch.zeros(heads, dtype=torch.int64, device=self.device)
        if self.first is not None:
            begin = self.first.long().repeat_interleave(heads)
        sink, window, stride, phase = (
            t.long().repeat(batch) for t in (self.sink, self.window, self.stride, self.phase)
        )
        return _Rows(begin, begin + sink * unit, window, stride, phase, self.dense.repeat(batch))

    def _tile(self, shape: AttentionShape) -> int:
        """Query rows per tile, such that no tile crosses the edge of a block."""
        size = math.gcd(self.block, shape.q_offset)
        for first in [] if self.first is None else self.first.unique().tolist():
            size = math.gcd(size, first)
        return size if size <= _LARGEST_TILE else math.gcd(size, _LARGEST_TILE)

    def _block_pass(self, shape: AttentionShape) -> list[Pass]:
        tile = self._tile(shape)
        tiles = shape.tiles(tile)
        at = shape.q_offset + torch.arange(tiles, device=self.device) * tile
        rows = self._rows()
        begin = rows.begin[:, None]
        reach = (at - begin) // self.block + 1  # blocks up to the tile's own
        lowest = torch.where(rows.dense[:, None], 0, reach - rows.window[:, None]).clamp(min=0)
        local = (begin + lowest * self.block, begin + reach * self.block)
        return [Pass(self._ranges(rows, tile, tiles, reach, local))]

    def _ranges(
        self,
        rows: _Rows,
        tile: int,
        tiles: int,
        reach: Tensor,
        local: tuple[Tensor, Tensor],
    ) -> KeyRanges:
        """Sinks, the stride's blocks below `reach`, and `local` ranges; (planes, tiles) each."""
        row = torch.arange(reach.numel(), device=self.device)
        begin = rows.begin[:, None].expand_as(reach).flatten()
        sink_end = rows.sink_end[:, None].expand_as(reach).flatten()
        stride_row, number = _stride_blocks(rows, reach)
        column = rows.begin[stride_row // max(1, tiles)] + number * self.block
        return self._sorted(
            tile,
            tiles,
            torch.cat([row, row, stride_row]),
            torch.cat([begin, local[0].flatten(), column]),
            torch.cat([sink_end, local[1].flatten(), column + self.block]),
        )

    def _token_passes(self, shape: AttentionShape) -> list[Pass]:
        """Sinks and strides in one pass; in another the windows, without those keys."""
        tiles = shape.tiles(_TILE)
        first = shape.q_offset + torch.arange(tiles, device=self.device) * _TILE
        last = torch.minimum(first + _TILE, first.new_tensor(shape.q_offset + shape.q_len)) - 1
        rows = self._rows()
        reach = (last - rows.begin[:, None]) // self.block + 1
        whole = torch.where(rows.dense[:, None], shape.k_len, 0).expand_as(reach)
        far = self._ranges(rows, _TILE, tiles, reach, (torch.zeros_like(whole), whole))
        windowed = (self.window > 0) & ~self.dense
        if not bool(windowed.any()):
            return [Pass(far)]
        window = torch.where(windowed, self.window.long(), 0)
        near = Pass(self._window_ranges(rows, first, last), window)
        return [Pass(far), near] if far.row.numel() else [near]

    def _window_ranges(self, rows: _Rows, first: Tensor, last: Tensor) -> KeyRanges:
        """The window of every head that is not dense, without its sink and stride's blocks."""
        planes, tiles = rows.begin.numel(), first.numel()
        wanted = (~rows.dense & (rows.window > 0))[:, None]
        low = torch.maximum(rows.sink_end[:, None], first - rows.window[:, None] + 1)
        high = torch.where(wanted, (last + 1)[None], 0).expand(planes, tiles)
        plain = rows.stride == 0
        period = torch.where(plain, 1 << 40, rows.stride * self.block)[:, None]
        shift = (rows.phase * self.block - rows.begin)[:, None]
        # Gap n between stride blocks: n * period - shift + block up to (n + 1) * period - shift.
        lowest = torch.div(low + shift, period, rounding_mode="floor")
        counts = torch.div(high - 1 + shift, period, rounding_mode="floor") - lowest + 1
        counts = torch.where(high > low, counts, 0)
        plane, tile, number = expand_tiles(counts)
        step = period[plane, 0]
        begin = (lowest[plane, tile] + number) * step - shift[plane, 0]
        gap = torch.where(plain[plane], 0, self.block)
        start = torch.maximum(begin + gap, low[plane, tile])
        end = torch.minimum(begin + step, high[plane, tile])
        return self._sorted(_TILE, tiles, plane * tiles + tile, start, end)

    def _sorted(self, tile: int, tiles: int, row: Tensor, start: Tensor, end: Tensor) -> KeyRanges:
        start = torch.maximum(start, self._rows().begin[row // max(1, tiles)])
        keep = end > start
        row, start, end = row[keep], start[keep], end[keep]
        order = sorted_by(row, start, int(start.max()) if start.numel() else 0)
        row, start, end = row[order], start[order], end[order]
        return KeyRanges.of(*self.dims, tile, tiles, row, start, end - start)


class _Rows(NamedTuple):
    """One span per batch element and head: (Bp * Hp,) each; `sink_end` in tokens."""

    begin: Tensor
    sink_end: Tensor
    window: Tensor
    stride: Tensor
    phase: Tensor
    dense: Tensor


def _stride_blocks(rows: _Rows, reach: Tensor) -> tuple[Tensor, Tensor]:
    """Tile and number of each stride block below `reach` (planes, tiles)."""
    stride = rows.stride[:, None]
    first = (-rows.phase[:, None]) % stride.clamp(min=1)
    counts = (reach - first + stride - 1) // stride.clamp(min=1)
    counts = torch.where(stride > 0, counts.clamp(min=0), 0)
    plane, tile, number = expand_tiles(counts)
    return plane * reach.shape[1] + tile, first[plane, 0] + number * stride[plane, 0]
