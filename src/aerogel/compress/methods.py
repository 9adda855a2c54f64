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


@dataclass(frozen=True)
class Method:
    """A pruning method inside training.

    Attributes:
        build: Makes the pruner of one phase from the model and its optimizer.
        patterns: Kinds of pattern it prunes by (what stands before the first colon); all if empty.
        pattern: What it takes where the recipe chooses none.
        proposes: Names of the weights to prune where neither the recipe nor the model says.
        prepare: Changes the network, and the dense one it learns from alike, before training.
    """

    build: Callable[[nn.Module, torch.optim.Optimizer, Goal], Any]
    patterns: tuple[str, ...] = ()
    pattern: str | None = None
    proposes: Callable[[nn.Module], tuple[str, ...]] = lambda model: ()
    prepare: Callable[[nn.Module, nn.Module, Any, Goal], None] | None = None


def _gradual_pruning(model: nn.Module, optimizer: torch.optim.Optimizer, goal: Goal) -> Any:
    from aerogel.pruning import GradualPruner

    begin, end, frequency = _window(goal)
    return GradualPruner(
        model,
        optimizer,
        goal.sparsity,
        initial_sparsity=goal.initial_sparsity,
        begin_step=begin,
        end_step=end,
        frequency=frequency,
        power=goal.power,
        pattern=goal.pattern,
        include=goal.parameters,
    )


def _window(goal: Goal) -> tuple[int, int, int]:
    """First and last step of the ramp, and the steps from one new mask to the next."""
    begin = min(round(goal.begin * goal.steps), goal.steps - 1)
    end = max(round(goal.end * goal.steps) - 1, begin + 1)
    return begin, end, max(1, (end - begin) // goal.updates)


def _sparsebytenn(model: nn.Module, optimizer: torch.optim.Optimizer, goal: Goal) -> Any:
    from aerogel.pruning import GroupKernelPruner
    from aerogel.sparsity import Cubic

    begin, end, every = _window(goal)
    ramp = Cubic(
        goal.initial_sparsity, goal.sparsity, begin, (end - begin) // every, every, goal.power
    )
    return GroupKernelPruner(model, optimizer, _groups(goal), steps=goal.steps, schedule=ramp)


def _fast_sparse_convnets(model: nn.Module, optimizer: torch.optim.Optimizer, goal: Goal) -> Any:
    from aerogel.pruning import PointwisePruner
    from aerogel.pruning.fast_sparse_convnets import is_pointwise

    begin, end, frequency = _window(goal)
    modules = {name: name.removesuffix(".weight") for name in goal.parameters}
    other = [n for n, module in modules.items() if not is_pointwise(model.get_submodule(module))]
    if other:
        raise ValueError(
            f"method = 'fast-sparse-convnets' prunes 1x1 convolutions only, not {other[0]!r}; "
            "exclude it, or use gradual-pruning"
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
        frequency=frequency,
        initial_sparsity=goal.initial_sparsity,
        power=goal.power,
    )


def _pointwise_targets(model: nn.Module) -> tuple[str, ...]:
    from aerogel.pruning.fast_sparse_convnets import select_pointwise

    return tuple(select_pointwise(model))


_BLOCKS = {"unstructured": 1, "2x1": 2, "4x1": 4}  # pattern -> output channels that share zeros


def _rearrange(model: nn.Module, dense: nn.Module, example: Any, goal: Goal) -> None:
    from aerogel.pruning import apply_plan, rearrange_network

    plan = rearrange_network(model, example, _groups(goal))
    apply_plan(model, plan)
    apply_plan(dense, plan)  # its features are learnt channel by channel


def _groups(goal: Goal) -> Any:
    from aerogel.pruning import GroupKernelConfig
    from aerogel.sparsity import KernelGroup, parse_pattern

    pattern = parse_pattern(goal.pattern)
    assert isinstance(pattern, KernelGroup)  # the recipe was checked
    return GroupKernelConfig(pattern.g, goal.sparsity, include=goal.parameters)


def _group_targets(model: nn.Module) -> tuple[str, ...]:
    from aerogel.pruning.sparsebytenn import default_targets

    return default_targets(model)


METHODS: dict[str, Method] = {
    "gradual-pruning": Method(_gradual_pruning),
    "fast-sparse-convnets": Method(
        _fast_sparse_convnets, patterns=tuple(_BLOCKS), proposes=_pointwise_targets
    ),
    "sparsebytenn": Method(
        _sparsebytenn,
        patterns=("kernel-group",),
        pattern="kernel-group:4",
        proposes=_group_targets,
        prepare=_rearrange,
    ),
}


def method_names() -> tuple[str, ...]:
    """Slugs of the methods that `aerogel compress --method` takes."""
    return tuple(METHODS)


def slug_of(method: str) -> str:
    """A method's slug from the ways people write it."""
    return method.strip().lower().replace("_", "-")
