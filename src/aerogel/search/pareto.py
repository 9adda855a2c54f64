"""The Pareto front: what nothing else beats in every respect."""

from __future__ import annotations

from collections.abc import Sequence


def pareto_front(points: Sequence[Sequence[float]], tolerance: float = 1e-9) -> list[int]:
    """Numbers of the points that no other point dominates; smaller is better.

    Args:
        points: objectives of each point, all of one length.
        tolerance: relative difference below which two values count as equal; of equal points the
            first stays.

    Returns:
        Numbers, ascending.
    """
    kept = []
    for i, p in enumerate(points):
        beaten = any(
            _at_most(q, p, tolerance) and (not _at_most(p, q, tolerance) or j < i)
            for j, q in enumerate(points)
            if j != i
        )
        if not beaten:
            kept.append(i)
    return kept


def _at_most(a: Sequence[float], b: Sequence[float], tolerance: float) -> bool:
    return all(x <= y + tolerance * max(1.0, abs(y)) for x, y in zip(a, b, strict=True))
