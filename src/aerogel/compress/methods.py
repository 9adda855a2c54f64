"""Which pruning methods a recipe may name, and how each is set up for a training phase.

The manifest says which systems exist; a method appears here when it can run inside training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from aerogel.compress.recipe import Recipe

Builder = Callable[[nn.Module, torch.optim.Optimizer, Recipe, int], Any]


def _gradual_pruning(
    model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int
) -> Any:
    from aerogel.pruning import GradualPruner
    from aerogel.sparsity import parse_pattern

    ramp = recipe.schedule
    begin, end = round(ramp.begin * steps), round(ramp.end * steps)
    frequency = max(1, (end - begin) // ramp.updates)
    include = tuple(recipe.include) or tuple(name for name, _ in prunable(model))
    return GradualPruner(
        model,
        optimizer,
        recipe.sparsity,
        initial_sparsity=ramp.initial_sparsity,
        begin_step=begin,
        end_step=max(end, begin + frequency),
        frequency=frequency,
        power=ramp.power,
        pattern=parse_pattern(recipe.pattern),
        include=include,
        exclude=tuple(recipe.exclude),
    )


METHODS: dict[str, Builder] = {"gradual-pruning": _gradual_pruning}


def method_names() -> tuple[str, ...]:
    """Slugs of the methods that `aerogel compress --method` takes."""
    return tuple(METHODS)


def prunable(model: nn.Module) -> list[tuple[str, str]]:
    """(layer name, kind) of what the model itself proposes to prune; empty: every weight."""
    targets = getattr(model, "prune_targets", None)
    return list(targets()) if callable(targets) else []
