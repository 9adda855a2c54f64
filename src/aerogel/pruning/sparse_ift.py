"""Sparse-IFT: a larger and sparse network in place of a dense one, at the same FLOPs.

Paper: Thangarasa et al., "Sparse-IFT: Sparse Iso-FLOP Transformations for Maximizing Training
Efficiency", ICML 2024, arXiv 2303.11525.

The idea: sparsity is not used to save FLOPs but spent. Each dense layer becomes a larger one that,
at its sparsity, costs as much; dynamic sparse training finds which of its weights to use. The
sparser, the larger the choice of masks at equal cost.

    model, report = sparse_ift(resnet, "parallel", 0.75, example_input=images)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)       # the dense recipe, unchanged
    trainer = RigL(model, optimizer, report.mask_sparsity, masks=report.masks,
                   include=tuple(report.masks), total_steps=steps)

When to use it: training from scratch, when accuracy at a given number of FLOPs is what counts and
what runs the network skips zeros. New layers get new weights.

Costs and buys: no FLOPs are saved, by design. Executed as masked dense layers, as torch does it,
training takes about 1 / (1 - sparsity) times as long (`IFTReport.flops_executed`).

The claim this repository measures (``aerogel reproduce sparse-ift``): a small perceptron, widened
at 50 % sparsity and trained with RigL, against the dense one of as many weights. Gains that grow
with the sparsity are not claimed at that scale, where the input layer cannot widen.

Masks have exact counts where the released code draws every weight on its own, and the low-rank
factors of the doped form stay dense, as the paper has it (the released rule masks them too).

In recipes and the arena it is the factorized form, trained with RigL: the one that is larger for
every layer, whatever norms stand around it, and at every sparsity. U and V are decayed as the
recipe decays weights.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from aerogel.arguments import check_choice, check_number
from aerogel.nn.sparse_ift import UV, IsoFlopLayer, check_sparsity, folded, parallel_branches
from aerogel.pruning.method import Goal, RewritingMethod
from aerogel.pruning.shared_methods import dynamic
from aerogel.pruning.sparse_ift_layers import (
    check_layers,
    layer_names,
    matching_layers,
    norms_after,
    replacement,
    skipped_layers,
)
from aerogel.sparsity.allocation import allocate
from aerogel.sparsity.cost import inference_flops
from aerogel.sparsity.dynamic import RigL
from aerogel.sparsity.masks import MaskSet, build_masks, random_masks
from aerogel.sparsity.scores import compute_scores
from aerogel.sparsity.select import ParamSelection, select_parameters
from aerogel.sparsity.topk import kept_count

Kind = Literal["wide", "parallel", "factorized", "doped"]
Spread = Literal["uniform", "erk"]
Init = Literal["random", "bernoulli", "topk"]
Factory = Callable[..., nn.Module]

# Projections on residual shortcuts, as torchvision, timm and this library name them.
SHORTCUTS = ("*downsample*", "*shortcut*")
MOST_SPARSE = 0.9999  # end of the bisection
TOLERANCE = 1e-3
_BISECTIONS = 60


@dataclass(frozen=True)
class IFTReport:
    """What a transformation did.

    Attributes:
        kind: of it.
        sparsity: asked for, which sized the layers.
        mask_sparsity: of the masks, after matching FLOPs.
        flops_dense: of the original network, for one sample.
        flops_sparse: of the transformed one with zeros skipped, for one sample.
        flops_executed: of the transformed one as dense kernels run it, for one sample.
        params: trainable parameters that are not masked away.
        widths: layer -> branches (parallel), rank (factorized, doped) or outputs (wide).
        masks: the first masks, by weight (True = kept), for `RigL`, `SET` or a fixed mask.
    """

    kind: Kind
    sparsity: float
    mask_sparsity: float
    flops_dense: float
    flops_sparse: float
    flops_executed: float
    params: int
    widths: dict[str, int] = field(default_factory=dict)
    masks: MaskSet = field(default_factory=MaskSet)


class Transformed(NamedTuple):
    """A network and what was done to it."""

    model: nn.Module
    report: IFTReport


def sparse_ift(
    model: nn.Module | Factory,
    kind: Kind,
    sparsity: float,
    *,
    example_input: Any,
    uv: UV = "nonlinear_relu",
    sparse_v: bool = True,
    mask_low_rank: bool = False,
    skip: Sequence[str] = ("stem", "head"),
    shortcuts: Sequence[str] = SHORTCUTS,
    match_flops: bool = True,
    allocation: Spread = "uniform",
    init: Init = "random",
    generator: torch.Generator | None = None,
) -> Transformed:
    """Replace a network's layers by larger ones that, at their sparsity, cost the same.

    A batch norm that takes a layer's output moves into each parallel branch.

    Args:
        model: the dense network, which stays as it is; for ``"wide"`` a function that builds it
            from ``width_multiplier``.
        kind: ``"wide"``, ``"parallel"``, ``"factorized"`` or ``"doped"``.
        sparsity: sets the size of the layers, in [0, 1).
        example_input: a batch as `run_batch` takes it; FLOPs are counted on it.
        uv: what stands between the factors, see `SparseFactorizedConv2d`.
        sparse_v: False leaves factor V dense.
        mask_low_rank: mask the low-rank part of the doped form as well.
        skip: layers that stay as they are and dense: ``"stem"`` (the first convolution), ``"head"``
            (a linear layer at the end) and globs of layer names.
        shortcuts: globs of layers that stay plain and are masked like the rest.
        match_flops: adjust the sparsity of the masks until the network's FLOPs are the dense
            network's within 0.1 % (or one weight per layer, if that is coarser).
        allocation: of the density over layers, ``"uniform"`` or ``"erk"``.
        init: of the masks: ``"random"`` (exact counts), ``"bernoulli"`` or ``"topk"`` (largest
            initial weights).
        generator: source of the masks, on the CPU; seeded 0 by default.

    Returns:
        The transformed network and its `IFTReport`.

    Raises:
        ValueError: sparsity outside [0, 1) or without whole branches, an unknown name of anything,
            a grouped convolution or a shared weight among the layers, no layer to transform, a
            module for ``"wide"``, or FLOPs that no sparsity makes equal.

    Reference:
        arXiv 2303.11525, section 3.
    """
    _check(kind, sparsity, allocation, init)
    if kind == "wide":
        if isinstance(model, nn.Module):
            raise ValueError(
                f"kind='wide' needs a function with a width_multiplier, got the built "
                f"{type(model).__name__}: widening changes what its layers hand on"
            )
        masking = _Masking(sparsity, skip, match_flops, allocation, init, generator)
        return _widened(model, sparsity, example_input, masking)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a module for kind={kind!r}, got {type(model).__name__}")
    transformed = copy.deepcopy(model)
    skipped = skipped_layers(transformed, skip)
    plain = matching_layers(transformed, shortcuts) - skipped
    names = [name for name in layer_names(transformed) if name not in skipped | plain]
    _check_chosen(transformed, names, skip)
    widths, masked = dict.fromkeys(names, 1), [f"{name}.weight" for name in names]
    if sparsity or kind == "factorized":  # the others are the dense layer at 0
        options = _options(kind, uv, sparse_v, mask_low_rank)
        found = _rewritten(transformed, kind, names, example_input, sparsity, options)
        widths, masked = found
    masked += [f"{name}.weight" for name in layer_names(model) if name in plain]
    masking = _Masking(sparsity, skip, match_flops, allocation, init, generator)
    dense = inference_flops(model, None, example_input).dense
    report = masking.report(kind, transformed, masked, widths, dense, example_input)
    return Transformed(transformed, report)


def _options(kind: Kind, uv: UV, sparse_v: bool, mask_low_rank: bool) -> dict[str, Any]:
    if kind == "factorized":
        return {"uv": uv, "sparse_v": sparse_v}
    return {"mask_low_rank": mask_low_rank} if kind == "doped" else {}


class SparseWide:
    """Sparse Wide: every layer wider by ``sqrt(1 / (1 - sparsity))``, and sparse."""

    @staticmethod
    def multiplier(sparsity: float) -> float:
        """Factor of all inner widths.

        Raises:
            ValueError: a sparsity outside [0, 1).
        """
        check_sparsity(sparsity)
        return float((1.0 / (1.0 - sparsity)) ** 0.5)

    @staticmethod
    def from_factory(
        factory: Factory, sparsity: float, *, example_input: Any, **options: Any
    ) -> Transformed:
        """Build a network wider and sparse; input and output keep their size.

        Args:
            factory: builds the network; its argument ``width_multiplier`` scales inner widths, and
                the dense one is that of 1.
            sparsity: sets the width, in [0, 1).
            example_input: a batch as `run_batch` takes it; FLOPs are counted on it.
            options: skip, match_flops, allocation, init, generator of `sparse_ift`.

        Raises:
            ValueError: see `sparse_ift`; or a factory without ``width_multiplier``.
        """
        return sparse_ift(factory, "wide", sparsity, example_input=example_input, **options)


def joint_weight_decay(model: nn.Module, weight_decay: float) -> Tensor:
    """Decay of the product of linear factors, ``weight_decay / 2 * ||V U||^2``, for the loss.

    It takes the place of decaying U and V each; see `joint_decay_groups`. Zero (on no device in
    particular) if no layer has linear factors.

    Args:
        model: with factorized (``uv="linear"``) or doped layers.
        weight_decay: as the optimizer's, >= 0.

    Raises:
        ValueError: a negative weight decay.
    """
    _check_decay(weight_decay)
    total = torch.zeros(())
    for u, v in _factors(model):
        total = total.to(u.device) + folded(u, v).square().sum()
    return 0.5 * weight_decay * total


def joint_decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of an optimizer that decays everything but linear factors.

    Raises:
        ValueError: a negative weight decay.
    """
    _check_decay(weight_decay)
    factors = [parameter for pair in _factors(model) for parameter in pair]
    known = {id(parameter) for parameter in factors}
    others = [parameter for parameter in model.parameters() if id(parameter) not in known]
    groups = [{"params": others, "weight_decay": weight_decay}]
    return groups + ([{"params": factors, "weight_decay": 0.0}] if factors else [])


