"""Which pruning methods a recipe may name, and how each is set up for a training phase.

The manifest says which systems exist; one appears here when it can run inside training: its builder
returns an object with `step` (in place of the optimizer's), `finalize` and a state to resume from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Goal:
    """What a method is to reach within one training phase.

    Attributes:
        parameters: Names of the weights to prune.
        sparsity: Fraction of zeros at the end, in [0, 1).
        pattern: Which weights become zero together.
        steps: Optimizer steps of the phase.
        begin, end: Where the zeros begin to come and where they are all there, as fractions of it.
        initial_sparsity: Fraction of zeros at `begin`.
        updates: How many times the mask is computed anew between them.
        power: Exponent of the ramp.
    """

    parameters: tuple[str, ...]
    sparsity: float
    pattern: str
    steps: int
    begin: float
    end: float
    initial_sparsity: float
    updates: int
    power: float


Builder = Callable[["nn.Module", "torch.optim.Optimizer", Goal], Any]


def _gradual_pruning(model: nn.Module, optimizer: torch.optim.Optimizer, goal: Goal) -> Any:
    from aerogel.pruning import GradualPruner

    begin = min(round(goal.begin * goal.steps), goal.steps - 1)
    end = max(round(goal.end * goal.steps) - 1, begin + 1)
    return GradualPruner(
        model,
        optimizer,
        goal.sparsity,
        initial_sparsity=goal.initial_sparsity,
        begin_step=begin,
        end_step=end,
        frequency=max(1, (end - begin) // goal.updates),
        power=goal.power,
        pattern=goal.pattern,
        include=goal.parameters,
    )


METHODS: dict[str, Builder] = {"gradual-pruning": _gradual_pruning}


def method_names() -> tuple[str, ...]:
    """Slugs of the methods that `aerogel compress --method` takes."""
    return tuple(METHODS)
