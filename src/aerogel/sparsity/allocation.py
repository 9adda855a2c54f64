"""Allocation: one density for the whole network, shared out over its layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from aerogel.arguments import check_number
from aerogel.sparsity.masks import build_masks
from aerogel.sparsity.patterns import Pattern
from aerogel.sparsity.select import ParamSelection, unknown_name

AllocationKind = Literal[
    "uniform",
    "uniform_plus",
    "er",
    "erk",
    "er_plus",
    "erk_plus",
    "global",
    "from_scores",
    "fixed",
    "nm",
]

# The classifier of `uniform_plus` keeps at least this share.
_UNIFORM_PLUS_LAST = 0.2


def allocate(
    selection: ParamSelection,
    density: float,
    kind: AllocationKind = "uniform",
    *,
    power: float = 1.0,
    last_density: float = 1.0,
    densities: Mapping[str, float] | None = None,
    scores: Mapping[str, Tensor] | None = None,
    pattern: Pattern | None = None,
) -> dict[str, float]:
    """Densities per layer that spend ``density`` of all selected weights.

    Args:
        selection: the layers, in order (first and last mean first and last of it).
        density: wanted fraction kept over all weights, in (0, 1].
        kind: ``"uniform"``; ``"uniform_plus"`` (first dense, last at least 0.2); ``"er"``,
            ``"erk"`` (Erdos-Renyi, by channels or by all dimensions; layers that would exceed 1 are
            dense); ``"er_plus"``, ``"erk_plus"`` (last layer fixed); ``"global"`` and
            ``"from_scores"`` (what one top-k over all ``scores`` gives each layer); ``"fixed"``
            (``densities``); ``"nm"`` (what ``pattern`` prescribes).
        power: exponent of the Erdos-Renyi raw density.
        last_density: of the last layer in the ``_plus`` Erdos-Renyi kinds.
        densities: for ``"fixed"``.
        scores: for ``"global"`` and ``"from_scores"``.
        pattern: for ``"nm"``.

    Returns:
        Name to density in (0, 1].

    Raises:
        ValueError: unknown kind, density outside (0, 1], a budget that cannot be met, or something
            that the kind needs and was not given.

    Reference:
        Mocanu et al. 2018 (ER); Evci et al., RigL, arXiv 1911.11134 (ERK).
    """
    check_number("density", density, "(0, 1]")
    check_number("power", power)
    check_number("last_density", last_density, "(0, 1]")
    if kind not in get_args(AllocationKind):
        raise ValueError(unknown_name("allocation", kind, get_args(AllocationKind)))
    if kind == "uniform":
        return dict.fromkeys(selection, density)
    if kind == "uniform_plus":
        return _uniform_plus(selection, density)
    if kind == "fixed":
        return _fixed(selection, densities)
    if kind == "nm":
        if pattern is None or pattern.fixed_density is None:
            raise ValueError(
                f"allocation 'nm' needs a pattern that fixes its density, got {pattern}"
            )
        return dict.fromkeys(selection, pattern.fixed_density)
    if kind in ("global", "from_scores"):
        return _from_scores(selection, density, scores)
    raw = {
        name: _raw_density(ref.shape, kind.startswith("erk")) ** power
        for name, ref in selection.items()
    }
    if kind.endswith("_plus"):
        return _with_fixed_last(selection, density, raw, last_density)
    return _erdos_renyi(selection, density, raw)


def densities_by_cost(
    energies: Mapping[str, Tensor],
    seconds: Mapping[str, float],
    density: float,
    *,
    least: float = 0.1,
) -> dict[str, float]:
    """Densities that spend a share of the time, greedily by kept energy per second saved.

    Units leave one by one, first those that lose the least of their layer's energy for the time
    they take, until ``1 - density`` of all layers' time is saved.

    Args:
        energies: energy of every unit by layer, not negative.
        seconds: time of each layer when dense; a unit takes an equal share. Others are ignored.
        density: fraction of the time that may be spent, in (0, 1].
        least: density that no layer goes below.

    Raises:
        ValueError: density outside [least, 1], or a layer whose time is missing or not positive.
    """
    if not 0.0 < least <= density <= 1.0:
        raise ValueError(f"density must be in [least, 1] with least={least} above 0, got {density}")
    for name in energies:
        if not seconds.get(name, 0.0) > 0.0:
            raise ValueError(f"seconds of {name!r} must be given and positive")
    rank, saved, owner = [], [], []
    for index, (name, energy) in enumerate(energies.items()):
        flat = energy.flatten().double()
        lost = flat.sort().values[: int((1.0 - least) * flat.numel() + 1e-9)]
        share = seconds[name] / flat.numel()
        rank.append(lost / flat.sum().clamp_min(1e-300) / share)
        saved.append(torch.full_like(lost, share))
        owner.append(torch.full(lost.shape, index))
    order = torch.cat(rank).sort(stable=True).indices
    budget = (1.0 - density) * sum(seconds[name] for name in energies)
    gone = torch.cat(saved)[order].cumsum(0) <= budget * (1.0 + 1e-9)
    count = torch.cat(owner)[order][gone].bincount(minlength=len(energies))
    numels = [energy.numel() for energy in energies.values()]
    pairs = zip(energies, count.tolist(), numels, strict=True)
    return {name: 1.0 - pruned / numel for name, pruned, numel in pairs}


def _raw_density(shape: torch.Size, all_dimensions: bool) -> float:
    """Sum of the dimensions over their product; er looks at channels only."""
    dimensions = list(shape if all_dimensions else shape[:2])
    return sum(dimensions) / torch.Size(dimensions).numel()


def _erdos_renyi(
    selection: ParamSelection, density: float, raw: Mapping[str, float]
) -> dict[str, float]:
    sizes = {name: selection[name].parameter.numel() for name in raw}
    dense: set[str] = set()
    while True:
        sparse = [name for name in raw if name not in dense]
        if not sparse:
            return dict.fromkeys(raw, 1.0)
        budget = density * sum(sizes[n] for n in sparse)
        budget -= (1.0 - density) * sum(sizes[n] for n in dense)
        scale = budget / sum(raw[n] * sizes[n] for n in sparse)
        largest = max(raw[n] for n in sparse)
        if scale * largest <= 1.0:
            return {name: 1.0 if name in dense else scale * raw[name] for name in raw}
        dense |= {name for name in sparse if raw[name] == largest}


def _with_fixed_last(
    selection: ParamSelection, density: float, raw: dict[str, float], last_density: float
) -> dict[str, float]:
    *others, last = selection
    rest = _remaining(selection, density, {last: last_density}, "the last layer")
    shared = _erdos_renyi(selection, rest, {name: raw[name] for name in others})
    return {**shared, last: last_density}


def _uniform_plus(selection: ParamSelection, density: float) -> dict[str, float]:
    if len(selection) < 3:
        raise ValueError(f"uniform_plus needs at least 3 layers, got {len(selection)}")
    first, *_, last = selection
    fixed = {first: 1.0, last: max(density, _UNIFORM_PLUS_LAST)}
    rest = _remaining(selection, density, fixed, "the first and last layer")
    return {name: fixed.get(name, rest) for name in selection}


def _remaining(
    selection: ParamSelection, density: float, fixed: Mapping[str, float], what: str
) -> float:
    """Density of the other layers once some layers have taken theirs out of the budget."""
    sizes = {name: ref.parameter.numel() for name, ref in selection.items()}
    budget = density * sum(sizes.values()) - sum(d * sizes[name] for name, d in fixed.items())
    others = sum(size for name, size in sizes.items() if name not in fixed)
    if others == 0:
        raise ValueError(f"no layer is left to share the budget besides {what}")
    if budget <= 0:
        raise ValueError(
            f"density {density} is too small: {what} alone need "
            f"{sum(d * sizes[n] for n, d in fixed.items()):.0f} weights, and "
            f"{density * sum(sizes.values()):.0f} may be kept in all"
        )
    return min(1.0, budget / others)


def _fixed(selection: ParamSelection, densities: Mapping[str, float] | None) -> dict[str, float]:
    if densities is None:
        raise ValueError("allocation 'fixed' needs densities")
    for name, value in densities.items():
        if name not in selection:
            raise ValueError(f"densities: {unknown_name('parameter', name, selection)}")
        check_number(f"density of {name!r}", value, "(0, 1]")
    missing = [name for name in selection if name not in densities]
    if missing:
        raise ValueError(f"densities has nothing for {missing}")
    return {name: densities[name] for name in selection}


def _from_scores(
    selection: ParamSelection, density: float, scores: Mapping[str, Tensor] | None
) -> dict[str, float]:
    if scores is None:
        raise ValueError("this allocation needs scores")
    missing = [name for name in selection if name not in scores]
    if missing:
        raise ValueError(f"scores has nothing for {missing}")
    masks = build_masks({name: scores[name] for name in selection}, density, scope="global")
    # A layer that lost everything keeps one weight: a density of 0 would cut the network.
    return {name: max(int(mask.sum()), 1) / mask.numel() for name, mask in masks.items()}
