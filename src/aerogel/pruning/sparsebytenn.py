"""SparseByteNN: whole kernels leave for a group of output channels at once, in rearranged networks.

Paper: Xu, Liu et al., "SparseByteNN: A Novel Mobile Inference Acceleration Framework Based on
Fine-Grained Group Sparsity", 2023, arXiv 2310.19509.

The idea: scattered zeros keep accuracy but need 70 % of them to pay, whole filters pay at once but
cost accuracy. In between, a kernel (the weights from one input to one output channel) is removed
for G neighbouring output channels together, so that the engine loads an activation once for G
multiply-adds. The channels of the whole network are rearranged first, which changes nothing it
computes, so that neighbours are alike and little is lost.

When to use it: convolutional networks (and linear layers) at 30 to 70 % zeros, from a trained dense
network, with some epochs of fine-tuning. Start with G = 4; G = 8 and 16 lose more and gain nothing
further here. Keep the first convolution, depthwise convolutions and the last linear layer dense,
as is the default: they are cheap and sensitive.

Costs and buys: seconds for the rearrangement, then the training time of gradual pruning.
`aerogel.compile` runs the zeros; `benchmarks/group_kernels.py` measures what they save.

The claim this repository measures (``aerogel reproduce sparsebytenn``): pruned at once to 50 %,
groups of 4 in a rearranged network keep more accuracy than groups in the order training left and
far more than filters, and an epoch of fine-tuning brings them near the dense network.

What the paper does not say (its code was never published) is this repository's design: the solver
of the rearrangement, the counts per layer, the schedule.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from aerogel.arguments import check_count, check_number
from aerogel.pruning.method import Goal, TrainingMethod
from aerogel.pruning.scheduled import FineTuning, ScheduledPruner, fine_tuning_schedule
from aerogel.runtime import CompiledModule
from aerogel.sparsity.allocation import densities_by_cost
from aerogel.sparsity.controller import MaskController
from aerogel.sparsity.coupling import Coupling
from aerogel.sparsity.masks import MaskSet, build_masks, find_parameter
from aerogel.sparsity.patterns import KernelGroup, KernelPattern, Pattern, parse_pattern
from aerogel.sparsity.permute import NotTraceable
from aerogel.sparsity.rearrange import (
    RearrangementPlan,
    apply_plan,
    fingerprint,
    invert_plan,
    plan_rearrangement,
)
from aerogel.sparsity.schedules import Cubic, Schedule
from aerogel.sparsity.select import (
    ParamRef,
    ParamSelection,
    end_weights,
    select_parameters,
    unknown_name,
)
from aerogel.sparsity.topk import Rounding, kept_count
from aerogel.sparsity.updates import Rebuild

__all__ = [
    "GroupKernelConfig",
    "GroupKernelPruner",
    "PruneResult",
    "RearrangementPlan",
    "apply_plan",
    "default_targets",
    "group_kernel_prune",
    "invert_plan",
    "kernel_group_patterns",
    "layer_rates",
    "rearrange_network",
    "sparsebytenn",
]

# Which choices each kind of layer has; the first is the default.
_CHOICES = {
    "conv1x1": ("group", "dense"),  # linear layers too
    "conv3x3": ("group", "dense"),  # every kernel wider than 1x1
    "depthwise": ("dense", "pattern"),
}
_ROUNDING: Rounding = "round_kept"

Wrap = Callable[[nn.Module, torch.optim.Optimizer], "GroupKernelPruner"]


@dataclass(frozen=True)
class GroupKernelConfig:
    """What is pruned, and how much.

    Args:
        group: output channels that lose a kernel together; 4, 8 or 16 suit the kernels. The last
            ``channels % group`` of a layer form a group of their own.
        sparsity: fraction of the kernels of each pruned layer that goes, in [0, 1).
        balanced: the same number in every group of a layer, which gives threads equal work.
        patterns: by kind of layer, what departs from the default: ``"conv1x1"`` (and linear layers)
            and ``"conv3x3"`` (every wider kernel) are ``"group"`` or ``"dense"``; ``"depthwise"``
            is ``"dense"`` or ``"pattern"`` (4 of the 9 taps of a 3x3 kernel, one of 8 patterns,
            which the channels of a group share).
        rearrange: whether `sparsebytenn` rearranges channels before pruning.
        rates: sparsity of single weights by name, in place of ``sparsity``; see `layer_rates`.
        include: globs of the weights to prune; by default all linear and convolution weights but
            those of the first convolution and of the last linear layer.
        exclude: globs of weights to leave dense.

    Raises:
        ValueError: a value out of range, or an unknown kind or pattern.
    """

    group: int = 4
    sparsity: float = 0.3
    balanced: bool = False
    patterns: Mapping[str, str] = field(default_factory=dict)
    rearrange: bool = True
    rates: Mapping[str, float] = field(default_factory=dict)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_count("group", self.group)
        for argument, value in (("rates", self.rates), ("patterns", self.patterns)):
            if not isinstance(value, Mapping):
                raise TypeError(f"{argument} must be a mapping, got {value!r}")
        check_number("sparsity", self.sparsity, "[0, 1)")
        for name, sparsity in self.rates.items():
            check_number(f"rates[{name!r}]", sparsity, "[0, 1)")
        if self.rates and not self.sparsity:
            raise ValueError("rates need a sparsity above 0: the ramp is in proportion to it")
        for kind, choice in self.patterns.items():
            if kind not in _CHOICES:
                raise ValueError(unknown_name("kind of layer", kind, _CHOICES))
            if choice not in _CHOICES[kind]:
                raise ValueError(f"patterns[{kind!r}] must be one of {_CHOICES[kind]}: {choice!r}")
        defaults = {kind: choices[0] for kind, choices in _CHOICES.items()}
        object.__setattr__(self, "patterns", {**defaults, **self.patterns})


@dataclass(frozen=True)
class PruneResult:
    """What `sparsebytenn` did.

    Attributes:
        model: the network, rearranged, pruned and trained in place.
        masks: its masks, ``True`` = kept.
        plan: the rearrangement, None without one.
    """

    model: nn.Module
    masks: MaskSet
    plan: RearrangementPlan | None


def default_targets(model: nn.Module) -> tuple[str, ...]:
    """Weights worth pruning in groups: all but those at the ends and in grouped convolutions."""
    ends = end_weights(model)
    return tuple(
        name
        for name, ref in select_parameters(model).items()
        if name not in ends and getattr(ref.module, "groups", 1) == 1
    )


def kernel_group_patterns(model: nn.Module, config: GroupKernelConfig) -> dict[str, Pattern]:
    """The weights that a config prunes, with the pattern of each.

    Raises:
        ValueError: a compiled or masked model, a convolution with groups that is not depthwise, a
            group larger than a layer's channels, a sparsity that would leave a layer empty, a rate
            for a weight that is not pruned, or nothing to prune.
    """
    found: dict[str, Pattern] = {}
    for name, ref in _candidates(model, config).items():
        kind = _kind(ref)
        choice = config.patterns[kind]
        if choice == "dense":
            continue
        pattern: Pattern = KernelGroup(config.group)
        if choice == "pattern":
            pattern = KernelPattern(group=config.group)
        pattern.validate(ref.shape, name)
        found[name] = pattern
    for name in config.rates:
        if name not in found:
            raise ValueError(f"rates: {unknown_name('pruned weight', name, found)}")
    if not found:
        raise ValueError(f"nothing to prune with patterns {dict(config.patterns)}")
    _check_rest(model, config, found)
    return found


def layer_rates(
    model: nn.Module, config: GroupKernelConfig, seconds: Mapping[str, float], most: float = 0.9
) -> dict[str, float]:
    """Rates that save ``config.sparsity`` of the layers' time where it costs the least energy.

    Args:
        model: dense and trained.
        config: what is pruned; its rates are not looked at.
        seconds: time of each layer by the name of its weight, e.g. of the rows of
            ``aerogel.compile(model, example).explain()``: ``f"{row.layer}.weight"`` and
            ``row.seconds_dense``.
        most: sparsity of a layer at most.

    Returns:
        For ``dataclasses.replace(config, rates=...)``.

    Raises:
        ValueError: see `kernel_group_patterns`; a layer without a time, a sparsity above `most`.
    """
    patterns = kernel_group_patterns(model, replace(config, rates={}))
    energies = {
        name: pattern.pooled(find_parameter(model, name).detach().square(), "sum")
        for name, pattern in patterns.items()
        if isinstance(pattern, KernelGroup)
    }
    densities = densities_by_cost(energies, seconds, 1.0 - config.sparsity, least=1.0 - most)
    return {name: 1.0 - density for name, density in densities.items()}


def rearrange_network(
    model: nn.Module, example: Any, config: GroupKernelConfig, seed: int = 0
) -> RearrangementPlan:
    """Find the order of channels in which `config` prunes the least energy; changes nothing yet.

    Args:
        model: dense and trained.
        example: example input, a tensor, a tuple of positional or a mapping of keyword inputs.
        config: what will be pruned.
        seed: of the search.

    Returns:
        The plan for `apply_plan`. If the network runs but cannot be traced, a warning says where,
        and the plan leaves every channel in its place.

    Raises:
        ValueError: see `kernel_group_patterns`; or the model does not run on the example.
    """
    patterns = kernel_group_patterns(model, config)
    try:
        return plan_rearrangement(
            model,
            example,
            patterns,
            _densities(patterns, config),
            balanced=config.balanced,
            rounding=_ROUNDING,
            seed=seed,
        )
    except NotTraceable as error:
        warnings.warn(f"channels keep their order: {error}", stacklevel=2)
        return RearrangementPlan((), (), (), (), fingerprint(model))


def group_kernel_prune(
    model: nn.Module,
    config: GroupKernelConfig,
    schedule: Schedule | None = None,
    step: int = 0,
) -> MaskSet:
    """Prune now, in place, without training.

    Args:
        model: a plain model, rearranged or not.
        config: what, and how much.
        schedule: prune to its sparsity at `step` instead of the config's, for loops of their own
            that prune, train and prune again. What is zero already stays zero. (`GroupKernelPruner`
            lets weights return instead.)
        step: where in the schedule.

    Returns:
        The masks, ``True`` = kept.

    Raises:
        ValueError: see `kernel_group_patterns`; or a weight that is nan or infinite.
    """
    patterns = kernel_group_patterns(model, config)
    selection = select_parameters(model, include=tuple(patterns))
    within, scale = None, 1.0
    if schedule is not None:
        within = MaskSet.from_weights(selection)
        scale = schedule.value(step) / config.sparsity if config.sparsity else 0.0
        if scale <= 0.0:
            return within
    masks = build_masks(
        {name: ref.parameter.detach().abs() for name, ref in selection.items()},
        _densities(patterns, config, scale),
        patterns,
        "row" if config.balanced else "layer",
        within,
        rounding=_ROUNDING,
    )
    masks.apply_(model)
    return masks


class GroupKernelPruner(ScheduledPruner):
    """Prunes kernel groups while the network is fine-tuned; `step` replaces ``optimizer.step()``.

    Rearrange the network first (`rearrange_network`, `apply_plan`); here channels stay in place.
    Under a trainer of its own see `aerogel.pruning.callbacks`.

    Args:
        model: trained and dense; pruned in place.
        optimizer: the `torch.optim` optimizer that fine-tunes it.
        config: what, and how much.
        steps: optimizer steps of the fine-tuning.
        schedule: see `fine_tuning_schedule`; ends at the config's sparsity.
        coupling: ``"frozen"`` (removed kernels keep their value and may return while the ramp
            lasts) or another of `aerogel.sparsity.COUPLINGS`.

    Raises:
        ValueError: see `kernel_group_patterns`; a schedule that does not fit, or a parameter that
            is pruned already.

    Reference:
        Xu, Liu et al., arXiv 2310.19509.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: GroupKernelConfig,
        *,
        steps: int,
        schedule: FineTuning = "cubic",
        coupling: Coupling | str = "frozen",
    ) -> None:
        patterns = kernel_group_patterns(model, config)
        ramp = fine_tuning_schedule(schedule, config.sparsity, steps)
        rates = None
        if config.rates:
            rates = {name: config.rates.get(name, config.sparsity) for name in patterns}
            rates = {name: rate / config.sparsity for name, rate in rates.items()}
        rule = Rebuild(
            pattern=patterns,
            scope="row" if config.balanced else "layer",
            rounding=_ROUNDING,
            rates=rates,
        )
        selection = select_parameters(model, include=tuple(patterns))
        controller = MaskController(model, optimizer, selection, coupling, "uniform", ramp, rule)
        super().__init__(controller, ramp, config.sparsity)
        self.config = config


