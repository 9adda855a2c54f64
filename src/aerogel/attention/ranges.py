"""Key ranges of query tiles: the form between plans and the kernels' tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from aerogel.attention.ragged import within
from aerogel.attention.shape import AttentionShape


@dataclass(frozen=True, eq=False)
class KeyRanges:
    """What each query tile reads, before the causal rule, windows and padding.

    Tiles are numbered ``(b * heads + h) * tiles + t``; tile t holds rows
    ``t * block_q .. (t + 1) * block_q`` of its head.

    Attributes:
        batch, heads: the plan's dimensions.
        block_q: query rows per tile.
        tiles: query tiles per head.
        row, start, length: (n,) int64, sorted by (row, start); may touch or overlap, in which case
            a key still counts once. Without `source` nothing else is assumed.
        token_row, token: (m,) int64, single keys, sorted, outside the ranges of their tile.
        source: (n,) int64 index of each range into `bias`, or None.
        bias: additive logit per range, differentiable, or None.
    """

    batch: int
    heads: int
    block_q: int
    tiles: int
    row: Tensor
    start: Tensor
    length: Tensor
    token_row: Tensor
    token: Tensor
    source: Tensor | None = None
    bias: Tensor | None = None

    @classmethod
    def of(
        cls,
        batch: int,
        heads: int,
        block_q: int,
        tiles: int,
        row: Tensor,
        start: Tensor,
        length: Tensor,
        tokens: tuple[Tensor, Tensor] | None = None,
        source: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> KeyRanges:
        """Ranges, and single tokens as (row, token) if there are any."""
        token_row, token = tokens or (row.new_empty(0), row.new_empty(0))
        return cls(batch, heads, block_q, tiles, row, start, length, token_row, token, source, bias)

    @property
    def rows(self) -> int:
        """Query tiles over batch and heads."""
        return self.batch * self.heads * self.tiles

    def first_positions(self, row: Tensor, shape: AttentionShape) -> Tensor:
        """Position of the first query of each given tile."""
        return shape.q_offset + (row % self.tiles) * self.block_q

    def last_positions(self, row: Tensor, shape: AttentionShape) -> Tensor:
        """Position of the last query of each given tile."""
        end = ((row % self.tiles + 1) * self.block_q).clamp(max=shape.q_len)
        return shape.q_offset + end - 1


class Pass(NamedTuple):
    """Ranges under one window per head: a query at p reads keys j with ``p - j < window``.

    Attributes:
        ranges: what the query tiles read.
        window: (heads,) int64 tokens, 0 for no window; None for none in any head.
    """

    ranges: KeyRanges
    window: Tensor | None = None

    def narrowed(self, window: int | None) -> Pass:
        """With a further window for all heads."""
        if window is None:
            return self
        if self.window is None:
            heads = self.ranges.heads
            return Pass(self.ranges, torch.full((heads,), window, device=self.ranges.row.device))
        own = torch.where(self.window > 0, self.window, window)
        return Pass(self.ranges, own.clamp(max=window))


def expand_tiles(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For (heads, tiles) counts: each entry's head, tile, and number in its tile."""
    row, number = within(counts.flatten())
    return row // counts.shape[1], row % counts.shape[1], number