@dataclass(frozen=True)
class _Masking:
    """First masks of a transformed network, and what it costs with them."""

    sparsity: float
    skip: Sequence[str]
    match_flops: bool
    allocation: Spread
    init: Init
    generator: torch.Generator | None

    def report(
        self,
        kind: Kind,
        model: nn.Module,
        masked: Sequence[str],
        widths: dict[str, int],
        dense: int,
        example: Any,
    ) -> IFTReport:
        selection = select_parameters(model, include=tuple(masked))
        whole = MaskSet({n: torch.ones(r.shape, dtype=torch.bool) for n, r in selection.items()})
        counted = inference_flops(model, whole, example)
        per_weight = {n: counted.layers[n][0] / r.parameter.numel() for n, r in selection.items()}

        def flops(sparsity: float) -> float:
            saved = 0.0
            for name, density in _densities(selection, sparsity, self.allocation).items():
                numel = selection[name].parameter.numel()
                saved += (numel - kept_count(numel, density)) * per_weight[name]
            return counted.dense - saved

        wanted = self.sparsity
        if self.match_flops:
            coarse = max(TOLERANCE * dense, sum(per_weight.values()))
            wanted = _bisected(flops, dense, coarse)
        masks = self._first_masks(selection, wanted)
        samples = _samples(example)
        spent = inference_flops(model, masks, example).sparse
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        zeros = sum(int((~mask).sum()) for mask in masks.values())
        return IFTReport(
            kind=kind,
            sparsity=self.sparsity,
            mask_sparsity=wanted,
            flops_dense=dense / samples,
            flops_sparse=spent / samples,
            flops_executed=counted.dense / samples,
            params=trainable - zeros,
            widths=widths,
            masks=masks,
        )

    def _first_masks(self, selection: ParamSelection, sparsity: float) -> MaskSet:
        densities = _densities(selection, sparsity, self.allocation)
        if self.init == "topk":
            return build_masks(compute_scores(selection, "magnitude"), densities)
        source = self.generator or torch.Generator().manual_seed(0)
        return random_masks(selection, densities, self.init == "random", source)


