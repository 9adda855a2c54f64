"""Gradual magnitude pruning: sparsity rises along a cubic curve while the network trains.

Paper: Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model
compression", 2017, arXiv 1710.01878.

The idea: every few hundred steps the smallest weights of each layer are masked, many at first and
few near the end, until the wanted sparsity is reached about half-way through training. Masked
weights leave the forward pass and get no gradient, but keep their value, and come back if survivors
shrink below it. Training then goes on with fixed masks, so that the network recovers.

When to use it: the default way to make a network sparse, from scratch (begin a little after the
start) or from a trained network (begin at 0). It needs almost no tuning; only let the ramp end well
before the learning rate becomes tiny.

Costs and buys: the training time of the dense network plus a few per cent and, while it trains, two
more numbers for each weight of a pruned layer. It buys unstructured, block or N:M sparsity at an
accuracy that one-shot pruning does not reach. The zeros become time only in a runtime that skips
them (`aerogel.compile`); during training nothing is faster.

The claim this repository measures (``aerogel reproduce gradual-pruning``): at the same number of
non-zero weights a large sparse network beats a small dense one trained for as many steps, and
pruning gradually beats pruning at once.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from aerogel.arguments import check_count, check_number
from aerogel.pruning.callbacks import PrunerCallback, PrunerFactory, make_trainer_callback
from aerogel.pruning.method import Goal, TrainingMethod
from aerogel.pruning.scheduled import ScheduledPruner
from aerogel.sparsity.controller import MaskController
from aerogel.sparsity.coupling import Coupling, Frozen, make_coupling
from aerogel.sparsity.masks import Scope
from aerogel.sparsity.patterns import Pattern, Pool, UnitPattern, parse_pattern
from aerogel.sparsity.schedules import Cubic, OneShot
from aerogel.sparsity.select import (
    WEIGHT_TYPES,
    ParamSelection,
    select_parameters,
    unknown_name,
)
from aerogel.sparsity.topk import Rounding, pruned_count
from aerogel.sparsity.updates import Rebuild

_COUPLINGS = ("frozen", "hard", "hard_dense_grad")

# The paper keeps max(round(n * (1 - s)), 1) entries: the rounding is of the number kept.
_ROUNDING: Rounding = "round_kept"


class GradualPruner(ScheduledPruner):
    """Prunes a model while it trains; call `step` where ``optimizer.step()`` stood.

    Args:
        model: any module; pruned in place.
        optimizer: the `torch.optim` optimizer that trains it.
        final_sparsity: fraction of zeros at the end, in [0, 1).
        initial_sparsity: fraction of zeros at ``begin_step``.
        begin_step: optimizer step of the first pruning, counted from 0.
        end_step: no pruning after this step; the ramp ends at the last multiple of ``frequency``.
        frequency: optimizer steps between prunings; 100 to 1000 makes no visible difference.
        power: exponent of the ramp.
        pattern: what is zero together, a `Pattern` or its string (``"4x1"``, ``"2:4"``, ...). N:M
            is pruned once, at ``begin_step``, and needs ``final_sparsity = 1 - n/m``.
        pool: score of a block, ``"avg"`` or ``"max"`` (or ``"l2"``, ``"sum"``) of its magnitudes.
        include: globs of the parameters to prune; all linear and convolution weights by default.
        exclude: globs of parameters to leave dense.
        coupling: ``"frozen"`` (the paper), ``"hard"`` (pruned weights never return) or
            ``"hard_dense_grad"`` (the Keras descendant: zeroed in place, gradients dense).
        scope: ``"layer"`` the same sparsity everywhere, ``"global"`` one budget for all layers,
            ``"row"`` the same in every output row.
        types: module types whose weights are pruned when ``include`` is empty.
        threshold_ema: 0 = exact counts. Above, the share of the old threshold in a smoothed one, as
            in the first TensorFlow release (0.9 there), whose sparsity lags the schedule.
        allow_decrease: accept ``initial_sparsity > final_sparsity``.

    Raises:
        ValueError: any of the above out of range or contradictory, a pattern that does not fit a
            selected weight, or a parameter that is pruned already.

    Reference:
        Zhu and Gupta, arXiv 1710.01878.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        final_sparsity: float,
        *,
        initial_sparsity: float = 0.0,
        begin_step: int,
        end_step: int,
        frequency: int = 100,
        power: float = 3.0,
        pattern: Pattern | str = "unstructured",
        pool: Pool = "avg",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        coupling: Coupling | str = "frozen",
        scope: Scope = "layer",
        types: tuple[type[nn.Module], ...] = WEIGHT_TYPES,
        threshold_ema: float = 0.0,
        allow_decrease: bool = False,
    ) -> None:
        _check_sparsities(initial_sparsity, final_sparsity, allow_decrease)
        mode = _checked_coupling(coupling, initial_sparsity > final_sparsity)
        self.pattern = parse_pattern(pattern)
        self.model = model
        schedule = _schedule(
            self.pattern, initial_sparsity, final_sparsity, begin_step, end_step, frequency, power
        )
        self.selection = select_parameters(model, types, include, exclude)
        _check_weights(self.selection, self.pattern, final_sparsity, scope)
        rule = Rebuild(
            pattern=self.pattern,
            scope=scope,
            rounding=_ROUNDING,
            within=mode.name == "hard",
            pool=pool,
            threshold_ema=threshold_ema,
        )
        controller = MaskController(
            model, optimizer, self.selection, mode, "uniform", schedule, rule
        )
        super().__init__(controller, schedule, final_sparsity)

    @classmethod
    def from_config(
        cls, model: nn.Module, optimizer: torch.optim.Optimizer, config: Mapping[str, Any]
    ) -> GradualPruner:
        """Make a pruner from plain values, e.g. of a recipe.

        Args:
            model: the model.
            optimizer: its optimizer.
            config: keyword arguments of the constructor; patterns and couplings as strings.

        Raises:
            ValueError: an unknown key (the message names the nearest ones), or a missing one.
        """
        parameters = inspect.signature(cls).parameters
        known = [name for name in parameters if name not in ("model", "optimizer")]
        for key in config:
            if key not in known:
                raise ValueError(unknown_name("gradual pruning option", key, known))
        for name in known:
            if parameters[name].default is inspect.Parameter.empty and name not in config:
                raise ValueError(f"gradual pruning needs {name!r}")
        return cls(model, optimizer, **config)


