"""`HeadMixPlan`: different kinds of plans for different heads of one layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aerogel.attention.group_plan import GroupPlan
from aerogel.attention.plan import Plan
from aerogel.attention.ragged import sorted_by
from aerogel.attention.ranges import KeyRanges, Pass
from aerogel.attention.shape import AttentionShape
from aerogel.attention.token_plan import TokenPlan


@dataclass(frozen=True, eq=False)
class HeadMixPlan(Plan):
    """A plan for each set of query heads; together the sets hold every head once.

    Args:
        parts: (head numbers, plan) pairs. A plan's heads are 1 (shared) or one per number.
    """

    parts: tuple[tuple[tuple[int, ...], Plan], ...]

    @classmethod
    def of(cls, parts: Mapping[tuple[int, ...], Plan]) -> HeadMixPlan:
        """From a dictionary of head numbers to plans."""
        return cls(tuple((tuple(heads), plan) for heads, plan in parts.items()))

    @property
    def dims(self) -> tuple[int, int]:
        return max(plan.dims[0] for _, plan in self.parts), sum(len(h) for h, _ in self.parts)

    @property
    def is_causal(self) -> bool:
        return any(plan.is_causal for _, plan in self.parts)

    def part_shape(self, heads: tuple[int, ...], shape: AttentionShape) -> AttentionShape:
        """The shape that a part's plan is made for."""
        return replace(shape, q_heads=len(heads), kv_heads=len(heads))

    def validate(self, shape: AttentionShape) -> None:
        seen = sorted(head for heads, _ in self.parts for head in heads)
        if seen != list(range(shape.q_heads)):
            raise ValueError(f"parts: heads {seen}, expected each of 0 to {shape.q_heads - 1} once")
        if self.is_causal and not shape.causal:
            raise ValueError("parts: a causal plan in attention that is not causal")
        for heads, plan in self.parts:
            plan.validate(self.part_shape(heads, shape))

    def gathered(self) -> bool:
        """Whether a part runs on gathered groups rather than on key ranges."""
        return any(isinstance(plan, (GroupPlan, TokenPlan)) for _, plan in self.parts)

    def passes(self, shape: AttentionShape) -> list[Pass]:
        batch, heads = self.dims[0], shape.q_heads
        placed = [
            _placed(part, numbers, batch, heads)
            for numbers, plan in self.parts
            for part in plan.passes(self.part_shape(numbers, shape))
        ]
        return _joined(placed)

    def row_counts(self, shape: AttentionShape) -> Tensor:
        batch, heads = self.dims
        counts = torch.zeros(batch, heads, shape.q_len, dtype=torch.int64)
        for numbers, plan in self.parts:
            counts[:, list(numbers)] = plan.row_counts(self.part_shape(numbers, shape))
        return counts

    def keys_read(self, shape: AttentionShape) -> float:
        read = (
            len(heads) * plan.keys_read(self.part_shape(heads, shape)) for heads, plan in self.parts
        )
        return sum(read) / max(1, self.dims[1])

    def _mask(self, shape: AttentionShape) -> Tensor:
        batch, heads = self.dims
        mask = torch.zeros(batch, heads, shape.q_len, shape.k_len, dtype=torch.bool)
        for numbers, plan in self.parts:
            part = self.part_shape(numbers, shape)
            mask[:, list(numbers)] = plan.to_dense_mask(part).cpu()
        return mask.to(self.parts[0][1].device)

    def bias(self, shape: AttentionShape) -> Tensor | None:
        biases = [
            (numbers, plan.bias(self.part_shape(numbers, shape))) for numbers, plan in self.parts
        ]
        if all(bias is None for _, bias in biases):
            return None
        planes = torch.zeros(*self.dims, shape.q_len, shape.k_len)
        for numbers, bias in biases:
            if bias is not None:
                planes = planes.index_add(
                    1,
                    torch.tensor(numbers),
                    bias.expand(planes.shape[0], len(numbers), -1, -1),
                )
        return planes

    def to(self, device: torch.device | str) -> HeadMixPlan:
        return HeadMixPlan(tuple((heads, plan.to(device)) for heads, plan in self.parts))


def _placed(part: Pass, numbers: tuple[int, ...], batch: int, heads: int) -> Pass:
    """A part's pass in the rows of all batch elements and heads; the other rows are empty."""
    r, window = part
    if window is not None:
        own = window.new_zeros(heads)
        own[list(numbers)] = window
        window = own
    row, index = _copies(r, r.row, numbers, batch, heads)
    token_row, token_index = _copies(r, r.token_row, numbers, batch, heads)
    order = torch.argsort(row, stable=True)
    token_order = torch.argsort(token_row, stable=True)
    index, token_index = index[order], token_index[token_order]
    ranges = KeyRanges.of(
        batch,
        heads,
        r.block_q,
        r.tiles,
        row[order],
        r.start[index],
        r.length[index],
        (token_row[token_order], r.token[token_index]),
        None if r.source is None else r.source[index],
        r.bias,
    )
    return Pass(ranges, window)


def _copies(
    r: KeyRanges, row: Tensor, numbers: tuple[int, ...], batch: int, heads: int
) -> tuple[Tensor, Tensor]:
    """New row and old index of each entry, once for every batch element and head it serves."""
    batches = batch if r.batch == 1 else 1  # copies of each entry
    shares = len(numbers) if r.heads == 1 else 1
    count = row.numel()
    index = torch.arange(count, device=row.device).repeat(batches * shares)
    copy = torch.arange(batches * shares, device=row.device).repeat_interleave(count)
    plane, tile = row[index] // r.tiles, row[index] % r.tiles
    b = plane // r.heads if batches == 1 else copy // shares
    place = plane % r.heads if shares == 1 else copy % shares
    head = torch.tensor(numbers, device=row.device)[place]
    return (b * heads + head) * r.tiles + tile, index


def _joined(passes: list[Pass]) -> list[Pass]:
    """Passes of different heads become one; those with windows come last."""
    kept: dict[tuple[int, bool], Pass] = {}
    alone: list[Pass] = []
    for part in passes:
        key = (part.ranges.block_q, part.window is not None)
        if part.ranges.bias is not None:
            alone.append(part)
        elif key in kept:
            other = kept[key]
            window = None
            if part.window is not None and other.window is not None:
                window = part.window + other.window
            kept[key] = Pass(_union(other.ranges, part.ranges), window)
        else:
            kept[key] = part
    return [*sorted(kept.values(), key=lambda part: part.window is not None), *alone]


def _union(a: KeyRanges, b: KeyRanges) -> KeyRanges:
    row, start = torch.cat([a.row, b.row]), torch.cat([a.start, b.start])
    order = sorted_by(row, start, int(start.max()) if start.numel() else 0)
    token_row, token = torch.cat([a.token_row, b.token_row]), torch.cat([a.token, b.token])
    token_order = sorted_by(token_row, token, int(token.max()) if token.numel() else 0)
    return KeyRanges.of(
        a.batch,
        a.heads,
        a.block_q,
        a.tiles,
        row[order],
        start[order],
        torch.cat([a.length, b.length])[order],
        (token_row[token_order], token[token_order]),
    )