def sparsebytenn(
    model: nn.Module,
    train_fn: Callable[[nn.Module, Wrap], Any],
    config: GroupKernelConfig,
    *,
    steps: int,
    example: Any = None,
    schedule: FineTuning = "cubic",
    seed: int = 0,
) -> PruneResult:
    """The whole method: rearrange, then prune while fine-tuning.

    With the library's own loop, ``train_fn`` is one line::

        lambda model, wrap: train.fit(model, dataset, training, optimizer_wrapper=wrap)

    Args:
        model: trained and dense; changed in place.
        train_fn: called as ``train_fn(model, wrap)``; it fine-tunes the model (a tenth of the
            original peak learning rate, cosine) and calls ``pruner = wrap(model, optimizer)`` once,
            then ``pruner.step()`` in place of ``optimizer.step()``.
        config: what, and how much.
        steps: optimizer steps that ``train_fn`` takes.
        example: example input, needed to rearrange.
        schedule: see `GroupKernelPruner`.
        seed: of the rearrangement's search.

    Raises:
        ValueError: see `kernel_group_patterns`, or no example.
        RuntimeError: ``train_fn`` never used the pruner.
    """
    plan = None
    if config.rearrange:
        if example is None:
            raise ValueError("example is needed to rearrange the network (or rearrange=False)")
        plan = rearrange_network(model, example, config, seed)
        apply_plan(model, plan)
    pruners: list[GroupKernelPruner] = []

    def wrap(model: nn.Module, optimizer: torch.optim.Optimizer) -> GroupKernelPruner:
        pruners.append(GroupKernelPruner(model, optimizer, config, steps=steps, schedule=schedule))
        return pruners[-1]

    train_fn(model, wrap)
    if not pruners:
        raise RuntimeError("train_fn never called wrap(model, optimizer), so nothing was pruned")
    pruner = pruners[-1]
    masks = pruner.masks.clone() if pruner.controller.finalized else pruner.finalize()
    return PruneResult(model, masks, plan)


