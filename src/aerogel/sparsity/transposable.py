"""Masks that are N:M along the rows and the columns of a tile at once."""

from __future__ import annotations

from functools import cache
from itertools import combinations, product

import torch
from torch import Tensor

# All valid 4x4 tiles fit a table (90 for 2:4); from 5x5 on their number explodes.
_EXACT_LIMIT = 4


def transposable_mask(score: Tensor, n: int) -> Tensor:
    """Mask of square tiles with exactly ``n`` kept in every row and every column.

    Best of all valid masks for sides up to 4; for larger ones greedy by score, then repaired by
    exchanges until every row and column has its count.

    Args:
        score: (tiles, m, m), finite, higher = keep.
        n: kept per row and column, 1 <= n <= m.

    Returns:
        Bool tensor (tiles, m, m).
    """
    side = score.shape[-1]
    score = score.detach().double()
    if side <= _EXACT_LIMIT:
        table = _valid_tiles(side, n).to(score.device)
        totals = score.flatten(1) @ table.flatten(1).t().to(score.dtype)
        return table[totals.argmax(dim=1)]
    mask = _greedy(score, n)
    short = (mask.sum(dim=(1, 2)) < n * side).nonzero().flatten().tolist()
    for tile in short:
        _repair(mask[tile], score[tile], n)
    return mask


@cache
def _valid_tiles(side: int, n: int) -> Tensor:
    """Every 0/1 tile whose rows and columns all sum to ``n``: (tiles, side, side)."""
    rows = []
    for kept in combinations(range(side), n):
        row = torch.zeros(side, dtype=torch.bool)
        row[list(kept)] = True
        rows.append(row)
    tiles = (torch.stack(choice) for choice in product(rows, repeat=side))
    return torch.stack([tile for tile in tiles if bool((tile.sum(dim=0) == n).all())])


def _greedy(score: Tensor, n: int) -> Tensor:
    """Take entries by falling score while their row and column have room; all tiles in step."""
    tiles, side, _ = score.shape
    order = score.flatten(1).sort(dim=1, descending=True, stable=True).indices
    every = torch.arange(tiles, device=score.device)
    row_room = torch.full((tiles, side), n, device=score.device)
    column_room = row_room.clone()
    mask = torch.zeros(score.shape, dtype=torch.bool, device=score.device)
    for position in order.unbind(dim=1):
        row, column = position // side, position % side
        fits = (row_room[every, row] > 0) & (column_room[every, column] > 0)
        mask[every, row, column] = fits
        row_room[every, row] -= fits.long()
        column_room[every, column] -= fits.long()
    return mask


def _repair(mask: Tensor, score: Tensor, n: int) -> None:
    """Fill rows and columns that the greedy pass left short, by the cheapest exchanges, in place.

    A short row r and a short column c gain one entry each by dropping a kept (i, j) and taking
    (r, j) and (i, c); such a pair exists as long as anything is short.
    """
    while bool((mask.sum(dim=1) < n).any()):
        row = int((mask.sum(dim=1) < n).nonzero()[0])
        column = int((mask.sum(dim=0) < n).nonzero()[0])
        if not bool(mask[row, column]):
            mask[row, column] = True
            continue
        gain = score[row][None, :] + score[:, column][:, None] - score
        allowed = mask & ~mask[row][None, :] & ~mask[:, column][:, None]
        best = int(gain.masked_fill(~allowed, -torch.inf).argmax())
        i, j = divmod(best, mask.shape[1])
        mask[i, j] = False
        mask[row, j] = True
        mask[i, column] = True
