"""How masks change: drop and grow, and the two rules that the published methods are made of.

`Rebuild` decides the masks anew from a score at the schedule's sparsity (gradual pruning, N:M
training, soft shrinkage). `DropGrow` swaps a few weights at constant count (SET, RigL, DSL).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from aerogel.arguments import check_choice, check_count, check_number
from aerogel.kernels import kth_largest
from aerogel.sparsity.allocation import AllocationKind, allocate
from aerogel.sparsity.masks import MaskSet, Scope, build_masks
from aerogel.sparsity.patterns import Pattern, Pool, UnitPattern, Unstructured
from aerogel.sparsity.scores import ScoreContext, ScoreFunction, compute_scores
from aerogel.sparsity.select import ParamSelection, unknown_name
from aerogel.sparsity.topk import Rounding, kept_count, pruned_count, topk_mask

Allocation = AllocationKind | Mapping[str, float]
Growth = Literal["random", "random_unfired", "gradient", "momentum"]
Death = Literal["magnitude", "set", "taylor"]


def drop(mask: Tensor, score: Tensor, count: int) -> Tensor:
    """The mask without its ``count`` lowest-scored kept entries (of equals the later ones go).

    Raises:
        ValueError: fewer than ``count`` entries are kept.
    """
    kept = _count(mask)
    check_count("count", count, 0, kept)
    return topk_mask(score, kept - count, among=mask)


def grow(
    mask: Tensor, score: Tensor, count: int, forbid: Tensor | None = None
) -> tuple[Tensor, int]:
    """The mask with the ``count`` highest-scored entries outside it added.

    Args:
        mask: bool.
        score: of its shape, higher = grow first; ties go to the lowest flat index.
        count: entries to add.
        forbid: entries that may not be added.

    Returns:
        The new mask, and how many were added: fewer than ``count`` if no more are free.
    """
    check_count("count", count, 0)
    free = ~mask if forbid is None else ~mask & ~forbid
    added = min(count, _count(free))
    return mask | topk_mask(score, added, among=free), added


@dataclass
class UpdateContext:
    """What an update rule may look at.

    Attributes:
        t: the step.
        value: the schedule's value there (a sparsity, or a fraction to swap).
        selection: the parameters.
        masks: the masks so far; rules return new ones.
        weights: stored weights by name, with what masked entries hold where it is kept.
        gradients: dense gradients captured for this update; empty unless the rule needs them.
        optimizer: for momentum growth.
        generator: CPU generator for every random choice.
        fired: entries that were ever kept.
        target: weights each parameter should keep.
        allocation: how a sparsity is shared over layers.
    """

    t: int
    value: float
    selection: ParamSelection
    masks: MaskSet
    weights: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    optimizer: torch.optim.Optimizer | None = None
    generator: torch.Generator | None = None
    fired: MaskSet = field(default_factory=MaskSet)
    target: Mapping[str, int] = field(default_factory=dict)
    allocation: Allocation = "uniform"

    def score_context(self) -> ScoreContext:
        """The same facts as scores want them."""
        return ScoreContext(
            generator=self.generator,
            weights=self.weights,
            gradients=self.gradients,
            optimizer=self.optimizer,
        )


class UpdateRule:
    """A way to make the next masks. Stateless unless `state_dict` says otherwise."""

    needs_gradient: bool = False
    gradient_window: int = 1
    tracks_fired: bool = False
    init_value: Literal["zero", "reuse"] = "reuse"

    def update(self, ctx: UpdateContext) -> MaskSet:
        """The masks from step ``ctx.t`` on."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Plain values that `load_state_dict` restores."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""


