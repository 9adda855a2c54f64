"""Fast Sparse ConvNets: efficient networks whose 1x1 convolutions are sparse matrix products.

Paper: Elsen, Dukhan, Gale and Simonyan, "Fast Sparse ConvNets", CVPR 2020, arXiv 1911.09723.

The idea: MobileNets and EfficientNets spend nearly all their time in 1x1 convolutions, which are
products of a weight matrix and a matrix of pixels. Prune those, and nothing else, to 70-95 % zeros
while the network trains; then walk the non-zeros of the weight and load whole vectors of pixels,
which lie contiguous where activations are stored channel by channel. Late layers, with many weights
and few pixels, share their zeros over 2 or 4 neighbouring output channels, so that a load of
activations is used twice or four times.

Where its parts are:
    `PointwisePruner`             the training recipe (here): 1x1 layers, gradual, by magnitude
    `PUBLISHED`                   the networks of the paper: model, width, sparsity, blocks
    `aerogel.nn.SparseConv1x1`    a 1x1 convolution that is born sparse
    `aerogel.kernels.spmm`        the product, on `BlockRowWeight`; XNNPACK's rule picks the block
    `aerogel.runtime.sparsify_convs`  a trained network in, a fast one out, with a table of layers
    `aerogel.models`              MobileNet v1, v2 (`cache_aware=True`), EfficientNet B0 and B1

When to use it: convolutional networks made of depthwise and 1x1 layers that must run on CPUs.
Networks of 3x3 convolutions need `aerogel.compile` and its k x k kernels instead.

Costs and buys: training longer than the dense network (the paper does not say by how much; 1.5 to 2
times is our reading), with labels smoothed by 0.1. The paper reports 1.3 to 2.4 times the speed of
dense networks of equal accuracy on phones. Below half of zeros unstructured weights gain nothing;
blocks of 4 do from 30 %.

The claim this repository measures (``aerogel reproduce fast-sparse-convnets``): at 80 % zeros in
its 1x1 layers a MobileNet stays within 2 points of the dense network, beats a narrower dense one
with as many multiplications in 1x1 layers, and its 1x1 layers take at most 0.6 of the dense time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from aerogel.arguments import check_count, check_names, check_number
from aerogel.pruning.callbacks import PrunerCallback
from aerogel.pruning.method import Goal, TrainingMethod
from aerogel.pruning.scheduled import ScheduledPruner
from aerogel.sparsity.controller import MaskController
from aerogel.sparsity.coupling import Coupling, Frozen
from aerogel.sparsity.masks import MaskSet
from aerogel.sparsity.patterns import Block, Pattern, Unstructured
from aerogel.sparsity.schedules import Cubic
from aerogel.sparsity.select import ParamSelection, select_parameters, unknown_name
from aerogel.sparsity.updates import Rebuild

BEGIN, END = 0.10, 0.75  # of the steps: where zeros begin to come, and where all are there
LABEL_SMOOTHING = 0.1  # for the loss: `F.cross_entropy(..., label_smoothing=LABEL_SMOOTHING)`
BLOCK_WIDTHS = (1, 2, 4)  # what the kernels know


@dataclass(frozen=True)
class SparseConvNet:
    """A network of the paper, as its authors published it.

    Attributes:
        model: a name of `aerogel.models.create_model`.
        width: its multiplier of channels.
        sparsity: fraction of zeros in every pruned layer.
        blocks: which blocks of the network share zeros over neighbouring output channels, in the
            authors' notation: "12b4" is block 12 (counted from 0) by 4, "11-16b2" are blocks 11 to
            16 by 2.
        top1: ImageNet accuracy of the authors, per cent.
        milliseconds: theirs, one big core of a Snapdragon 835, batch 1.
        cache_aware: MobileNet v2 with expansions that fit the first cache.
        sparse_classifier: whether the last linear layer is pruned too.
    """

    model: str
    width: float
    sparsity: float
    blocks: str
    top1: float
    milliseconds: float
    cache_aware: bool = False
    sparse_classifier: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `aerogel.models.create_model` besides the name."""
        if self.model.startswith("efficientnet"):
            return {}
        return {"width": self.width} | ({"cache_aware": True} if self.cache_aware else {})


