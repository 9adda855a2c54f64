"""Methods that published systems build on, as recipes and the arena run them.

Their code lives in `aerogel.sparsity`: the dynamic trainers RigL and SET, and one-shot magnitude,
Wanda and SparseGPT. They are starting points and baselines of the systems beside this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from aerogel.pruning.method import Goal, OneShotMethod, TrainingMethod, call_with_inputs
from aerogel.sparsity.dynamic import SET, RigL
from aerogel.sparsity.masks import MaskSet
from aerogel.sparsity.oneshot import magnitude_, sparsegpt_, wanda_
from aerogel.sparsity.updates import Allocation

Progress = Callable[[int, int, str], None]

# Mask updates until RigL's end; fewer than in its paper, whose trainings are far longer.
_UPDATES = 30


def dynamic(
    kind: type[RigL], allocation: Allocation = "erk"
) -> Callable[[nn.Module, torch.optim.Optimizer, Goal], RigL]:
    """The `build` of a method that RigL or SET trains, with random first masks.

    Args:
        kind: `RigL` or `SET`.
        allocation: of the density over layers.
    """

    def build(model: nn.Module, optimizer: torch.optim.Optimizer, goal: Goal) -> RigL:
        return kind(
            model,
            optimizer,
            goal.sparsity,
            total_steps=goal.steps,
            allocation=allocation,
            update_every=max(1, goal.steps // (_UPDATES + 10)),
            include=goal.parameters,
            generator=goal.generator,
        )

    return build


def _magnitude(model: nn.Module, batches: Iterable[Any], goal: Goal, progress: Progress) -> MaskSet:
    return magnitude_(model, goal.sparsity, pattern=goal.pattern, include=goal.parameters)


def _calibrated(
    prune: Callable[..., MaskSet],
) -> Callable[[nn.Module, Iterable[Any], Goal, Progress], MaskSet]:
    def run(model: nn.Module, batches: Iterable[Any], goal: Goal, progress: Progress) -> MaskSet:
        return prune(
            model,
            batches,
            goal.sparsity,
            goal.pattern,
            include=goal.parameters,
            forward=call_with_inputs,
            on_progress=progress,
        )

    return run


SHARED_METHODS = (
    TrainingMethod(slug="rigl", build=dynamic(RigL), patterns=("unstructured",), starts="fresh"),
    TrainingMethod(slug="set", build=dynamic(SET), patterns=("unstructured",), starts="fresh"),
    OneShotMethod(slug="magnitude", prune=_magnitude, needs_data=False),
    OneShotMethod(slug="wanda", prune=_calibrated(wanda_)),
    OneShotMethod(
        slug="sparsegpt", prune=_calibrated(sparsegpt_), patterns=("unstructured", "n:m")
    ),
)
