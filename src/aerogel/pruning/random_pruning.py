"""Random pruning: zeros at random places, layer by layer in sensible shares, before training.

Paper: Liu et al., "The Unreasonable Effectiveness of Random Pruning: Return of the Most Naive
Baseline for Sparse Training", 2022, arXiv 2202.02643.

The idea: delete weights of an untrained network at random, with a density per layer that is chosen
beforehand (ERK by default: thin layers and small kernels keep more), freeze that mask and train.
The wider and deeper the network, the smaller the gap to the dense one, until it is gone.

When to use it: as the baseline that every sparse training method must beat, as the first mask of
dynamic ones, and where a mask must be known before the first step.

Costs and buys: nothing before training (one batch for the SNIP and GraSP ratios). Every step can
run on the stored weights alone (`aerogel.train.sparse_training`), because the mask never changes.
At equal parameters ERK costs more operations than uniform densities where maps are large;
`layerwise_report` shows both. Small networks lose many points.

The claim this repository measures (``aerogel reproduce random-pruning``): the gap to dense closes
as a perceptron gets wider, and in narrow ones ERK beats uniform densities by many points.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from aerogel.pruning.method import Goal, TrainingMethod
from aerogel.sparsity.allocation import allocate
from aerogel.sparsity.blocks import ForwardFn, run_batch
from aerogel.sparsity.cost import inference_flops
from aerogel.sparsity.masks import MaskSet, random_masks
from aerogel.sparsity.patterns import Pattern, UnitPattern, Unstructured, parse_pattern
from aerogel.sparsity.scores import ScoreContext, compute_scores
from aerogel.sparsity.select import ParamSelection, select_parameters, unknown_name
from aerogel.sparsity.sensitivity import (
    GRASP_PER_CLASS,
    LossFn,
    balanced_halves,
    hessian_gradients,
    loss_gradients,
)
from aerogel.sparsity.static import StaticSparseTrainer

Ratios = Literal["erk", "er", "uniform", "uniform_plus", "erk_plus", "er_plus", "snip", "grasp"]
Batches = Iterable[tuple[Tensor, Tensor]]

# GraSP's gradient of a class with one sample is that sample's noise.
_LEAST_PER_CLASS = 2


def random_prune(
    model: nn.Module,
    density: float | None,
    *,
    allocation: Ratios | Mapping[str, float] = "erk",
    exact: bool = True,
    loader: Batches | None = None,
    loss_fn: LossFn | None = None,
    scale_init: bool = False,
    pattern: Pattern | str = "unstructured",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    generator: torch.Generator | None = None,
) -> MaskSet:
    """Prune an untrained network at random, in place; train it with `StaticSparseTrainer`.

    Args:
        model: freshly initialised; the pruned weights become zero.
        density: fraction of the chosen weights to keep, in (0, 1]. With densities by name it may be
            None, or must be what they add up to.
        allocation: how the density is shared over layers: "erk", "er", "uniform", "uniform_plus"
            (first convolution dense, classifier at least 0.2), "erk_plus", "er_plus" (classifier
            dense), "snip", "grasp" (the ratios, not the places, that these scores give on a copy
            of the network; for SNIP its weights are drawn anew, Glorot-normal, as in the paper's
            code), or a density for every weight by name.
        exact: keep exact counts; otherwise every unit is drawn on its own, as the paper's code
            does, and the density fluctuates by about ``sqrt(d (1 - d) / units)``.
        loader: (inputs, labels) batches, for "snip" (the first) and "grasp" (25 samples a class, or
            as many as all classes have).
        loss_fn: of (outputs, labels), for "snip" and "grasp".
        scale_init: multiply the kept weights of each layer by ``1 / sqrt(its density)``, as if the
            initialiser had known the true number of inputs.
        pattern: what is zero together: a pattern of units ("unstructured", "16x16", "filter", ...).
        include: globs of the weights to prune; all linear and convolution weights by default.
        exclude: globs of weights to leave dense.
        generator: source of randomness on the CPU; seeded 0 by default.

    Returns:
        The masks. A layer whose share is below one unit keeps one weight in every output row where
        the network's budget pays for that, else one, as does one of which ``exact=False`` drew
        nothing; a warning names it.

    Raises:
        ValueError: density outside (0, 1], an allocation that is unknown, infeasible or lacks a
            layer, "snip" or "grasp" without loader and loss_fn, labels out of range, too few
            samples of a class, nothing to prune, or a pattern that does not fit.

    Reference:
        arXiv 2202.02643, section 3.
    """
    source = generator or torch.Generator().manual_seed(0)
    units = parse_pattern(pattern)
    if not isinstance(units, UnitPattern):
        raise ValueError(f"pattern must be made of units (not n:m), got {pattern!r}")
    selection = select_parameters(model, include=include, exclude=exclude)
    densities = _densities(model, selection, density, allocation, loader, loss_fn, source)
    masks = random_masks(selection, densities, exact, source, pattern=units)
    if units == Unstructured():
        _keep_rows_alive(masks, densities, source)
    _keep_layers_alive(masks, units, source)
    if scale_init:
        with torch.no_grad():
            for name, share in masks.layer_density().items():
                selection[name].parameter.mul_(share**-0.5)
    masks.apply_(model)
    return masks


@dataclass(frozen=True)
class LayerDensity:
    """One line of a `LayerwiseReport`.

    Attributes:
        name: of the weight.
        shape: of the weight.
        density: fraction kept.
        nnz: weights kept.
        dead_rows: output rows without any input, whose output is their bias alone.
        flops: (dense, sparse) of one forward pass, where an input was given.
    """

    name: str
    shape: tuple[int, ...]
    density: float
    nnz: int
    dead_rows: int
    flops: tuple[int, int] | None = None


@dataclass(frozen=True)
class LayerwiseReport:
    """What masks leave of every layer; prints as a table.

    Attributes:
        layers: in order.
        density: fraction of all these weights that is kept.
        flops_ratio: operations left in these layers, over the dense ones; None without an input.
    """

    layers: tuple[LayerDensity, ...]
    density: float
    flops_ratio: float | None

    @property
    def dead_rows(self) -> int:
        """Output rows without input, in all layers."""
        return sum(layer.dead_rows for layer in self.layers)

    def __str__(self) -> str:
        width = max(len("name"), *(len(layer.name) for layer in self.layers))
        head = f"{'name':<{width}}  {'shape':>18}  {'density':>8}  {'nnz':>9}  {'dead rows':>9}"
        rows = [head]
        for layer in self.layers:
            shape = "x".join(map(str, layer.shape))
            rows.append(
                f"{layer.name:<{width}}  {shape:>18}  {layer.density:>8.4f}  {layer.nnz:>9}  "
                f"{layer.dead_rows:>9}"
            )
        rows.append(f"weights kept: {self.density:.4f}")
        if self.flops_ratio is not None:
            rows[-1] += f", operations left: {self.flops_ratio:.4f}"
        return "\n".join(rows)


def layerwise_report(
    masks: Mapping[str, Tensor],
    model: nn.Module | None = None,
    batch: Any = None,
    *,
    forward: ForwardFn = run_batch,
) -> LayerwiseReport:
    """Density, count and dead rows of every layer, and operations where an input is given.

    Args:
        masks: name -> bool mask, ``True`` = kept.
        model: the network, for operations.
        batch: one batch for it, as `run_batch` takes it.
        forward: how to run it.

    Raises:
        ValueError: no masks, one of model and batch without the other, or masks that do not fit.
    """
    if not masks:
        raise ValueError("masks is empty: expected one of a weight at least")
    if (model is None) != (batch is None):
        raise ValueError("model and batch belong together: give both or neither")
    costs: Mapping[str, tuple[int, int]] = {}
    if model is not None:
        costs = inference_flops(model, masks, batch, forward=forward).layers
    layers = tuple(
        LayerDensity(
            name,
            tuple(mask.shape),
            int(mask.sum()) / mask.numel(),
            int(mask.sum()),
            int((~mask.flatten(1).any(dim=1)).sum()),
            costs.get(name),
        )
        for name, mask in masks.items()
    )
    dense, sparse = (sum(cost[i] for cost in costs.values()) for i in (0, 1))
    ratio = sparse / dense if dense else None
    return LayerwiseReport(layers, MaskSet(masks).density(), ratio)


def _densities(
    model: nn.Module,
    selection: ParamSelection,
    density: float | None,
    allocation: Ratios | Mapping[str, float],
    loader: Batches | None,
    loss_fn: LossFn | None,
    generator: torch.Generator,
) -> dict[str, float]:
    if isinstance(allocation, Mapping):
        return _given(selection, density, allocation)
    if density is None:
        raise ValueError(f"density=None needs an allocation by name, got {allocation!r}")
    if allocation not in get_args(Ratios):
        raise ValueError(unknown_name("allocation", allocation, get_args(Ratios)))
    if allocation != "snip" and allocation != "grasp":
        return allocate(selection, density, allocation)
    if loader is None or loss_fn is None:
        raise ValueError(f"allocation={allocation!r} needs loader and loss_fn")
    scores = _first_scores(model, selection, allocation, loader, loss_fn, generator)
    return allocate(selection, density, "from_scores", scores=scores)


def _given(
    selection: ParamSelection, density: float | None, allocation: Mapping[str, float]
) -> dict[str, float]:
    densities = allocate(selection, 1.0, "fixed", densities=allocation)
    total = sum(densities[name] * ref.parameter.numel() for name, ref in selection.items())
    # One weight of rounding a layer, as in every allocation.
    if density is not None and abs(total - density * selection.numel) > len(selection):
        raise ValueError(
            f"density is {density}, but the allocation keeps {total / selection.numel:.4f} of all "
            f"weights; give density=None"
        )
    return densities


def _first_scores(
    model: nn.Module,
    selection: ParamSelection,
    kind: Literal["snip", "grasp"],
    loader: Batches,
    loss_fn: LossFn,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """SNIP or GraSP scores of a copy of the network."""
    drawn = copy.deepcopy(model)
    own = select_parameters(drawn, include=tuple(selection))
    if kind == "snip":
        for ref in own.values():
            values = torch.empty(ref.shape)
            nn.init.xavier_normal_(values, generator=generator)
            ref.parameter.data.copy_(values)
        batch = next(iter(loader), None)
        if batch is None:
            raise ValueError("loader is empty: allocation='snip' needs a batch")
        _check_labels(batch[1], _num_classes(drawn, batch[0]))
        return compute_scores(
            own, "snip", ScoreContext(gradients=loss_gradients(drawn, own, [batch], loss_fn))
        )
    halves = _grasp_batch(drawn, loader)
    products = hessian_gradients(drawn, own, halves, loss_fn)
    return compute_scores(own, "grasp", ScoreContext(hessian_gradients=products))


def _grasp_batch(model: nn.Module, loader: Batches) -> list[tuple[Tensor, Tensor]]:
    """The same number of samples of every class, in two halves: 25 of each if there are."""
    batches: list[tuple[Tensor, Tensor]] = []
    counts: Tensor | None = None
    for x, y in loader:
        if counts is None:
            counts = torch.zeros(_num_classes(model, x), dtype=torch.int64)
        _check_labels(y, len(counts))
        counts += torch.bincount(y.cpu(), minlength=len(counts))
        batches.append((x, y))
        if int(counts.min()) >= GRASP_PER_CLASS:
            break
    if counts is None:
        raise ValueError("loader is empty: allocation='grasp' needs samples of every class")
    per_class = min(GRASP_PER_CLASS, int(counts.min()))
    if per_class < _LEAST_PER_CLASS:
        short = (counts < _LEAST_PER_CLASS).nonzero().flatten().tolist()
        raise ValueError(
            f"allocation='grasp' needs at least {_LEAST_PER_CLASS} samples of every class, the "
            f"loader has fewer of {short}"
        )
    return balanced_halves(batches, len(counts), per_class)


def _num_classes(model: nn.Module, x: Tensor) -> int:
    training = [(module, module.training) for module in model.modules()]
    classes = int(model.eval()(x[:1]).shape[-1])
    for module, mode in training:
        module.training = mode
    return classes


def _check_labels(labels: Tensor, classes: int) -> None:
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"labels must lie in 0..{classes - 1}, the loader has "
            f"{int(labels.min())}..{int(labels.max())}"
        )


def _keep_rows_alive(
    masks: MaskSet, densities: Mapping[str, float], generator: torch.Generator
) -> None:
    """Give layers that were allotted less than one weight one in every output row, or one."""
    tiny = [name for name, mask in masks.items() if densities[name] * mask.numel() < 1.0]
    budget = sum(densities[name] * mask.numel() for name, mask in masks.items())
    affordable = sum(len(masks[name]) for name in tiny) <= budget
    for name in tiny:
        mask = masks[name]
        if affordable:
            rows = mask.flatten(1)
            chosen = torch.randint(rows.shape[1], (len(rows), 1), generator=generator)
            mask.copy_(
                torch.zeros_like(rows).scatter_(1, chosen.to(mask.device), True).view_as(mask)
            )
        elif not bool(mask.any()):
            place = torch.randint(mask.numel(), (), generator=generator)
            mask.view(-1)[int(place)] = True
        warnings.warn(
            f"{name!r} was allotted {densities[name] * mask.numel():.2f} of {mask.numel()} "
            f"weights; it keeps {int(mask.sum())}"
        )


def _keep_layers_alive(masks: MaskSet, pattern: UnitPattern, generator: torch.Generator) -> None:
    """Give one unit to each layer that was left none: units drawn on their own may all miss."""
    for name, mask in masks.items():
        if bool(mask.any()):
            continue
        rows, columns = pattern.unit_grid(mask.shape)
        flat = torch.zeros(rows * columns, dtype=torch.bool)
        flat[int(torch.randint(len(flat), (), generator=generator))] = True
        mask.copy_(pattern.expand(flat, mask.shape))
        warnings.warn(f"{name!r} was drawn without a weight; it keeps {int(mask.sum())}")


def _build(model: nn.Module, optimizer: torch.optim.Optimizer, goal: Goal) -> StaticSparseTrainer:
    masks = random_prune(
        model,
        1.0 - goal.sparsity,
        pattern=goal.pattern,
        include=goal.parameters,
        generator=goal.generator,
    )
    return StaticSparseTrainer(model, optimizer, masks)


METHOD = TrainingMethod(
    slug="random-pruning",
    build=_build,
    patterns=("unstructured", "block", "filter", "channel"),
    starts="fresh",
)