# By the authors' file names (google-research/fastconvnets), without the accuracy at their end. What
# they publish are TFLite programs with batch norm folded, not weights by layer: there is no state
# dict to convert, so only the networks are here.
PUBLISHED: dict[str, SparseConvNet] = {
    "mbv1_075_90_12b4": SparseConvNet("mobilenet_v1", 0.75, 0.90, "12b4", 64.4, 21),
    "mbv1_100_90_12b4": SparseConvNet("mobilenet_v1", 1.0, 0.90, "12b4", 68.4, 31),
    "mbv1_140_90_12b4": SparseConvNet("mobilenet_v1", 1.4, 0.90, "12b4", 72.0, 58),
    "mbv2_080_85_11-16b2": SparseConvNet("mobilenet_v2", 0.8, 0.85, "11-16b2", 65.2, 26),
    "mbv2ca_100_85_none": SparseConvNet(
        "mobilenet_v2", 1.0, 0.85, "none", 69.7, 33, cache_aware=True
    ),
    "mbv2_115_85_11-16b2": SparseConvNet("mobilenet_v2", 1.15, 0.85, "11-16b2", 70.2, 40),
    "mbv2_140_85_11-16b2": SparseConvNet("mobilenet_v2", 1.4, 0.85, "11-16b2", 72.0, 54),
    "mbv2_180_80_none": SparseConvNet("mobilenet_v2", 1.8, 0.80, "none", 74.9, 102),
    "mbv2_200_85_11-16b2": SparseConvNet("mobilenet_v2", 2.0, 0.85, "11-16b2", 74.5, 93),
    "enb0_80_none": SparseConvNet(
        "efficientnet_b0", 1.0, 0.80, "none", 75.1, 80, sparse_classifier=True
    ),
    "enb1_85_none": SparseConvNet(
        "efficientnet_b1", 1.0, 0.85, "none", 76.7, 110, sparse_classifier=True
    ),
}