def _candidates(model: nn.Module, config: GroupKernelConfig) -> ParamSelection:
    """The weights that may be pruned, by the config's globs or by the default rule."""
    if isinstance(model, CompiledModule):
        raise ValueError("model is compiled, its weights are packed: prune it, then compile it")
    chosen = select_parameters(model, include=config.include, exclude=config.exclude)
    for name, ref in chosen.items():
        if parametrize.is_parametrized(ref.module, ref.attribute):
            raise ValueError(f"{name!r} is masked or parametrized already; finalize that first")
    if config.include:
        return chosen
    ends = end_weights(model)
    return ParamSelection([ref for name, ref in chosen.items() if name not in ends])


def _kind(ref: ParamRef) -> str:
    groups = getattr(ref.module, "groups", 1)
    if groups > 1 and ref.shape[1] > 1:
        raise ValueError(
            f"{ref.name!r} is a convolution with {groups} groups, neither ordinary nor depthwise: "
            f"exclude it"
        )
    if groups > 1:
        return "depthwise"
    return "conv3x3" if any(side > 1 for side in ref.shape[2:]) else "conv1x1"


def _check_rest(
    model: nn.Module, config: GroupKernelConfig, patterns: Mapping[str, Pattern]
) -> None:
    """Every group, or every layer, keeps something."""
    densities = _densities(patterns, config)
    for name, ref in select_parameters(model, include=tuple(patterns)).items():
        pattern = patterns[name]
        if not isinstance(pattern, KernelGroup):
            continue
        rows, columns = pattern.unit_grid(ref.shape)
        units = columns if config.balanced else rows * columns
        if kept_count(units, densities[name], rounding=_ROUNDING, min_keep=0) == 0:
            raise ValueError(
                f"sparsity {1.0 - densities[name]:.4g} leaves nothing of {name!r}, which has "
                f"{units} groups of kernels{' in a block' * config.balanced}"
            )


