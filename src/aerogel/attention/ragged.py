"""Vectorised arithmetic on ragged rows, the common grammar of all sparse plans.

A ragged array is a flat array plus ``ptr`` (rows + 1,) int64: row r is ``flat[ptr[r]:ptr[r + 1]]``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pointers(counts: Tensor) -> Tensor:
    """``ptr`` of rows with these lengths: (rows,) int64 -> (rows + 1,) int64."""
    ptr = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts.flatten(), 0, out=ptr[1:])
    return ptr


def row_numbers(ptr: Tensor) -> Tensor:
    """The row of every entry: (entries,) int64."""
    return torch.repeat_interleave(ptr.diff())


def within(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For rows of these lengths, every entry's row and its number in that row."""
    row = torch.repeat_interleave(counts)
    number = torch.arange(row.numel(), device=counts.device)
    return row, number - pointers(counts)[:-1][row]


def count_rows(row: Tensor, rows: int) -> Tensor:
    """Entries of each row: (rows,) int64."""
    return torch.bincount(row, minlength=rows)


def merge_ranges(
    row: Tensor, start: Tensor, end: Tensor, limit: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Unites ranges of a row that touch or overlap.

    Args:
        row: (n,) int64, sorted by (row, start).
        start: (n,) int64, first entry.
        end: (n,) int64, past the last entry; ``end > start``.
        limit: no range ends after it.

    Returns:
        row, start, end of the united ranges, sorted and disjoint.
    """
    if row.numel() == 0:
        return row, start, end
    span = limit + 2
    reach = torch.cummax(row * span + end, 0).values
    first = torch.ones_like(row, dtype=torch.bool)
    first[1:] = (row * span + start)[1:] > reach[:-1]
    heads = first.nonzero().flatten()
    last = torch.cat([heads[1:] - 1, heads.new_tensor([row.numel() - 1])])
    return row[heads], start[heads], reach[last] - row[heads] * span


def sorted_by(row: Tensor, key: Tensor, limit: int) -> Tensor:
    """The order of entries by (row, key), where ``0 <= key <= limit``."""
    return torch.argsort(row * (limit + 1) + key, stable=True)
