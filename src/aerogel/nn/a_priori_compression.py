"""A priori compression: convolutions are written as one-way filters before training.

Paper: Boukraichi, Akkari, Casenave, Ryckelynck, "A priori compression of convolutional neural
networks for wave simulators", arXiv 2304.04964.

Idea: a small network is not cut out of a trained one but written small from the start. Every
kernel is a product of one-dimensional filters, one for each axis, and the filters are what is
learned. `compress_a_priori` replaces the convolutions of a fresh network; `fold` decides after
training, by measurement, which layers run faster multiplied out.

When: surrogates of simulations and other 3-D networks with k >= 3. For k = 3 and as many channels
out as in, a chain has 1/3 of the parameters in 3-D and 2/3 in 2-D; d - 1 more maps lie between.

Claim measured here: the claim of this system in `aerogel systems`.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aerogel.nn.oneway_conv import (
    MODES,
    OneWayConv,
    OneWayConv2d,
    OneWayConv3d,
    OneWayConvTranspose2d,
    OneWayConvTranspose3d,
)
from aerogel.runtime.timing import Measure, measure

Rank = str | int | Callable[[str, nn.Module], int]

_ONE_WAY: dict[type[nn.Module], type[OneWayConv]] = {
    nn.Conv2d: OneWayConv2d,
    nn.Conv3d: OneWayConv3d,
    nn.ConvTranspose2d: OneWayConvTranspose2d,
    nn.ConvTranspose3d: OneWayConvTranspose3d,
}


class FoldedLayer(NamedTuple):
    """One layer's race: seconds of either form and whether the dense one was taken."""

    name: str
    input_shape: tuple[int, ...]
    factored_seconds: float
    dense_seconds: float
    dense: bool


class Folded(NamedTuple):
    """What `fold` made: the network, and each layer's figures."""

    model: nn.Module
    layers: tuple[FoldedLayer, ...]


def compress_a_priori(
    model: nn.Module,
    *,
    mode: str = "chain",
    rank: Rank = "out",
    skip: Sequence[str] = ("first", "1x1"),
) -> nn.Module:
    """Replace the convolutions of an untrained network by one-way ones, freshly initialised.

    Args:
        model: holds `nn.Conv2d`, `nn.Conv3d` or their transposed kinds; not changed.
        mode: "chain", "per_kernel" or "cp"; see `aerogel.nn.OneWayConv2d`.
        rank: "out" for the mode's default, a number, or a function of (name, layer).
        skip: left as they are: "first" for the first convolution, "1x1" for kernels longer than
            1 along at most one axis (nothing to factor there), anything else is a shell pattern
            of layer names.

    Returns:
        A copy of the model with the layers replaced.

    Raises:
        ValueError: an unknown mode or rank, a layer that has no one-way form (named, so that it
            can be skipped), or no convolution left to replace.

    Reference:
        Boukraichi et al., arXiv 2304.04964.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: expected one of {', '.join(MODES)}")
    if isinstance(rank, str) and rank != "out":
        raise ValueError(f"rank={rank!r}: expected 'out', a number, or a function")
    made = copy.deepcopy(model)
    found = [(name, each) for name, each in made.named_modules() if type(each) in _ONE_WAY]
    replaced: dict[nn.Module, nn.Module] = {}
    for index, (name, conv) in enumerate(found):
        if not _skipped(name, conv, index == 0, skip):
            replaced[conv] = _one_way(name, conv, mode, rank)
    if not replaced:
        raise ValueError(f"model: no convolution to replace, with skip={tuple(skip)}")
    return _exchange(made, replaced)


@torch.no_grad()
def fold(
    model: nn.Module,
    *inputs: Any,
    seconds: float = 0.1,
    measure: Measure = measure,
) -> Folded:
    """After training: keep each one-way layer as it is or multiply it out, whichever is faster.

    Both forms are timed on the shape that the layer sees, interleaved, in inference mode; the
    factored one stays where they tie.

    Args:
        model: holds one-way layers; not changed.
        *inputs: one sample call of the model, of the shapes it will be used with.
        seconds: budget of each layer's race.
        measure: times the two forms.

    Returns:
        A copy of the model in evaluation mode, and the figures of each layer.

    Raises:
        ValueError: the model has no one-way layer, or the sample call reaches none of them.
    """
    made = copy.deepcopy(model).eval()
    layers = {each: name for name, each in made.named_modules() if isinstance(each, OneWayConv)}
    if not layers:
        raise ValueError("model: holds no one-way layer")
    seen = _seen_inputs(made, layers, inputs)
    if not seen:
        raise ValueError("inputs: the call reaches no one-way layer of the model")
    figures, replaced = [], {}
    for layer, x in seen.items():
        dense = layer.to_dense()
        times = measure(_contenders(layer, dense, x), seconds)
        faster = times["dense"] < times["factored"]
        if faster:
            replaced[layer] = dense
        shape = tuple(x.shape)
        figures.append(FoldedLayer(layers[layer], shape, times["factored"], times["dense"], faster))
    return Folded(_exchange(made, replaced), tuple(figures))


def _skipped(name: str, conv: Any, first: bool, skip: Sequence[str]) -> bool:
    if "1x1" in skip and sum(side > 1 for side in conv.kernel_size) < 2:
        return True
    if first and "first" in skip:
        return True
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in skip)


def _one_way(name: str, conv: nn.Module, mode: str, rank: Rank) -> nn.Module:
    chosen = rank(name, conv) if callable(rank) else rank
    wanted = None if isinstance(chosen, str) else chosen
    try:
        made = _ONE_WAY[type(conv)].shaped_like(conv, rank=wanted, mode=mode)
    except ValueError as error:
        raise ValueError(f"{name}: {error}; skip=({name!r},) leaves it as it is") from error
    return made.train(conv.training)


def _exchange(model: nn.Module, replaced: Mapping[Any, nn.Module]) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in replaced:
                setattr(parent, name, replaced[child])
    return replaced.get(model, model)


def _seen_inputs(
    model: nn.Module, layers: dict[OneWayConv, str], inputs: tuple[Any, ...]
) -> dict[OneWayConv, Tensor]:
    seen: dict[OneWayConv, Tensor] = {}

    def record(layer: Any, given: tuple[Tensor, ...]) -> None:
        seen.setdefault(layer, given[0].detach().clone())

    handles = [layer.register_forward_pre_hook(record) for layer in layers]
    try:
        model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _contenders(layer: nn.Module, dense: nn.Module, x: Tensor) -> dict[str, Callable[[], object]]:
    return {"factored": lambda: layer(x), "dense": lambda: dense(x)}
