"""Channel permutations that leave a network's function unchanged (P16).

Permuting the output channels of a layer, together with its bias, its normalisation and the input
channels of every consumer, changes nothing; but it decides which channels are neighbours, and so
what a block, N:M or kernel-group pattern has to remove.

    classes = permutation_classes(model, example)
    apply_permutation(model, classes[0], order)         # new channel i is old channel order[i]
    apply_permutation(model, classes[0], invert(order)) # back, bit for bit

A *class* is a set of channels that must move together: everything joined by additions,
multiplications and concatenations shares one permutation; inputs and outputs of the network stay.
Classes are found by tracing (see `channels`), conservatively: what passes through an operation that
is not understood keeps its order.

Reference: Pool & Yu, "Channel Permutations for N:M Sparsity", NeurIPS 2021; Fang et al.,
"DepGraph", arXiv 2301.12900.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.sparsity.channels.graph import ChannelGraph, ParamAxis
from aerogel.sparsity.channels.trace import NotTraceable, trace_channels

__all__ = [
    "ClassAxis",
    "NotTraceable",
    "PermutationClass",
    "apply_permutation",
    "invert",
    "permutation_classes",
]

State = nn.Module | Mapping[str, Tensor]


@dataclass(frozen=True)
class ClassAxis:
    """One axis of one tensor that moves with a class.

    Attributes:
        name: the tensor's name in the model's state.
        dim: the axis.
        rows: (start, stop) of axis 0 it is restricted to (grouped convolutions), or None.
        shape: of the tensor, to recognise the model.
        positions: int64 (channels of the class, occurrences): where each channel sits on the axis.
    """

    name: str
    dim: int
    rows: tuple[int, int] | None
    shape: tuple[int, ...]
    positions: Tensor


@dataclass(frozen=True)
class PermutationClass:
    """Channels that may be permuted, together, without changing the network.

    Attributes:
        name: the first tensor that produces them.
        size: number of channels.
        axes: every tensor axis that moves; axis 0 of weights of (out, in, ...) are producers.
    """

    name: str
    size: int
    axes: tuple[ClassAxis, ...]

    @property
    def producers(self) -> tuple[ClassAxis, ...]:
        """Axes along which weight matrices produce the channels."""
        return tuple(axis for axis in self.axes if axis.dim == 0 and len(axis.shape) > 1)

    @property
    def consumers(self) -> tuple[ClassAxis, ...]:
        """Axes along which weight matrices consume the channels."""
        return tuple(axis for axis in self.axes if axis.dim > 0)


def permutation_classes(model: nn.Module, example: Any) -> list[PermutationClass]:
    """The freely permutable channel classes of a network.

    Understood: linear, convolution (grouped, depthwise, transposed) and embedding layers, batch,
    layer, group, instance and RMS normalisation, torch's attention, activations, pooling,
    elementwise arithmetic, concatenation, splitting, flattening, transposing and means. Channels
    that pass through anything else, and those of the network's inputs and outputs, stay fixed.

    Args:
        model: a module that `torch.fx` can trace; weights shared by several layers are fine.
        example: example input, a tensor, a tuple of positional inputs or a mapping of keyword
            inputs; only shapes matter.

    Returns:
        Classes of at least two channels, in the order of their first tensor.

    Raises:
        NotTraceable: a `ValueError`: the model runs, but cannot be traced (says where).
        ValueError: the example does not run, or the model is parametrized.
    """
    graph = trace_channels(model, example)
    members = _partition(graph)
    classes = [_as_class(graph, channels) for channels in members]
    return [c for c in classes if c.axes]


@torch.no_grad()
def apply_permutation(
    target: State, permutation_class: PermutationClass, permutation: Sequence[int] | Tensor
) -> None:
    """Permute the channels of a class in place: new channel i is old channel `permutation[i]`.

    Args:
        target: the model, or a mapping of tensors by the model's names (masks, scores, averages):
            then those that are present are permuted.
        permutation_class: from `permutation_classes` of this model.
        permutation: of range(size).

    Raises:
        ValueError: not a permutation of the class's size, or another model's class.
    """
    order = torch.as_tensor(permutation, dtype=torch.int64).cpu()
    size = permutation_class.size
    if order.shape != (size,) or not torch.equal(order.sort().values, torch.arange(size)):
        raise ValueError(
            f"permutation must reorder the {size} channels of {permutation_class.name!r}, "
            f"got {tuple(order.shape)} entries that do not"
        )
    whole = isinstance(target, nn.Module)
    tensors = _state(target) if isinstance(target, nn.Module) else target
    for axis in permutation_class.axes:
        if axis.name not in tensors and not whole:
            continue
        if axis.name not in tensors or tuple(tensors[axis.name].shape) != axis.shape:
            raise ValueError(
                f"{axis.name!r} of shape {axis.shape} is not in this model; the class "
                f"{permutation_class.name!r} belongs to another one"
            )
    for axis in permutation_class.axes:
        if axis.name in tensors:
            _permute_axis_(tensors[axis.name], axis, order)


def invert(permutation: Sequence[int] | Tensor) -> Tensor:
    """The permutation that undoes `permutation`, int64.

    Raises:
        ValueError: not a permutation of range(n).
    """
    order = torch.as_tensor(permutation, dtype=torch.int64)
    if order.ndim != 1 or not torch.equal(order.sort().values, torch.arange(order.numel())):
        raise ValueError(f"permutation must reorder range(n), got {order.tolist()[:8]}")
    return order.argsort()


def _permute_axis_(tensor: Tensor, axis: ClassAxis, order: Tensor) -> None:
    view = tensor if axis.rows is None else tensor[slice(*axis.rows)]
    index = torch.arange(view.shape[axis.dim])
    index[axis.positions] = axis.positions[order]
    view.copy_(view.index_select(axis.dim, index.to(view.device)))


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {
        **{n: p.data for n, p in model.named_parameters()},
        **dict(model.named_buffers()),
    }


def _partition(graph: ChannelGraph) -> list[list[int]]:
    """Channels grouped by where they occur: those with equal occurrences may trade places."""
    signature: dict[int, list[tuple[int, int]]] = {}
    for vector, channels in enumerate(graph.occurrences()):
        counts: dict[int, int] = {}
        for channel in channels:
            counts[channel] = counts.get(channel, 0) + 1
        for channel, count in counts.items():
            signature.setdefault(channel, []).append((vector, count))
    classes: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for channel, where in signature.items():
        if not graph.is_fixed(channel):
            classes.setdefault(tuple(where), []).append(channel)
    return [channels for channels in classes.values() if len(channels) > 1]


def _as_class(graph: ChannelGraph, channels: list[int]) -> PermutationClass:
    rank = {channel: i for i, channel in enumerate(channels)}
    axes = []
    for axis in graph.axes:
        places: list[list[int]] = [[] for _ in channels]
        for position, channel in enumerate(graph.resolve(axis.channels)):
            if channel in rank:
                places[rank[channel]].append(position)
        if places[0]:
            axes.append(_class_axis(axis, torch.tensor(places)))
    name = axes[0].name if axes else ""
    return PermutationClass(name, len(channels), tuple(axes))


def _class_axis(axis: ParamAxis, positions: Tensor) -> ClassAxis:
    return ClassAxis(axis.name, axis.dim, axis.rows, axis.shape, positions)