def _bisected(flops: Callable[[float], float], budget: float, tolerance: float) -> float:
    """The sparsity at which the network costs its budget."""
    if flops(0.0) <= budget:
        return 0.0
    low, high = 0.0, MOST_SPARSE
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if flops(middle) > budget else (low, middle)
    nearest = min((low, high), key=lambda sparsity: abs(flops(sparsity) - budget))
    if abs(flops(nearest) - budget) > tolerance:
        raise ValueError(
            f"no mask sparsity in [0, {MOST_SPARSE}] costs the dense network's {budget:.0f} FLOPs; "
            f"the nearest, {nearest:.4f}, costs {flops(nearest):.0f}: lower the sparsity, or skip "
            "fewer layers"
        )
    return nearest


def _densities(selection: ParamSelection, sparsity: float, allocation: Spread) -> dict[str, float]:
    return allocate(selection, 1.0 - sparsity, allocation)


def _widened(factory: Factory, sparsity: float, example: Any, masking: _Masking) -> Transformed:
    _check_factory(factory)
    dense = factory(width_multiplier=1.0)
    model = factory(width_multiplier=SparseWide.multiplier(sparsity)) if sparsity else dense
    skipped = skipped_layers(model, masking.skip)
    names = [name for name in layer_names(model) if name not in skipped]
    _check_chosen(model, names, masking.skip)
    before = inference_flops(dense, None, example).dense
    weights = {name: model.get_submodule(name).weight for name in names}
    widths = {name: len(w) for name, w in weights.items() if isinstance(w, Tensor)}
    masked = [f"{name}.weight" for name in names]
    return Transformed(model, masking.report("wide", model, masked, widths, before, example))