class PointwisePruner(ScheduledPruner):
    """Prunes the 1x1 convolutions of a model while it trains; call `step` for the optimizer's.

    Magnitudes decide, the same sparsity holds in every layer and rises along a cubic curve; masked
    weights keep their value and may come back until the ramp ends. The first convolution and
    depthwise ones are never touched: a layer that is no plain 1x1 convolution is refused.

    Args:
        model: any module with 1x1 convolutions; pruned in place. What its `prune_targets()` names,
            if it has that, is pruned; else every plain 1x1 convolution.
        optimizer: the `torch.optim` optimizer that trains it.
        sparsity: fraction of zeros at the end, in [0, 1).
        steps: optimizer steps of the whole training.
        blocks: neighbouring output channels that share their zeros: 1, 2 or 4 for all layers; the
            authors' notation ("12b4", "11-16b2", "none") for models whose `features` hold a stem
            and then the blocks; or a mapping from globs of module names to 1, 2 or 4 (the first
            that matches counts, other layers are unstructured).
        layers: globs of module names to prune instead of all; they may also name linear layers
            (EfficientNet's classifier is sparse in the paper).
        begin: fraction of the steps at which pruning begins.
        end: fraction of the steps at which the last zeros come.
        frequency: optimizer steps between prunings.
        initial_sparsity: fraction of zeros at `begin`.
        power: exponent of the ramp.
        coupling: how masks act on weights; "frozen" as in the paper.

    Raises:
        ValueError: an argument out of range, no 1x1 convolution, a named layer that is not a plain
            1x1 convolution or linear, or a block that does not divide a layer's output channels.

    Reference:
        Elsen et al., arXiv 1911.09723; Zhu and Gupta, arXiv 1710.01878.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        sparsity: float,
        *,
        steps: int,
        blocks: int | str | Mapping[str, int] = 1,
        layers: Sequence[str] = (),
        begin: float = BEGIN,
        end: float = END,
        frequency: int = 100,
        initial_sparsity: float = 0.0,
        power: float = 3.0,
        coupling: Coupling | str = "frozen",
    ) -> None:
        ramp = _ramp(initial_sparsity, sparsity, steps, begin, end, frequency, power)
        self.model, self.sparsity = model, sparsity
        self.selection = select_pointwise(model, layers)
        self.patterns = block_patterns(self.selection, blocks)
        rule = Rebuild(pattern=self.patterns, rounding="round_kept", pool="avg")
        controller = MaskController(
            model, optimizer, self.selection, coupling, "uniform", ramp, rule
        )
        super().__init__(controller, ramp, sparsity)

    def finalize(self) -> MaskSet:
        """Bake the zeros into the weights, leave a plain model behind, and return the masks.

        Raises:
            RuntimeError: the training ended before the ramp did.
        """
        if self.t <= self._last_due:
            raise RuntimeError(
                f"finalized after {self.t} steps, before the last pruning at step "
                f"{self._last_due}: call pruner.step() for optimizer.step(), and give "
                "steps= of the whole training"
            )
        return self.controller.finalize()


def train_callback(sparsity: float, **options: Any) -> PrunerCallback:
    """A callback for `aerogel.train.fit`, which prunes 1x1 convolutions while it trains.

    Args:
        sparsity: fraction of zeros at the end.
        options: further arguments of `PointwisePruner`; `steps` is needed.
    """
    chosen = {"coupling": Frozen(in_place=True), **options}
    return PrunerCallback(
        lambda model, optimizer: PointwisePruner(model, optimizer, sparsity, **chosen)
    )


def is_pointwise(module: nn.Module) -> bool:
    """Whether a module is a plain 1x1 convolution: one matrix product over its pixels."""
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride == (1, 1)
        and module.padding in ((0, 0), "valid", "same")
        and module.groups == 1
    )


def select_pointwise(model: nn.Module, layers: Sequence[str] = ()) -> ParamSelection:
    """The weights that `PointwisePruner` prunes.

    Args:
        model: as there.
        layers: as there.

    Raises:
        ValueError: nothing to prune, or a layer named that cannot be.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    if layers:
        names = _named(modules, layers)
    elif callable(targets := getattr(model, "prune_targets", None)):
        names = [name for name, _ in targets() if is_pointwise(modules[name])]
    else:
        names = [name for name, module in modules.items() if is_pointwise(module)]
    if not names:
        raise ValueError(f"{type(model).__name__} has no plain 1x1 convolution to prune")
    return select_parameters(model, include=[f"{name}.weight" for name in names])


def _named(modules: Mapping[str, nn.Module], globs: Sequence[str]) -> list[str]:
    def fits(name: str) -> bool:
        return is_pointwise(modules[name]) or isinstance(modules[name], nn.Linear)

    check_names("layers", globs)
    for glob in globs:
        matched = [name for name in modules if fnmatchcase(name, glob)]
        if not matched:
            raise ValueError(f"layers: {unknown_name('layer', glob, modules)}")
        if not any(map(fits, matched)):
            raise ValueError(
                f"layers: {matched[0]!r} is {modules[matched[0]]}, expected a plain 1x1 "
                "convolution (stride 1, no padding, one group) or a linear layer"
            )
    return [n for n in modules if fits(n) and any(fnmatchcase(n, glob) for glob in globs)]


