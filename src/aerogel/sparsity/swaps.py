"""Swapping kept for pruned weights, row by row, until each row's expected error is small (P8).

`swap_until_small` runs cycles of at most one swap a row, all rows at once. What a swap may be is
said by an object with `offer`, `accept` and `mask`: `RowSwaps` (any kept weight of the row for any
pruned one) or `GroupSwaps` (N:M: within a group). The number of kept weights of a row, or a group,
never changes.

Reference: Zhang et al., DSnoT, arXiv 2310.08915.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LayerRefinement:
    """What the swaps did to one layer.

    Attributes:
        error_before: mean over rows of abs(expected output error) with the starting mask.
        error_after: the same with the refined mask.
        swaps: weights grown (as many were pruned).
        cycles: cycles in which some row still moved.
    """

    error_before: float
    error_after: float
    swaps: int
    cycles: int


def swap_until_small(
    swaps: RowSwaps | GroupSwaps,
    error: Tensor,
    *,
    threshold: float,
    max_cycles: int,
    keep_sign: bool,
) -> LayerRefinement:
    """Make one swap a cycle in every row that is still active.

    A row ends when its error is at most the threshold, when it has no swap left, or, with
    ``keep_sign``, before its error would change sign. With ``keep_sign`` a row that came out worse
    than it began (the partner in an N:M group may have either sign) gets its starting mask back.

    Args:
        swaps: offers the next swap of each row; holds the refined mask afterwards.
        error: (rows,) signed expected error of the starting mask.
        threshold: what counts as small.
        max_cycles: swaps in a row at most.
        keep_sign: whether errors may only come down to zero from the side they are on.
    """
    before, initial = error.abs(), error.sign()
    active = before > threshold
    moved = torch.zeros_like(error, dtype=torch.int64)
    cycles = 0
    while cycles < max_cycles and bool(active.any()):
        above = error > 0
        change, found = swaps.offer(above)
        after = error + change
        accepted = active & found & (error.abs() > threshold)
        if keep_sign:
            accepted &= after * initial >= 0
        if not bool(accepted.any()):
            break
        swaps.accept(accepted, above)
        error = torch.where(accepted, after, error)
        moved += accepted
        active = accepted  # a row that was refused once has ended
        cycles += 1
    if keep_sign:
        worse = error.abs() > before
        swaps.restore(worse)
        error = torch.where(worse, before, error)
        moved[worse] = 0
    return LayerRefinement(
        float(before.mean()), float(error.abs().mean()), int(moved.sum()), cycles
    )


class RowSwaps:
    """Unstructured: queues of candidates, sorted once, from which rows take in lockstep.

    An error above zero is brought down by growing a weight with c > 0 (largest benefit first) and
    pruning one with c < 0 (smallest Wanda score first), and the other way round below zero. Each of
    the two directions has its own pair of queues, whose members cannot meet again: what was grown
    had been pruned at the start, and the reverse. So a row only needs to count how far it went.

    Args:
        kept: (rows, columns) bool, the starting mask; changed in place.
        loss: what the row's output loses on average without the weight (c = w * mu), signed.
        benefit: signed rank for growing, of the sign of ``loss``.
        wanda: score of the kept weights; the smallest go first.
        max_cycles: swaps in a row at most.
    """

    def __init__(
        self, kept: Tensor, loss: Tensor, benefit: Tensor, wanda: Tensor, max_cycles: int
    ) -> None:
        self.kept = kept
        gains, losses = loss > 0, loss < 0
        grown = [
            _queue(-benefit, ~kept & gains, max_cycles),
            _queue(benefit, ~kept & losses, max_cycles),
        ]
        pruned = [
            _queue(wanda, kept & losses, max_cycles),
            _queue(wanda, kept & gains, max_cycles),
        ]
        # [2, rows, cycles]: direction 0 lowers the error, direction 1 raises it.
        self.grown = torch.stack([order for order, _ in grown])
        self.pruned = torch.stack([order for order, _ in pruned])
        self.length = torch.stack(
            [torch.minimum(g, p) for (_, g), (_, p) in zip(grown, pruned, strict=True)]
        )
        wide = loss.expand(2, *loss.shape)
        self.change = wide.gather(2, self.pruned) - wide.gather(2, self.grown)
        self.taken = torch.zeros_like(self.length)
        self.rows = torch.arange(len(kept), device=kept.device)

    def offer(self, above: Tensor) -> tuple[Tensor, Tensor]:
        """The next swap of each row, whose error is above zero or not.

        Returns:
            (rows,) change of its error, and whether it has a swap to make.
        """
        way = (~above).long()
        taken = self.taken[way, self.rows]
        found = taken < self.length[way, self.rows]
        place = taken.clamp_max(max(0, self.change.shape[2] - 1))
        return self.change[way, self.rows, place], found

    def accept(self, accepted: Tensor, above: Tensor) -> None:
        """Make the swaps just offered in the rows that accept them."""
        way = (~above).long()
        self.taken[way, self.rows] += accepted.long()

    def restore(self, rows: Tensor) -> None:
        """Undo all swaps of these rows (bool)."""
        self.taken[:, rows] = 0

    def mask(self) -> Tensor:
        """The refined mask."""
        steps = torch.arange(self.change.shape[2], device=self.kept.device)
        for way in range(2):
            done = steps < self.taken[way][:, None]
            for order, value in ((self.grown[way], True), (self.pruned[way], False)):
                row, step = done.nonzero(as_tuple=True)
                self.kept[row, order[row, step]] = value
        return self.kept


class GroupSwaps:
    """N:M: a grown weight takes the place of the least wanted kept one in its own group.

    Args:
        kept: (rows, columns) bool, the starting mask; changed in place.
        loss: as in `RowSwaps`.
        benefit: as in `RowSwaps`.
        ranking: score of the starting mask, higher = keep.
        size: length of a group.
        max_cycles: swaps in a row at most.
    """

    def __init__(
        self,
        kept: Tensor,
        loss: Tensor,
        benefit: Tensor,
        ranking: Tensor,
        size: int,
        max_cycles: int,
    ) -> None:
        self.kept, self.loss, self.size = kept, loss, size
        self.start = kept.clone()
        grown = [
            _queue(-benefit, ~kept & (loss > 0), max_cycles),
            _queue(benefit, ~kept & (loss < 0), max_cycles),
        ]
        self.grown = torch.stack([order for order, _ in grown])
        self.length = torch.stack([length for _, length in grown])
        self.taken = torch.zeros_like(self.length)
        # Scores of the kept weights that were not grown here, inf elsewhere: [rows, groups, m].
        self.ranking = ranking.masked_fill(~kept, torch.inf)
        short = -kept.shape[1] % size  # a padded pattern's last group may be short
        self.ranking = F.pad(self.ranking, (0, short), value=torch.inf)
        self.ranking = self.ranking.unflatten(1, (-1, size))
        self.rows = torch.arange(len(kept), device=kept.device)
        self._grow = self._prune = self.rows

    def offer(self, above: Tensor) -> tuple[Tensor, Tensor]:
        """As `RowSwaps.offer`."""
        way = (~above).long()
        taken = self.taken[way, self.rows]
        found = taken < self.length[way, self.rows]
        self._grow = self.grown[way, self.rows, taken.clamp_max(self.grown.shape[2] - 1)]
        group = self._grow // self.size
        least = self.ranking[self.rows, group].min(dim=1)
        self._prune = group * self.size + least.indices
        # A group whose kept weights have all been replaced has none to give.
        found &= ~least.values.isinf()
        partner = self._prune.clamp_max(self.loss.shape[1] - 1)
        return self.loss[self.rows, partner] - self.loss[self.rows, self._grow], found

    def accept(self, accepted: Tensor, above: Tensor) -> None:
        """Make the swaps just offered in the rows that accept them."""
        way = (~above).long()
        self.taken[way, self.rows] += accepted.long()
        row, grow, prune = self.rows[accepted], self._grow[accepted], self._prune[accepted]
        self.kept[row, grow] = True
        self.kept[row, prune] = False
        self.ranking[row, prune // self.size, prune % self.size] = torch.inf

    def restore(self, rows: Tensor) -> None:
        """Undo all swaps of these rows (bool)."""
        self.kept[rows] = self.start[rows]

    def mask(self) -> Tensor:
        """The refined mask."""
        return self.kept


def _queue(key: Tensor, member: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Columns of each row's members by ascending key, ties to the lowest column.

    Args:
        key: (rows, columns).
        member: bool, same shape.
        longest: entries wanted at most.

    Returns:
        (rows, min(longest, columns)) columns, and (rows,) how many of them are members.
    """
    length = min(longest, key.shape[1])
    order = key.masked_fill(~member, torch.inf).argsort(dim=1, stable=True)[:, :length]
    return order.clone(), member.sum(1).clamp_max(length)
