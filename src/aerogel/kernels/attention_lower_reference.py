"""References of the lowering, one query tile after the other in Python."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aerogel.kernels.attention_call import EDGE, FULL, GATHER, NO_WINDOW, TILE_KEYS

Arrays = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]


class TileShape(NamedTuple):
    """Query tiles and the rules that cut keys; see `lower_ranges`."""

    batch: int
    heads: int
    block_q: int
    q_len: int
    k_len: int
    q_offset: int
    causal: bool
    window: Tensor | None  # (heads,) int64, 0 for none
    window_block: int

    @property
    def tiles(self) -> int:
        """Query tiles of a head."""
        return -(-self.q_len // self.block_q)

    @property
    def rows(self) -> int:
        """All query tiles."""
        return self.batch * self.heads * self.tiles

    def first(self, row: int) -> int:
        """Position of a query tile's first query."""
        return self.q_offset + row % self.tiles * self.block_q

    def last(self, row: int) -> int:
        """Position of its last one."""
        return min(self.first(row) + self.block_q, self.q_offset + self.q_len) - 1

    def head(self, row: int) -> int:
        """Which head it is of."""
        return row // self.tiles % self.heads

    def end(self, row: int) -> int:
        """The keys before this one are left by the causal rule."""
        return min(max(self.last(row) + 1, 0), self.k_len) if self.causal else self.k_len

    def window_begin(self, row: int, position: int) -> int:
        """The first key that the window leaves a query at this position."""
        width = 0 if self.window is None else int(self.window[self.head(row)])
        if width <= 0:
            return -self.q_len - self.k_len
        return (position // self.window_block - (width - 1)) * self.window_block


class RangeLists(NamedTuple):
    """Ranges and single keys of every query tile."""

    ptr: Tensor
    start: Tensor
    length: Tensor | int
    unit: int
    token_ptr: Tensor | None
    token: Tensor | None
    separate: bool


class SpanLists(NamedTuple):
    """Spans of every head."""

    sink: Tensor
    window: Tensor
    stride: Tensor
    phase: Tensor
    dense: Tensor
    block: int
    by_block: bool


class _Tiles:
    """Tiles in the making."""

    def __init__(self, shape: TileShape) -> None:
        self.shape = shape
        self.ptr = [0]
        self.tiles: list[tuple[int, int, int, int]] = []  # kind, start, length, source
        self.gathers: list[int] = []

    def _kind(self, row: int, first: int, last: int, windowed: bool) -> int:
        late = self.shape.causal and last > self.shape.first(row)
        early = windowed and first < self.shape.window_begin(row, self.shape.last(row))
        return EDGE if early else EDGE | NO_WINDOW if late else FULL

    def add(self, row: int, begin: int, end: int, windowed: bool = True, source: int = -1) -> None:
        for at in range(begin, end, TILE_KEYS):
            stop = min(at + TILE_KEYS, end)
            kind = self._kind(row, at, stop - 1, windowed)
            self.tiles.append((kind, at, stop - at, source))

    def add_tokens(self, row: int, tokens: list[int]) -> None:
        for i in range(0, len(tokens), TILE_KEYS):
            part = tokens[i : i + TILE_KEYS]
            edge = EDGE if self._kind(row, part[0], part[-1], True) else FULL
            self.tiles.append((GATHER | edge, len(self.gathers), len(part), -1))
            self.gathers += part

    def arrays(self, separate: bool) -> Arrays:
        columns = list(zip(*self.tiles, strict=True)) or [(), (), (), ()]
        kind, start, length, source = columns
        return (
            torch.tensor(self.ptr, dtype=torch.int64),
            torch.tensor(kind, dtype=torch.uint8),
            torch.tensor(start, dtype=torch.int32),
            torch.tensor(length, dtype=torch.int16),
            torch.tensor(self.gathers, dtype=torch.int32),
            torch.tensor(source, dtype=torch.int32) if separate else None,
        )


def lower_ranges_reference(shape: TileShape, lists: RangeLists) -> Arrays:
    """`lower_ranges` on checked arguments."""
    out = _Tiles(shape)
    fixed = isinstance(lists.length, int)
    for row in range(shape.rows):
        low = max(0, shape.window_begin(row, shape.first(row)))
        high, before = shape.end(row), -1
        merged: list[list[int]] = []
        for i in range(int(lists.ptr[row]), int(lists.ptr[row + 1])):
            start = int(lists.start[i]) * lists.unit
            length = int(lists.length if fixed else lists.length[i])  # type: ignore[index]
            if start < before or start < 0 or length < 0:
                raise ValueError(f"row {row}: range at {start}, expected ascending starts")
            before = start
            begin, end = max(start, low), min(start + length, high)
            if begin >= end:
                continue
            touches = bool(merged) and begin <= merged[-1][1]
            if lists.separate:
                if touches and begin < merged[-1][1]:
                    raise ValueError(f"row {row}: range at {start} overlaps the one before")
                out.add(row, begin, end, source=i)
            if touches and not lists.separate:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([begin, end])
        if not lists.separate:
            for begin, end in merged:
                out.add(row, begin, end)
        if lists.token is not None and lists.token_ptr is not None:
            tokens = lists.token[lists.token_ptr[row] : lists.token_ptr[row + 1]].tolist()
            if any(b <= a for a, b in zip([-1, *tokens], tokens, strict=False)):
                raise ValueError(f"row {row}: token {tokens}, expected ascending ones")
            free = [t for t in tokens if low <= t < high]
            out.add_tokens(row, [t for t in free if not any(b <= t < e for b, e in merged)])
        out.ptr.append(len(out.tiles))
    return out.arrays(lists.separate)


def lower_spans_reference(shape: TileShape, lists: SpanLists) -> Arrays:
    """`lower_spans` on checked arguments."""
    out = _Tiles(shape)
    for row in range(shape.rows):
        head, end = shape.head(row), shape.end(row)
        key = torch.arange(end)
        always = key >= shape.window_begin(row, shape.last(row))
        cut = key >= shape.window_begin(row, shape.first(row))
        if int(lists.window[head]) <= 0:
            always, cut = torch.zeros(2, end, dtype=torch.bool)
        unit = lists.block if lists.by_block else 1
        always |= key < int(lists.sink[head]) * unit
        stride = int(lists.stride[head])
        if stride > 0:
            always |= (key // lists.block + int(lists.phase[head])) % stride == 0
        if bool(lists.dense[head]):
            always = torch.ones(end, dtype=torch.bool)
        # 2: whatever the window says, 1: where it leaves them, 0: never.
        state = torch.where(always, 2, cut.long()).tolist()
        begin = 0
        for at in range(1, end + 1):
            if at == end or state[at] != state[begin]:
                if state[begin]:
                    out.add(row, begin, at, windowed=state[begin] == 1)
                begin = at
        out.ptr.append(len(out.tiles))
    return out.arrays(False)