@dataclass
class Rebuild(UpdateRule):
    """Masks built anew from a score at the schedule's sparsity.

    Args:
        score: name or function, see `scores`.
        pattern: what is zero together, one for all or one per name; a function of the step for
            patterns that change. Of several, those that fix their density apply from the first
            sparsity above 0 on.
        scope: who competes.
        rounding: of counts, see `pruned_count`.
        within: never revive what is pruned.
        pool: score of a unit of several weights.
        threshold_ema: weight of the old threshold in a smoothed one, in [0, 1). 0 = exact counts;
            above, an entry is kept if its score exceeds the smoothed threshold, so that the
            realised sparsity lags the schedule (as in the first TensorFlow release).
        rates: per name, what the schedule's sparsity is multiplied by (scope ``"layer"`` or
            ``"row"``); uniform by default.
    """

    score: str | ScoreFunction = "magnitude"
    pattern: Pattern | Mapping[str, Pattern] | Callable[[int], Pattern | None] = field(
        default_factory=Unstructured
    )
    scope: Scope = "layer"
    rounding: Rounding = "round_kept"
    within: bool = False
    pool: Pool = "l2"
    threshold_ema: float = 0.0
    rates: Mapping[str, float] | None = None
    needs_gradient: bool = False

    def __post_init__(self) -> None:
        check_choice("scope", self.scope, get_args(Scope))
        check_choice("rounding", self.rounding, get_args(Rounding))
        check_choice("pool", self.pool, get_args(Pool))
        check_number("threshold_ema", self.threshold_ema, "[0, 1)")
        if self.threshold_ema and self.scope != "layer":
            raise ValueError(f"threshold_ema needs scope='layer', got {self.scope!r}")
        self._thresholds: dict[str, float] = {}

    def update(self, ctx: UpdateContext) -> MaskSet:
        pattern = self.pattern(ctx.t) if callable(self.pattern) else self.pattern
        scores = compute_scores(ctx.selection, self.score, ctx.score_context())
        within = ctx.masks if self.within else None
        if ctx.value <= 0.0 or pattern is None:
            return ctx.masks.clone() if self.within else MaskSet.ones(ctx.selection)
        if self.threshold_ema:
            return self._smoothed(scores, self._densities(ctx), pattern, within)
        return build_masks(
            scores,
            self._fitted_densities(ctx, pattern),
            pattern,
            self.scope,
            within,
            rounding=self.rounding,
            pool=self.pool,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"thresholds": dict(self._thresholds)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._thresholds = {name: float(value) for name, value in state["thresholds"].items()}

    def _densities(self, ctx: UpdateContext) -> float | dict[str, float]:
        density = 1.0 - ctx.value
        if self.rates is not None:
            return {name: 1.0 - ctx.value * self.rates[name] for name in ctx.selection}
        if self.scope == "global":
            return density
        if isinstance(ctx.allocation, Mapping):
            return allocate(ctx.selection, density, "fixed", densities=ctx.allocation)
        return allocate(ctx.selection, density, ctx.allocation)

    def _fitted_densities(
        self, ctx: UpdateContext, pattern: Pattern | Mapping[str, Pattern]
    ) -> float | dict[str, float] | None:
        """Densities as the patterns allow them."""
        if isinstance(pattern, Pattern):
            return self._densities(ctx) if pattern.fixed_density is None else None
        densities = self._densities(ctx)
        if not isinstance(densities, dict):
            return densities
        return {name: pattern[name].fixed_density or d for name, d in densities.items()}

    def _smoothed(
        self,
        scores: Mapping[str, Tensor],
        densities: float | dict[str, float],
        pattern: Pattern | Mapping[str, Pattern],
        within: MaskSet | None,
    ) -> MaskSet:
        masks = {}
        for name, score in scores.items():
            if not isinstance(pattern, UnitPattern):
                raise ValueError(f"threshold_ema needs a unit pattern, got {pattern}")
            units = pattern.pooled(score, self.pool)
            density = densities[name] if isinstance(densities, dict) else densities
            keep = kept_count(units.numel(), density, rounding=self.rounding)
            # The largest score that must go is the threshold: exactly `keep` exceed it.
            lost = units.numel() - keep
            now = float(kth_largest(units, keep + 1)) if lost else 0.0
            old = self._thresholds.get(name, 0.0)
            smooth = (1.0 - self.threshold_ema) * now + self.threshold_ema * old
            self._thresholds[name] = smooth
            mask = pattern.expand(units > smooth, score.shape)
            masks[name] = mask if within is None else mask & within[name]
        return MaskSet(masks)


@dataclass
class DropGrow(UpdateRule):
    """One dynamic step per layer: drop ``zeta * nnz`` weights, grow back to the target count.

    An entry dropped now may be grown back at once, and then keeps its value; other grown entries
    start at 0 (``init_value="zero"``).

    Args:
        growth: ``"random"`` (SET), ``"random_unfired"`` (never active first), ``"gradient"``
            (RigL), ``"momentum"``.
        death: ``"magnitude"``, ``"set"`` (half of the drops from the smallest positive, half from
            the smallest negative weights), ``"taylor"`` (needs gradients).
        rounding: of ``zeta * nnz``: ``"floor"`` (RigL, SET), ``"ceil"`` (DSL).
        gradient_window: optimizer steps whose gradients are summed before an update.
        forbid_dropped: entries dropped now may not be grown back now.
        init_value: ``"zero"`` or ``"reuse"`` (what the masked entry holds).
        drop_noise: standard deviation of Gaussian noise on the drop score (1e-5 in RigL's release).

    Reference:
        Mocanu et al., SET, 2018; Evci et al., RigL, arXiv 1911.11134; Wang et al., DSL, 2402.02855.
    """

    growth: Growth = "gradient"
    death: Death = "magnitude"
    rounding: Literal["floor", "ceil", "round"] = "floor"
    gradient_window: int = 1
    forbid_dropped: bool = False
    init_value: Literal["zero", "reuse"] = "zero"
    drop_noise: float = 0.0
    tracks_fired: bool = True

    def __post_init__(self) -> None:
        if self.growth == "expected_error":
            raise ValueError(
                "growth 'expected_error' works on calibration statistics, not training"
            )
        if self.growth not in get_args(Growth):
            raise ValueError(unknown_name("growth", self.growth, get_args(Growth)))
        if self.death not in get_args(Death):
            raise ValueError(unknown_name("death", self.death, get_args(Death)))
        check_choice("rounding", self.rounding, ("floor", "ceil", "round"))
        check_choice("init_value", self.init_value, ("zero", "reuse"))
        check_count("gradient_window", self.gradient_window)
        check_number("drop_noise", self.drop_noise, "[0, inf)")
        self.needs_gradient = self.growth == "gradient" or self.death == "taylor"

    def update(self, ctx: UpdateContext) -> MaskSet:
        masks = {}
        for name, mask in ctx.masks.items():
            count = pruned_count(_count(mask), ctx.value, rounding=self.rounding, min_keep=0)
            survivors = self._drop(name, mask, count, ctx)
            missing = ctx.target[name] - _count(survivors)
            if missing < 0:
                # The start held more than its target (drawn at random): shed the surplus.
                survivors, missing = self._drop(name, survivors, -missing, ctx), 0
            forbid = mask & ~survivors if self.forbid_dropped else None
            masks[name], added = grow(survivors, self._growth(name, ctx), missing, forbid)
            if added < missing:
                warnings.warn(
                    f"{name!r}: only {added} of {missing} entries are free to grow at step {ctx.t}"
                )
        return MaskSet(masks)

    def _drop(self, name: str, mask: Tensor, count: int, ctx: UpdateContext) -> Tensor:
        kind = "taylor" if self.death == "taylor" else "magnitude"
        score = compute_scores(_only(ctx.selection, name), kind, ctx.score_context())[name]
        if self.drop_noise:
            noise = torch.randn(score.shape, generator=ctx.generator) * self.drop_noise
            score = score + noise.to(score.device)
        if self.death != "set":
            return drop(mask, score, count)
        positive = mask & (ctx.weights[name] > 0)
        negative = mask & (ctx.weights[name] < 0)
        from_positive = min(count // 2, _count(positive))
        from_negative = min(count - from_positive, _count(negative))
        gone = positive ^ drop(positive, score, from_positive)
        gone |= negative ^ drop(negative, score, from_negative)
        # One sign may have too few; the rest goes by magnitude whatever its sign.
        return drop(mask & ~gone, score, count - from_positive - from_negative)

    def _growth(self, name: str, ctx: UpdateContext) -> Tensor:
        if self.growth in ("gradient", "momentum"):
            kind = "grad" if self.growth == "gradient" else "momentum"
            return compute_scores(_only(ctx.selection, name), kind, ctx.score_context())[name]
        mask = ctx.masks[name]
        score = torch.rand(mask.shape, generator=ctx.generator).to(mask.device)
        if self.growth == "random_unfired":
            score = score + (~ctx.fired[name]).to(score.dtype)
        return score


def _count(mask: Tensor) -> int:
    # `sum` of bools first makes an integer of each, ten times slower.
    return int(torch.count_nonzero(mask))


def _only(selection: ParamSelection, name: str) -> ParamSelection:
    return ParamSelection([selection[name]])
