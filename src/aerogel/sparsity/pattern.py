"""What every pattern can do, and the shape check they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

Pool = Literal["l2", "avg", "max", "sum"]


class Pattern:
    """What every pattern can do; a mask is bool, ``True`` = kept."""

    @property
    def spec(self) -> str:
        """The string that `parse_pattern` turns back into this pattern."""
        raise NotImplementedError

    @property
    def fixed_density(self) -> float | None:
        """The density the pattern prescribes, or ``None`` if the caller chooses it."""
        return None

    def validate(self, shape: Sequence[int], name: str = "weight") -> None:
        """Raise ``ValueError`` naming the tensor if the pattern cannot be laid over ``shape``."""

    def groups(self, score: Tensor) -> Tensor:
        """The score as (groups, size), one row per group; padding, if any, is ``-inf``."""
        raise NotImplementedError

    def expand(self, group_mask: Tensor, shape: Sequence[int]) -> Tensor:
        """The mask of ``shape`` from a mask of the groups: (groups,) or (groups, size)."""
        raise NotImplementedError

    def is_satisfied(self, mask: Tensor, exact: bool = False) -> bool:
        """Whether a mask obeys the pattern.

        Args:
            mask: bool, of the weight's shape.
            exact: for group patterns, demand the full count in every group, not at most that many.
        """
        raise NotImplementedError

    def __str__(self) -> str:
        return self.spec


def need_dims(pattern: Pattern, shape: Sequence[int], name: str) -> None:
    if len(shape) < 2:
        raise ValueError(f"{pattern.spec} needs (out, in, ...), {name!r} has shape {tuple(shape)}")