def _densities(
    patterns: Mapping[str, Pattern], config: GroupKernelConfig, scale: float = 1.0
) -> dict[str, float]:
    """Share of each weight that is kept, at `scale` of the final sparsity."""
    return {
        name: pattern.fixed_density or 1.0 - scale * config.rates.get(name, config.sparsity)
        for name, pattern in patterns.items()
    }


def _build(model: nn.Module, optimizer: torch.optim.Optimizer, goal: Goal) -> GroupKernelPruner:
    begin, end, every = goal.window()
    ramp = Cubic(
        goal.initial_sparsity, goal.sparsity, begin, (end - begin) // every, every, goal.power
    )
    return GroupKernelPruner(model, optimizer, _config(goal), steps=goal.steps, schedule=ramp)


def _prepare(model: nn.Module, dense: nn.Module, example: Any, goal: Goal) -> None:
    plan = rearrange_network(model, example, _config(goal))
    apply_plan(model, plan)
    apply_plan(dense, plan)  # its features are learnt channel by channel


def _config(goal: Goal) -> GroupKernelConfig:
    pattern = parse_pattern(goal.pattern)
    if not isinstance(pattern, KernelGroup):
        raise ValueError(f"pattern must be kernel-group:G, got {goal.pattern!r}")
    return GroupKernelConfig(pattern.g, goal.sparsity, include=goal.parameters)


METHOD = TrainingMethod(
    slug="sparsebytenn",
    build=_build,
    patterns=("kernel-group",),
    pattern="kernel-group:4",
    proposes=default_targets,
    prepare=_prepare,
)
