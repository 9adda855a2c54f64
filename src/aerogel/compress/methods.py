"""Which pruning methods a recipe may name, and how each is set up for a training phase.

The manifest says which systems exist; one appears here when it can run inside training: its builder
returns an object with `step` (in place of the optimizer's), `finalize` and a state to resume from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from aerogel.compress.selection import pruned_parameters

if TYPE_CHECKING:
    import torch
    from torch import nn

    from aerogel.compress.recipe import Recipe

Builder = Callable[["nn.Module", "torch.optim.Optimizer", "Recipe", int], Any]


def _gradual_pruning(
    model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int
) -> Any:
    from aerogel.pruning import GradualPruner

    ramp = recipe.schedule
    begin = min(round(ramp.begin * steps), steps - 1)
    end = max(round(ramp.end * steps) - 1, begin + 1)
    return GradualPruner(
        model,
        optimizer,
        recipe.sparsity,
        initial_sparsity=ramp.initial_sparsity,
        begin_step=begin,
        end_step=end,
        frequency=max(1, (end - begin) // ramp.updates),
        power=ramp.power,
        pattern=recipe.pattern,
        include=pruned_parameters(model, recipe.pattern, recipe.include, recipe.exclude),
    )


METHODS: dict[str, Builder] = {"gradual-pruning": _gradual_pruning}


def method_names() -> tuple[str, ...]:
    """Slugs of the methods that `aerogel compress --method` takes."""
    return tuple(METHODS)
