"""Which rows should be neighbours: the order of a layer's rows that a group pattern loses least by.

A pattern that removes units of several rows at once (`KernelGroup`, `Block`) keeps the more, the
more alike the rows of a block are. The rows are dealt to blocks so that the kept energy, the sum of
the squared weights that survive, becomes large: first greedily, block by block, then by exchanging
pairs of rows as long as that helps.

Several layers may share one order (those that add into the same channels); their kept energies are
summed.

Reference: Xu et al., SparseByteNN, arXiv 2310.19509 (whole-network rearrangement).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aerogel.kernels import kth_largest

DEFAULT_TRIALS = 2000
DEFAULT_PATIENCE = 200

# An exchange that raises the kept energy by less than this share is rounding noise.
_LEAST_GAIN = 1e-12


@dataclass(frozen=True)
class BlockedRows:
    """The rows of one layer that may trade places, and the blocks their places lie in.

    Args:
        energy: (rows, units), float64: sum of squares of each row's part of a unit.
        blocks: (rows,), int64: block of each place.
        fixed: (blocks, units), float64: energy of rows that stay, by the block they lie in.
        keep: units kept, of the whole layer or, if balanced, of each block.
        balanced: every block keeps the same number of units.
    """

    energy: Tensor
    blocks: Tensor
    fixed: Tensor
    keep: int
    balanced: bool = False

    def sums(self, order: Tensor) -> Tensor:
        """Energy of every unit, (blocks, units), with row ``order[i]`` at place i."""
        return self.fixed.index_add(0, self.blocks, self.energy[order])

    def thresholds(self, sums: Tensor) -> Tensor:
        """Energy of the last kept unit, (blocks, 1)."""
        if self.balanced:
            return sums.kthvalue(sums.shape[1] - self.keep + 1, dim=1, keepdim=True).values
        return kth_largest(sums, self.keep).expand(sums.shape[0], 1)

    def kept(self, sums: Tensor) -> float:
        """Energy of the units that are kept."""
        thresholds = self.thresholds(sums)
        surplus = (sums - thresholds).clamp_min(0.0).sum()
        counted = thresholds.sum() if self.balanced else thresholds[0, 0]
        return float(surplus + self.keep * counted)


def kept_energy(layers: Sequence[BlockedRows], order: Tensor) -> float:
    """Energy that all layers together keep with row ``order[i]`` at place i."""
    return sum(layer.kept(layer.sums(order)) for layer in layers)


def order_rows(
    layers: Sequence[BlockedRows],
    *,
    trials: int = DEFAULT_TRIALS,
    patience: int = DEFAULT_PATIENCE,
    generator: torch.Generator | None = None,
) -> Tensor:
    """An order of the rows that keeps much energy, and never less than the order they have.

    Args:
        layers: all with the same number of rows.
        trials: exchanges tried at most.
        patience: exchanges in a row without gain after which no more are tried.
        generator: draws the pairs; seeded 0 by default.

    Returns:
        int64 (rows,): place i takes row ``order[i]``.
    """
    rows = layers[0].energy.shape[0]
    order = torch.arange(rows)
    places = _places(layers)
    if len(places) <= 1:
        return order
    starts = [order, _greedy(layers, places, _share_kept), _greedy(layers, places, _cosine)]
    order = max(starts, key=lambda start: kept_energy(layers, start))
    generator = generator or torch.Generator().manual_seed(0)
    return _exchange(layers, order, trials, patience, generator)


def _places(layers: Sequence[BlockedRows]) -> list[Tensor]:
    """Places that lie together in every layer, the largest sets first."""
    _, group = torch.stack([layer.blocks for layer in layers], dim=1).unique(
        dim=0, return_inverse=True
    )
    sets = [(group == i).nonzero().flatten() for i in range(int(group.max()) + 1)]
    return sorted(sets, key=lambda places: -len(places))


# (candidates, block so far, layers, rows in a full block) -> how much each candidate belongs to it
_Likeness = Callable[[Tensor, Tensor, "Sequence[_Columns]", float], Tensor]


@dataclass(frozen=True)
class _Columns:
    """A layer's units among those of all layers, and the energy that a full block's must exceed."""

    start: int
    stop: int
    bar: float


def _greedy(layers: Sequence[BlockedRows], places: list[Tensor], likeness: _Likeness) -> Tensor:
    """Block by block: the largest row left joins an empty one, then those that belong most."""
    pool = torch.cat([layer.energy for layer in layers], dim=1).float()
    left = torch.arange(pool.shape[0])
    columns = _columns(layers, left)
    order = torch.empty_like(left)
    for spots in places:
        block = torch.cat([layer.fixed[layer.blocks[spots[0]]] for layer in layers]).float()
        chosen: list[int] = []
        for size in range(len(spots)):
            share = (size + 1) / len(spots)
            alone = not bool(block.any())
            score = pool.sum(dim=1) if alone else likeness(pool, block, columns, share)
            score[chosen] = -torch.inf
            chosen.append(int(score.argmax()))
            block = block + pool[chosen[-1]]
        order[spots] = left[chosen]
        rest = torch.ones(len(left), dtype=torch.bool)
        rest[chosen] = False
        pool, left = pool[rest], left[rest]
    return order


def _columns(layers: Sequence[BlockedRows], order: Tensor) -> list[_Columns]:
    found, start = [], 0
    for layer in layers:
        stop = start + layer.energy.shape[1]
        bar = float(layer.thresholds(layer.sums(order)).mean())
        found.append(_Columns(start, stop, bar))
        start = stop
    return found


def _share_kept(pool: Tensor, block: Tensor, columns: Sequence[_Columns], share: float) -> Tensor:
    """What each row adds to the energy above the bar, as a share of its own energy."""
    bar = torch.cat([torch.full((c.stop - c.start,), c.bar * share) for c in columns])
    above = block - bar
    gains = (pool + above).clamp_min_(0.0).sum(dim=1) - above.clamp_min(0.0).sum()
    return gains / pool.sum(dim=1).clamp_min(torch.finfo(pool.dtype).tiny)


def _cosine(pool: Tensor, block: Tensor, columns: Sequence[_Columns], share: float) -> Tensor:
    """Likeness of the magnitudes, whatever their size."""
    norms = pool.sum(dim=1).clamp_min(torch.finfo(pool.dtype).tiny).sqrt()
    return (pool.sqrt() @ block.sqrt()) / norms


def _exchange(
    layers: Sequence[BlockedRows],
    order: Tensor,
    trials: int,
    patience: int,
    generator: torch.Generator,
) -> Tensor:
    """Pairs of rows, drawn at random, trade places where that raises the kept energy."""
    states = [_State(layer, order) for layer in layers]
    order, idle = order.clone(), 0
    for i, j in torch.randint(len(order), (trials, 2), generator=generator).tolist():
        if idle >= patience:
            break
        idle += 1
        rows = (int(order[i]), int(order[j]))
        swaps = [state.swap(i, j, rows) for state in states]
        # The bound costs two blocks, the truth may cost the whole layer.
        least = _LEAST_GAIN * sum(state.kept for state in states)
        if sum(swap.bound for swap in swaps) <= least:
            continue
        gains = [state.gain(swap) for state, swap in zip(states, swaps, strict=True)]
        if sum(gains) <= least:
            continue
        for state, swap, gain in zip(states, swaps, gains, strict=True):
            state.take(swap, gain)
        order[i], order[j] = rows[1], rows[0]
        idle = 0
    return order


@dataclass
class _Swap:
    """Two blocks of a layer after an exchange; ``bound`` is the most that it can gain."""

    blocks: Tensor
    sums: Tensor
    bound: float


class _State:
    """A layer's blocks under the order so far.

    For any threshold t, the ``keep`` best units hold at most sum(max(unit - t, 0)) + keep * t, and
    exactly that at the last kept unit. With the thresholds of before the exchange this bounds what
    can be kept after it.
    """

    def __init__(self, layer: BlockedRows, order: Tensor) -> None:
        self.layer = layer
        self.sums = layer.sums(order)
        self.thresholds = layer.thresholds(self.sums)
        self.surplus = self._surplus(self.sums, self.thresholds)
        self.kept = layer.kept(self.sums)

    def swap(self, i: int, j: int, rows: tuple[int, int]) -> _Swap:
        """The exchange of the rows at places i and j."""
        blocks = self.layer.blocks[[i, j]]
        if blocks[0] == blocks[1]:
            return _Swap(blocks[:0], self.sums[:0], 0.0)
        change = self.layer.energy[rows[1]] - self.layer.energy[rows[0]]
        sums = self.sums[blocks] + torch.stack([change, -change])
        surplus = self._surplus(sums, self.thresholds[blocks])
        return _Swap(blocks, sums, float((surplus - self.surplus[blocks]).sum()))

    def gain(self, swap: _Swap) -> float:
        """What an exchange gains exactly."""
        if len(swap.blocks) == 0:
            return 0.0
        if self.layer.balanced:  # blocks do not compete
            return self.layer.kept(swap.sums) - self.layer.kept(self.sums[swap.blocks])
        changed = self.sums.clone()
        changed[swap.blocks] = swap.sums
        return self.layer.kept(changed) - self.kept

    def take(self, swap: _Swap, gain: float) -> None:
        """Make an exchange."""
        if len(swap.blocks) == 0:
            return
        self.sums[swap.blocks] = swap.sums
        self.kept += gain
        if self.layer.balanced:
            self.thresholds[swap.blocks] = self.layer.thresholds(swap.sums)
            self.surplus[swap.blocks] = self._surplus(swap.sums, self.thresholds[swap.blocks])
        else:
            self.thresholds = self.layer.thresholds(self.sums)
            self.surplus = self._surplus(self.sums, self.thresholds)

    @staticmethod
    def _surplus(sums: Tensor, thresholds: Tensor) -> Tensor:
        return (sums - thresholds).clamp_min_(0.0).sum(dim=1)