def _rewritten(
    model: nn.Module,
    kind: Kind,
    names: Sequence[str],
    example: Any,
    sparsity: float,
    options: dict[str, Any],
) -> tuple[dict[str, int], list[str]]:
    """Replace layers in place; their branches or ranks, and the weights to mask."""
    norms = norms_after(model, names, example) if kind == "parallel" else {}
    widths: dict[str, int] = {}
    masked: list[str] = []
    for name in names:
        norm = model.get_submodule(norms[name]) if name in norms else None
        layer = replacement(model.get_submodule(name), kind, sparsity, norm, options)
        model.set_submodule(name, layer)
        widths[name] = layer.width
        masked += [f"{name}.{weight}" for weight in layer.masked_weights()]
    for norm_name in dict.fromkeys(norms.values()):
        model.set_submodule(norm_name, nn.Identity())
    return widths, masked


def _samples(example: Any) -> int:
    first = next(iter(example.values())) if isinstance(example, Mapping) else example
    first = first[0] if isinstance(first, (tuple, list)) else first
    return int(first.shape[0])


def _factors(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    layers = [module for module in model.modules() if isinstance(module, IsoFlopLayer)]
    pairs = [layer.factors() for layer in layers]
    return [pair for pair in pairs if pair is not None]


def _check(kind: str, sparsity: float, allocation: str, init: str) -> None:
    for argument, value, known in (
        ("kind", kind, get_args(Kind)),
        ("allocation", allocation, get_args(Spread)),
        ("init", init, get_args(Init)),
    ):
        check_choice(argument, value, known)
    check_sparsity(sparsity)
    if kind == "parallel":
        parallel_branches(sparsity)  # before anything is copied


def _check_chosen(model: nn.Module, names: Sequence[str], skip: Sequence[str]) -> None:
    if not names:
        raise ValueError(f"skip={tuple(skip)} leaves no layer of {type(model).__name__}")
    check_layers(model, names)


def _check_factory(factory: Factory) -> None:
    taken = inspect.signature(factory).parameters.values()
    if not any(p.name == "width_multiplier" or p.kind is p.VAR_KEYWORD for p in taken):
        name = getattr(factory, "__name__", repr(factory))
        raise ValueError(f"factory {name} must take width_multiplier, which Sparse Wide sets")


def _check_decay(weight_decay: float) -> None:
    check_number("weight_decay", weight_decay, "[0, inf)")


def _unskipped(model: nn.Module) -> tuple[str, ...]:
    """Weights of the layers that are replaced where nobody says which."""
    skipped = skipped_layers(model, ("stem", "head")) | matching_layers(model, SHORTCUTS)
    return tuple(f"{name}.weight" for name in layer_names(model) if name not in skipped)


def _factorized(model: nn.Module, weights: Sequence[str], sparsity: float) -> nn.Module:
    made = copy.deepcopy(model)
    named = {name.rpartition(".")[0] for name in weights}
    layers = [n for n in layer_names(made) if n in named and _groups(made.get_submodule(n)) == 1]
    _check_chosen(made, layers, ())
    _rewritten(made, "factorized", layers, None, sparsity, {})
    return made


def _groups(layer: nn.Module) -> int:
    return layer.groups if isinstance(layer, nn.Conv2d) else 1


def _masked(model: nn.Module) -> tuple[str, ...]:
    return tuple(
        f"{name}.{weight}"
        for name, layer in model.named_modules()
        if isinstance(layer, IsoFlopLayer)
        for weight in layer.masked_weights()
    )


def _rigl(model: nn.Module, optimizer: torch.optim.Optimizer, goal: Goal) -> RigL:
    if not goal.parameters:
        raise ValueError("model: it has no layer of Sparse-IFT; train what METHOD.rewrite gives")
    return dynamic(RigL, "uniform")(model, optimizer, goal)


METHOD = RewritingMethod(
    slug="sparse-ift",
    build=_rigl,
    patterns=("unstructured",),
    proposes=_unskipped,
    rewrite=_factorized,
    masked=_masked,
)