def block_patterns(
    selection: ParamSelection, blocks: int | str | Mapping[str, int]
) -> dict[str, Pattern]:
    """The pattern of each selected weight.

    Args:
        selection: of `select_pointwise`.
        blocks: as for `PointwisePruner`.

    Raises:
        ValueError: an unknown notation or width, a glob or a block number that matches nothing, or
            a width that does not divide a layer's output channels.
    """
    if isinstance(blocks, int):
        widths = dict.fromkeys(selection, blocks)
    elif isinstance(blocks, str):
        widths = _numbered_widths(selection, *parse_blocks(blocks))
    elif isinstance(blocks, Mapping):
        widths = _globbed_widths(selection, blocks)
    else:
        raise TypeError(f"blocks must be a width, a notation or a mapping, got {blocks!r}")
    patterns: dict[str, Pattern] = {}
    for name, width in widths.items():
        if width not in BLOCK_WIDTHS:
            raise ValueError(f"blocks: {name!r} by {width!r}, expected one of {BLOCK_WIDTHS}")
        outputs = selection[name].shape[0]
        if outputs % width:
            raise ValueError(
                f"blocks: {name!r} has {outputs} output channels, which {width} does not divide"
            )
        patterns[name] = Unstructured() if width == 1 else Block(width, 1)
    return patterns


def parse_blocks(notation: str) -> tuple[range, int]:
    """Numbers of the blocks and the width in the authors' notation.

    Args:
        notation: "none", "12b4" (block 12 by 4) or "11-16b2" (blocks 11 to 16 by 2).

    Raises:
        ValueError: anything else.
    """
    if notation == "none":
        return range(0), 1
    match = re.fullmatch(r"(\d+)(?:-(\d+))?b([124])", notation)
    if match is None or int(match[2] or match[1]) < int(match[1]):
        raise ValueError(f"blocks={notation!r}: expected 'none', or like '12b4' or '11-16b2'")
    return range(int(match[1]), int(match[2] or match[1]) + 1), int(match[3])


def _numbered_widths(selection: ParamSelection, numbers: range, width: int) -> dict[str, int]:
    """Blocks are counted from 0 after the stem: number n is `features.(n + 1)`."""
    widths = dict.fromkeys(selection, 1)
    for number in numbers:
        inside = [name for name in selection if name.startswith(f"features.{number + 1}.")]
        if not inside:
            raise ValueError(f"blocks: no pruned layer in block {number} (features.{number + 1})")
        widths |= dict.fromkeys(inside, width)
    return widths


def _globbed_widths(selection: ParamSelection, globs: Mapping[str, int]) -> dict[str, int]:
    widths = dict.fromkeys(selection, 1)
    for glob, width in reversed(list(globs.items())):
        inside = [n for n in selection if fnmatchcase(n.removesuffix(".weight"), glob)]
        if not inside:
            raise ValueError(unknown_name("blocks: layer", glob, selection))
        widths |= dict.fromkeys(inside, width)
    return widths


def _ramp(
    initial: float,
    sparsity: float,
    steps: int,
    begin: float,
    end: float,
    frequency: int,
    power: float,
) -> Cubic:
    check_number("sparsity", sparsity, "[0, 1)")
    check_number("initial_sparsity", initial, "[0, 1)")
    check_number("begin", begin, "[0, 1)")
    check_number("end", end, "(0, 1)")
    check_count("steps", steps, 2)
    check_count("frequency", frequency)
    if initial > sparsity:
        raise ValueError(
            f"expected 0 <= initial_sparsity <= sparsity < 1, got {initial} and {sparsity}"
        )
    if begin >= end:
        raise ValueError(f"expected 0 <= begin < end < 1 (of the steps), got {begin} and {end}")
    first = min(round(begin * steps), steps - 2)
    last = max(min(round(end * steps), steps - 1), first + 1)
    every = min(frequency, last - first)
    return Cubic(initial, sparsity, first, (last - first) // every, every, power)


_BLOCKS = {"unstructured": 1, "2x1": 2, "4x1": 4}  # pattern -> output channels that share zeros


def _build(model: nn.Module, optimizer: torch.optim.Optimizer, goal: Goal) -> PointwisePruner:
    begin, end, frequency = goal.window()
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


def _unfit(model: nn.Module) -> str | None:
    found = any(is_pointwise(module) for module in model.modules())
    return None if found else "it has no 1x1 convolutions"


METHOD = TrainingMethod(
    slug="fast-sparse-convnets",
    build=_build,
    patterns=tuple(_BLOCKS),
    proposes=lambda model: tuple(select_pointwise(model)),
    unfit=_unfit,
)
