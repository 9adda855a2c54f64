"""Sequences that teach or test recall: text, repeated symbols, text that repeats itself.

A language model copies from far back only if it has seen that this pays. Symbols drawn at random
can be foretold from nothing but their first occurrence; a passage that returns at the end of a text
tells how much of that a model has kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FIRST_SYMBOL, LAST_SYMBOL = 33, 126  # printable ASCII without the space


class Weighted(NamedTuple):
    """Sequences, and how much each of their tokens counts as a target.

    Attributes:
        ids: (sequences, length) int64.
        weights: (sequences, length) float32; that of the first token is never used.
    """

    ids: Tensor
    weights: Tensor


def draw_windows(
    text: Tensor, count: int, length: int, generator: torch.Generator | None = None
) -> Tensor:
    """Windows at random places of a text.

    Args:
        text: (n,) integers: bytes or token ids.
        count: windows.
        length: tokens of each.
        generator: default torch's own.

    Returns:
        (count, length) int64.

    Raises:
        ValueError: the text is shorter than a window.
    """
    if len(text) < length:
        raise ValueError(f"text has {len(text)} tokens, expected at least length={length}")
    starts = torch.randint(len(text) - length + 1, (count, 1), generator=generator)
    return text[starts + torch.arange(length)].long()


def repeat_symbols(
    count: int, length: int, period: tuple[int, int], generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Random printable symbols that repeat with a random period.

    Args:
        count: sequences.
        length: tokens of each.
        period: smallest and largest, both included.
        generator: default torch's own.

    Returns:
        (count, length) int64 bytes, and (count, length) bool: true from the second period on.
    """
    _check_range("period", period, length)
    span = torch.randint(period[0], period[1] + 1, (count, 1), generator=generator)
    drawn = torch.randint(FIRST_SYMBOL, LAST_SYMBOL + 1, (count, period[1]), generator=generator)
    place = torch.arange(length).expand(count, -1)
    return drawn.gather(1, place % span), place >= span


def repeat_passage(
    ids: Tensor, passage: tuple[int, int], generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Sequences whose last tokens are replaced by an earlier passage of their own.

    The passage begins anywhere as long as it ends before its repetition begins.

    Args:
        ids: (count, length) tokens.
        passage: smallest and largest number of its tokens, both included.
        generator: default torch's own.

    Returns:
        (count, length) tokens, and (count, length) bool: true in the repetition.
    """
    count, length = ids.shape
    _check_range("passage", passage, length // 2)
    size = torch.randint(passage[0], passage[1] + 1, (count, 1), generator=generator)
    room = length - 2 * size + 1
    start = (torch.rand((count, 1), generator=generator) * room).long().clamp(max=room - 1)
    place = torch.arange(length).expand(count, -1)
    repeated = place >= length - size
    source = torch.where(repeated, place - (length - size) + start, place)
    return ids.gather(1, source), repeated


def weigh(ids: Tensor, special: Tensor | None, inside: float, outside: float) -> Weighted:
    """Sequences whose tokens count `inside` where `special` is true and `outside` elsewhere."""
    if special is None:
        return Weighted(ids, torch.full(ids.shape, outside))
    return Weighted(ids, torch.where(special, inside, outside))


def joined(parts: list[Weighted]) -> Weighted:
    """One batch of several; all have the same length."""
    return Weighted(torch.cat([p.ids for p in parts]), torch.cat([p.weights for p in parts]))


def _check_range(name: str, given: tuple[int, int], largest: int) -> None:
    if not 1 <= given[0] <= given[1] <= largest:
        raise ValueError(f"{name}={given}: expected two sizes, ascending, from 1 to {largest}")
