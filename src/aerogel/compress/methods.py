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

    begin, end = _window(goal)
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


def _fast_sparse_convnets(model: nn.Module, optimizer: torch.optim.Optimizer, goal: Goal) -> Any:
    from aerogel.pruning import PointwisePruner
    from aerogel.pruning.fast_sparse_convnets import is_pointwise

    begin, end = _window(goal)
    modules = {name: name.removesuffix(".weight") for name in goal.parameters}
    other = [n for n, module in modules.items() if not is_pointwise(model.get_submodule(module))]
    if other:
        raise ValueError(
            f"method = 'fast-sparse-convnets' prunes 1x1 convolutions only, not {other[0]!r}; "
            "exclude it, or use gradual-pruning"
        )
    if goal.pattern not in _BLOCKS:
        raise ValueError(
            f"pattern = {goal.pattern!r}: fast-sparse-convnets takes {', '.join(_BLOCKS)}"
        )
    return PointwisePruner(
        model,
        optimizer,
        goal.sparsity,
        steps=goal.steps,
        blocks=_BLOCKS[goal.pattern],
        layers=tuple(modules.values()),
        begin=begin / goal.steps,
        end=end / goal.steps,
        frequency=max(1, (end - begin) // goal.updates),
        initial_sparsity=goal.initial_sparsity,
        power=goal.power,
    )


def _window(goal: Goal) -> tuple[int, int]:
    """First and last step of the ramp."""
    begin = min(round(goal.begin * goal.steps), goal.steps - 1)
    return begin, max(round(goal.end * goal.steps) - 1, begin + 1)


_BLOCKS = {"unstructured": 1, "2x1": 2, "4x1": 4}  # pattern -> output channels that share zeros

METHODS: dict[str, Builder] = {
    "gradual-pruning": _gradual_pruning,
    "fast-sparse-convnets": _fast_sparse_convnets,
}


def method_names() -> tuple[str, ...]:
    """Slugs of the methods that `aerogel compress --method` takes."""
    return tuple(METHODS)
