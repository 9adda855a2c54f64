"""How well a recommender ranks: over all items, with the training items taken out.

Both measures take whole score matrices, never samples of negatives, and average over the users who
have at least one item to find.
"""

from __future__ import annotations

import torch
from torch import Tensor


def recall_at_k(
    scores: Tensor, relevant: Tensor, k: int = 20, exclude: Tensor | None = None
) -> float:
    """Share of a user's items that are among the k best, mean over users.

    Args:
        scores: (users, items), higher = better.
        relevant: (users, items) bool, the items to find.
        k: length of the list, in [1, items].
        exclude: (users, items) bool, items that may not be listed (those trained on).

    Raises:
        ValueError: shapes that differ, k out of range, nan scores, nothing relevant, or relevant
            items that are excluded.
    """
    hits, found = _hits(scores, relevant, k, exclude)
    return float((hits.sum(1) / found).mean())


def ndcg_at_k(
    scores: Tensor, relevant: Tensor, k: int = 20, exclude: Tensor | None = None
) -> float:
    """Normalised discounted cumulative gain of the k best, mean over users.

    A hit at place i (from 1) gains 1 / log2(i + 1); the ideal list has min(k, relevant) hits first.
    Arguments and errors as `recall_at_k`.
    """
    hits, found = _hits(scores, relevant, k, exclude)
    discount = torch.arange(2, k + 2, dtype=torch.float64, device=hits.device).log2().reciprocal()
    ideal = discount.cumsum(0)[found.clamp(max=k).long() - 1]
    return float(((hits * discount).sum(1) / ideal).mean())


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's correlation of two (n,) tensors; equal values share their mean rank.

    Raises:
        ValueError: not two vectors of one length of at least 2.
    """
    if a.dim() != 1 or a.shape != b.shape or len(a) < 2:
        raise ValueError(
            f"a and b must be vectors of one length, at least 2; got {tuple(a.shape)} "
            f"and {tuple(b.shape)}"
        )
    return float(torch.corrcoef(torch.stack((_ranks(a), _ranks(b))))[0, 1])


def _ranks(values: Tensor) -> Tensor:
    _, group, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1.0) / 2.0)[group]


def _hits(
    scores: Tensor, relevant: Tensor, k: int, exclude: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Per user with anything relevant: (users, k) hits in order, and the relevant items' number."""
    _check(scores, relevant, k, exclude)
    if exclude is not None:
        scores = scores.masked_fill(exclude, -torch.inf)
    some = relevant.any(1)
    scores, relevant = scores[some], relevant[some]
    order = scores.topk(k, dim=1).indices
    return relevant.gather(1, order).double(), relevant.sum(1).double()


def _check(scores: Tensor, relevant: Tensor, k: int, exclude: Tensor | None) -> None:
    for name, mask in (("relevant", relevant), ("exclude", exclude)):
        if mask is not None and (mask.shape != scores.shape or mask.dtype != torch.bool):
            raise ValueError(
                f"{name} must be bool of shape {tuple(scores.shape)}, got {mask.dtype} of "
                f"{tuple(mask.shape)}"
            )
    if scores.dim() != 2:
        raise ValueError(f"scores must be (users, items), got {tuple(scores.shape)}")
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(f"k must be in [1, {scores.shape[1]}], got {k}")
    if bool(scores.isnan().any()):
        raise ValueError("scores has nan entries")
    if not bool(relevant.any()):
        raise ValueError("relevant has no item for any user")
    if exclude is not None and bool((relevant & exclude).any()):
        both = int((relevant & exclude).sum())
        raise ValueError(f"relevant and exclude share {both} entries: test items were trained on")
