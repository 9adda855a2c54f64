"""Every method that a recipe may name reaches what is asked of it within its steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from my_nets import Net
from torch import nn

from aerogel.manifest import load_systems
from aerogel.pruning import (
    METHODS,
    Goal,
    OneShotMethod,
    RewritingMethod,
    SearchMethod,
    TrainingMethod,
)
from aerogel.pruning.shared_methods import SHARED_METHODS

STEPS = 12
GOAL = Goal(
    parameters=("point.weight",),
    sparsity=0.75,
    pattern="unstructured",
    steps=STEPS,
    begin=0.0,
    end=0.6,
    initial_sparsity=0.0,
    updates=3,
    power=3.0,
)


def pruned(method: str, goal: Goal) -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = METHODS[method]
    if isinstance(found, OneShotMethod):
        found.prune(model, [(torch.randn(4, 1, 8, 8),)], goal, lambda *_: None)
        return model
    assert isinstance(found, TrainingMethod)
    pruner = found.build(model, optimizer, goal)
    for _ in range(goal.steps):
        optimizer.zero_grad()
        x, y = torch.randn(4, 1, 8, 8), torch.randint(10, (4,))
        nn.functional.cross_entropy(model(x), y).backward()
        pruner.step()
    pruner.finalize()
    return model


def test_methods_are_systems_of_the_manifest() -> None:
    shared = {method.slug for method in SHARED_METHODS}
    assert set(METHODS) - shared <= {system.slug for system in load_systems()}


CASES = [
    (name, pattern)
    for name, method in METHODS.items()
    # Those that search or rewrite train other networks: test_method_kinds.py.
    if method.unfit(Net()) is None and not isinstance(method, SearchMethod | RewritingMethod)
    for pattern in ("unstructured", "2x1", "4x1", "kernel-group:4")
    if method.prunes_by(pattern)
]


@pytest.mark.parametrize(("method", "pattern"), CASES)
@pytest.mark.parametrize("end", [0.6, 1.0])
def test_a_method_reaches_its_goal(method: str, pattern: str, end: float) -> None:
    model = pruned(method, replace(GOAL, pattern=pattern, end=end))
    assert float((model.point.weight == 0).float().mean()) == pytest.approx(0.75, abs=0.01)
    assert (model.conv.weight != 0).all()
    assert (model.head.weight != 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameters": ("point.weight", "head.weight")}, "not 'head.weight'; exclude it"),
        ({"parameters": ("conv.weight",)}, "1x1 convolutions only, not 'conv.weight'"),
    ],
)
def test_fast_sparse_convnets_refuses_what_it_is_not_for(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pruned("fast-sparse-convnets", replace(GOAL, **change))
