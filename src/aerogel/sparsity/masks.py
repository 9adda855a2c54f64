"""Building masks: from scores, or at random, with exact counts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from aerogel.arguments import check_choice, check_count, check_number
from aerogel.sparsity.mask_set import MaskSet, find_parameter
from aerogel.sparsity.patterns import GroupPattern, Pattern, Pool, UnitPattern, Unstructured
from aerogel.sparsity.select import ParamSelection, unknown_name
from aerogel.sparsity.topk import Rounding, kept_count, require_finite, topk_mask, topk_rows

__all__ = ["MaskSet", "Scope", "build_masks", "find_parameter", "random_masks"]

Scope = Literal["layer", "global", "row", "group"]

T = TypeVar("T")


def build_masks(
    scores: Mapping[str, Tensor],
    densities: float | Mapping[str, float] | None = None,
    pattern: Pattern | Mapping[str, Pattern] = Unstructured(),  # noqa: B008 (immutable)
    scope: Scope = "layer",
    within: Mapping[str, Tensor] | None = None,
    *,
    keep: Mapping[str, int] | None = None,
    rounding: Rounding = "round",
    min_keep: int = 1,
    max_pruned_fraction: float | None = None,
    pool: Pool = "l2",
) -> MaskSet:
    """Masks that keep the highest scores: exact counts, ties to the lowest flat index.

    Args:
        scores: name to score of the weight's shape, higher = keep.
        densities: fraction kept, one for all or one per name; in (0, 1]. ``None`` with a pattern
            that fixes its density (N:M) or with ``keep``.
        pattern: what lives or dies together, one for all or one per name.
        scope: who competes: ``"layer"`` each tensor for itself, ``"global"`` all tensors for one
            budget, ``"row"`` every output row (of units) for itself, ``"group"`` is what N:M
            patterns do anyway.
        within: only entries kept here may be kept; a unit survives if any of it is kept. Densities
            still count against the full tensor.
        keep: exact number of units kept per name, instead of ``densities`` (scope ``"layer"``).
        rounding: how the pruned count is rounded, see `pruned_count`.
        min_keep: units kept per competition at least.
        max_pruned_fraction: cap on the pruned fraction.
        pool: score of a unit of several weights: ``"l2"``, ``"avg"``, ``"max"``, ``"sum"``.

    Returns:
        The masks, in the order of ``scores``.

    Raises:
        ValueError: nan or inf in a score, density outside (0, 1], a pattern that does not fit,
            names or shapes that do not match.
    """
    check_choice("scope", scope, get_args(Scope))
    check_choice("pool", pool, get_args(Pool))
    patterns = _per_name("pattern", pattern, scores)
    for name, score in scores.items():
        require_finite(score, name)
        patterns[name].validate(score.shape, name)
    counts = _Counts(scores, densities, keep, rounding, min_keep, max_pruned_fraction)
    limited = _within(scores, within)
    if scope == "global":
        return _build_global(limited, patterns, counts, pool)
    return MaskSet(
        {
            name: _build_one(name, score, patterns[name], scope, counts, pool)
            for name, score in limited.items()
        }
    )


def random_masks(
    selection: ParamSelection,
    densities: float | Mapping[str, float],
    exact: bool = True,
    generator: torch.Generator | None = None,
    *,
    pattern: Pattern = Unstructured(),  # noqa: B008 (immutable)
    rounding: Rounding = "round",
    min_keep: int = 1,
) -> MaskSet:
    """Masks drawn at random, layer by layer.

    Args:
        selection: the parameters.
        densities: fraction kept, one for all or one per name; in (0, 1].
        exact: keep exactly the rounded count (a random permutation); otherwise every weight is kept
            independently with its density, as several released codes do.
        generator: source of randomness on the CPU; the draw does not depend on the device.
        pattern: what lives or dies together; counts are then of its units.
        rounding: how the pruned count is rounded, see `pruned_count`.
        min_keep: units kept per tensor at least (``exact`` only).

    Raises:
        ValueError: a density outside (0, 1], or a pattern that is not made of units (N:M) or does
            not fit a weight.
    """
    if not isinstance(pattern, UnitPattern):
        raise ValueError(f"pattern must be made of units to draw from, got {pattern}")
    masks = {}
    wanted = _per_name("densities", densities, selection)
    for name, ref in selection.items():
        _check_density(name, wanted[name])
        pattern.validate(ref.shape, name)
        rows, columns = pattern.unit_grid(ref.shape)
        units = rows * columns
        if exact:
            flat = torch.zeros(units, dtype=torch.bool)
            count = kept_count(units, wanted[name], rounding=rounding, min_keep=min_keep)
            flat[torch.randperm(units, generator=generator)[:count]] = True
        else:
            flat = torch.rand(units, generator=generator) < wanted[name]
        masks[name] = pattern.expand(flat, ref.shape).to(ref.parameter.device)
    return MaskSet(masks)


class _Counts:
    """How many units each competition keeps."""

    def __init__(
        self,
        scores: Mapping[str, Tensor],
        densities: float | Mapping[str, float] | None,
        keep: Mapping[str, int] | None,
        rounding: Rounding,
        min_keep: int,
        max_pruned_fraction: float | None,
    ) -> None:
        if densities is not None and keep is not None:
            raise ValueError("give densities or keep, not both")
        self.densities = None
        if densities is not None:
            self.densities = _per_name("densities", densities, scores)
            for name, density in self.densities.items():
                _check_density(name, density)
        self.keep: dict[str, int] | None = None
        if keep is not None:
            self.keep = _per_name("keep", keep, scores)
        self.rounding: Rounding = rounding
        self.min_keep = min_keep
        self.max_pruned_fraction = max_pruned_fraction

    def of(self, name: str, units: int) -> int:
        """Units of ``name`` to keep out of ``units``."""
        if self.keep is not None:
            check_count(f"keep of {name!r}", self.keep[name], 0, units)
            return self.keep[name]
        if self.densities is None:
            raise ValueError(f"densities is needed: the pattern of {name!r} does not fix one")
        return self._rounded(units, self.densities[name])

    def total(self, numels: Mapping[str, int]) -> int:
        """Weights to keep over all tensors together."""
        if self.densities is None:
            raise ValueError("scope='global' needs densities")
        numel = sum(numels.values())
        kept = sum(self.densities[name] * size for name, size in numels.items())
        return self._rounded(numel, min(1.0, kept / numel))

    def check_fixed(self, name: str, fixed: float) -> None:
        """Raise if a density was asked for that the pattern cannot give."""
        if self.keep is not None:
            raise ValueError(
                f"the pattern of {name!r} fixes its own counts, keep cannot change them"
            )
        if self.densities is not None and abs(self.densities[name] - fixed) > 1e-6:
            raise ValueError(
                f"density of {name!r} is {self.densities[name]}, its pattern fixes {fixed}"
            )

    def _rounded(self, units: int, density: float) -> int:
        return kept_count(
            units,
            density,
            rounding=self.rounding,
            min_keep=self.min_keep,
            max_pruned_fraction=self.max_pruned_fraction,
        )


def _build_one(
    name: str, score: Tensor, pattern: Pattern, scope: Scope, counts: _Counts, pool: Pool
) -> Tensor:
    if isinstance(pattern, GroupPattern):
        counts.check_fixed(name, float(pattern.fixed_density or 1.0))
        return pattern.select(score) & ~score.isneginf()
    assert isinstance(pattern, UnitPattern)
    if scope == "group":
        raise ValueError(f"scope='group' needs an N:M pattern, {name!r} has {pattern}")
    units = _pooled(score, pattern, pool)
    if scope == "row":
        if units.shape[1] == 1 and score.dim() > 1:
            raise ValueError(f"scope='row' needs several units per row, {pattern} has one")
        kept = topk_rows(units, counts.of(name, units.shape[1]))
    else:
        kept = topk_mask(units, counts.of(name, units.numel()))
    kept &= ~units.isneginf()
    return pattern.expand(kept, score.shape) & ~score.isneginf()


def _build_global(
    scores: Mapping[str, Tensor], patterns: Mapping[str, Pattern], counts: _Counts, pool: Pool
) -> MaskSet:
    units: dict[str, Tensor] = {}
    for name, score in scores.items():
        pattern = patterns[name]
        if not isinstance(pattern, UnitPattern):
            raise ValueError(f"scope='global' needs a unit pattern, {name!r} has {pattern}")
        units[name] = _pooled(score, pattern, pool)
    budget = counts.total({name: score.numel() for name, score in scores.items()})
    device = next(iter(units.values())).device
    flat = torch.cat([unit.flatten().to(device) for unit in units.values()])
    shapes = [(patterns[name], score.shape) for name, score in scores.items()]
    kept = _within_budget(flat, shapes, budget, counts.min_keep)
    kept &= ~flat.isneginf()
    masks, start = {}, 0
    for name, unit in units.items():
        part = kept[start : start + unit.numel()].view(unit.shape).to(unit.device)
        masks[name] = patterns[name].expand(part, scores[name].shape) & ~scores[name].isneginf()
        start += unit.numel()
    return MaskSet(masks)


def _within_budget(
    flat: Tensor, shapes: list[tuple[Pattern, torch.Size]], budget: int, min_keep: int
) -> Tensor:
    """The best units whose weights together fit the budget (at least ``min_keep`` units)."""
    grids = [(p, shape) for p, shape in shapes if isinstance(p, UnitPattern)]
    uniform = {pattern.uniform_size(shape) for pattern, shape in grids}
    if len(uniform) == 1 and (size := uniform.pop()) is not None:
        return topk_mask(flat, max(budget // size, min(min_keep, flat.numel())))
    sizes = torch.cat([pattern.unit_sizes(shape).flatten() for pattern, shape in grids])
    order = flat.sort(descending=True, stable=True).indices
    fits = int((sizes.to(flat.device)[order].cumsum(0) <= budget).sum())
    kept = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
    kept[order[: max(fits, min_keep)]] = True
    return kept


def _pooled(score: Tensor, pattern: UnitPattern, pool: Pool) -> Tensor:
    """Unit scores; a unit is out of the race (-inf) only if all of it is."""
    gone = score.isneginf()
    if not bool(gone.any()):
        return pattern.pooled(score, pool)
    units = pattern.pooled(score.masked_fill(gone, 0.0), pool)
    dead = pattern.pooled((~gone).to(score.dtype), "max") == 0
    return units.masked_fill(dead, -torch.inf)


def _within(
    scores: Mapping[str, Tensor], within: Mapping[str, Tensor] | None
) -> Mapping[str, Tensor]:
    if within is None:
        return scores
    limited = {}
    for name, score in scores.items():
        if name not in within:
            raise ValueError(f"within has no mask for {name!r}")
        if within[name].shape != score.shape:
            raise ValueError(
                f"within of {name!r} has shape {tuple(within[name].shape)}, the score "
                f"{tuple(score.shape)}"
            )
        limited[name] = score.masked_fill(~within[name].to(score.device), -torch.inf)
    return limited


def _per_name(argument: str, value: T | Mapping[str, T], names: Collection[str]) -> dict[str, T]:
    """One value for all names, or a mapping that must name every one of them and no other."""
    if not isinstance(value, Mapping):
        return dict.fromkeys(names, value)
    missing = [name for name in names if name not in value]
    if missing:
        raise ValueError(f"{argument} has nothing for {missing}")
    unknown = [name for name in value if name not in names]
    if unknown:
        raise ValueError(f"{argument}: {unknown_name('name', unknown[0], list(names))}")
    return {name: value[name] for name in names}


def _check_density(name: str, density: float) -> None:
    check_number(f"density of {name!r}", density, "(0, 1]")