def train_callback(**config: Any) -> PrunerCallback:
    """A callback for `aerogel.train.fit`, which prunes gradually while it trains.

    Args:
        config: options of `GradualPruner.from_config`.
    """
    return PrunerCallback(_in_place_factory(config))


def trainer_callback(**config: Any) -> Any:
    """A `transformers.TrainerCallback` that prunes gradually under Hugging Face's Trainer.

    The pruner is made when training begins and finalized when it ends. It keeps zeros in the
    parameters themselves, so every checkpoint is a plain sparse model; the pruned values are saved
    beside it and found again on resuming.

    Args:
        config: options of `GradualPruner.from_config`.
    """
    return make_trainer_callback(_in_place_factory(config))


def _in_place_factory(config: Mapping[str, Any]) -> PrunerFactory:
    options = {"coupling": "frozen", **config}
    if options["coupling"] == "frozen":
        options["coupling"] = Frozen(in_place=True)
    return lambda model, optimizer: GradualPruner.from_config(model, optimizer, options)


def _check_sparsities(initial: float, final: float, allow_decrease: bool) -> None:
    for argument, value in (("final_sparsity", final), ("initial_sparsity", initial)):
        check_number(argument, value, "[0, 1)")
    if initial > final and not allow_decrease:
        raise ValueError(
            f"initial_sparsity {initial} is above final_sparsity {final}; "
            f"allow_decrease=True if that is meant"
        )


def _checked_coupling(coupling: Coupling | str, decreasing: bool) -> Coupling:
    mode = make_coupling(coupling)
    if mode.name not in _COUPLINGS:
        raise ValueError(f"coupling must be one of {_COUPLINGS}, got {mode.name!r}")
    if decreasing and mode.name == "hard":
        raise ValueError("coupling='hard' cannot revive weights, so sparsity cannot decrease")
    return mode


def _schedule(
    pattern: Pattern,
    initial: float,
    final: float,
    begin: int,
    end: int,
    frequency: int,
    power: float,
) -> Cubic | OneShot:
    check_count("begin_step", begin, 0)
    check_count("end_step", end, 0)
    check_count("frequency", frequency)
    if end <= begin:
        raise ValueError(f"end_step must be after begin_step, got {end} <= {begin}")
    if pattern.fixed_density is not None:
        if abs(1.0 - pattern.fixed_density - final) > 1e-6:
            raise ValueError(
                f"pattern {pattern} has sparsity {1.0 - pattern.fixed_density:g}, "
                f"got final_sparsity={final}"
            )
        return OneShot(begin, final)
    prunings = (end - begin) // frequency
    if prunings < 1:
        raise ValueError(
            f"the window from {begin} to {end} is shorter than one frequency ({frequency})"
        )
    return Cubic(initial, final, begin, prunings, frequency, power)


def _check_weights(selection: ParamSelection, pattern: Pattern, final: float, scope: Scope) -> None:
    for name, ref in selection.items():
        pattern.validate(ref.shape, name)
        if not isinstance(pattern, UnitPattern):
            continue
        rows, columns = pattern.unit_grid(ref.shape)
        units, of = (columns, "each row of ") if scope == "row" else (rows * columns, "")
        if pruned_count(units, final, rounding=_ROUNDING, min_keep=0) == units:
            warnings.warn(
                f"{of}{name!r} has {units} units, of which sparsity {final} would keep none; "
                "it keeps 1"
            )


def _build(model: nn.Module, optimizer: torch.optim.Optimizer, goal: Goal) -> GradualPruner:
    begin, end, frequency = goal.window()
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


METHOD = TrainingMethod(slug="gradual-pruning", build=_build)
