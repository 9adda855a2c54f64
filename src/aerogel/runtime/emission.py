"""How operators enter a plan: what a plan under construction knows, what an operator answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from aerogel import kernels
from aerogel.runtime.candidates import Candidate


def is_pooled(shape: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape is one vector per image, spelled as planes."""
    return len(shape) == 4 and shape[2:] == (1, 1)


@dataclass
class Emission:
    """A plan under construction.

    Attributes:
        builder: Of the plan.
        chosen: The candidate of each layer.
        sequences: How many the columns of an image hold.
        values: The plan's values by node.
    """

    builder: kernels.PlanBuilder
    chosen: Mapping[fx.Node, Candidate]
    sequences: int = 1
    values: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NativeOp:
    """How one operator enters a plan.

    Attributes:
        family: (node) -> what the node demands of its segment (`segments`), or None if this call
            cannot be native.
        emit: (emission, node) -> the plan's value.
    """

    family: Callable[[fx.Node], str | None]
    emit: Callable[[Emission, fx.Node], Any]
