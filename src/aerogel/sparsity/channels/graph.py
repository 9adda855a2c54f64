"""Union-find over the channels of a network, and one operation's view of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

# Ids of one axis; a value's tracked axes. An axis that is not tracked keeps its order.
Channels = list[int]
Value = dict[int, Channels]

_FIXED = 0


@dataclass
class ParamAxis:
    """One axis of one parameter or buffer, with the channel at each position.

    Attributes:
        name: its name in the model's state.
        dim: the axis.
        rows: (start, stop) of axis 0 it is restricted to, None for all.
        shape: of the whole tensor.
        channels: ids, before `ChannelGraph.resolve`.
    """

    name: str
    dim: int
    rows: tuple[int, int] | None
    shape: tuple[int, ...]
    channels: Channels


class ChannelGraph:
    """Union-find over channels, and every place where they occur.

    Args:
        model: supplies parameter and buffer names; tensors shared by several layers have one.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parent = [_FIXED]
        self._vectors: list[Channels] = []
        self._axes: dict[tuple[str, int, tuple[int, int] | None], ParamAxis] = {}
        tensors = [*model.named_parameters(), *model.named_buffers()]
        self._names = {id(tensor): name for name, tensor in reversed(tensors)}

    def owns(self, tensor: Tensor) -> bool:
        """Whether it is a parameter or buffer of the model."""
        return id(tensor) in self._names

    @property
    def axes(self) -> list[ParamAxis]:
        """Every parameter axis met, in order."""
        return list(self._axes.values())

    def axis(self, tensor: Tensor, dim: int, rows: tuple[int, int] | None = None) -> Channels:
        """The channels along an axis of a parameter or buffer; the same ids every time."""
        name = self._names[id(tensor)]
        key = (name, dim, rows)
        if key not in self._axes:
            size = tensor.shape[dim]
            self._axes[key] = ParamAxis(name, dim, rows, tuple(tensor.shape), self._fresh(size))
        return self._axes[key].channels

    def tie(self, a: Channels | None, b: Channels | None) -> None:
        """The two axes carry the same channels; None is an axis that keeps its order."""
        if a is None or b is None:
            self.pin(a if b is None else b)
            return
        for x, y in zip(a, b, strict=True):
            self._union(x, y)

    def pin(self, channels: Channels | None) -> None:
        """These channels keep their places."""
        for channel in channels or ():
            self._union(channel, _FIXED)

    def note(self, channels: Channels) -> None:
        """Channels of this vector may only trade places among themselves."""
        self._vectors.append(channels)

    def is_fixed(self, channel: int) -> bool:
        """Whether a resolved channel is pinned."""
        return channel == self._find(_FIXED)

    def resolve(self, channels: Channels) -> Channels:
        """Representatives of the ids; equal ones are one channel."""
        return [self._find(channel) for channel in channels]

    def occurrences(self) -> Iterator[Channels]:
        """Every vector met, resolved: parameter axes first, in order."""
        for axis in self._axes.values():
            yield self.resolve(axis.channels)
        for vector in self._vectors:
            yield self.resolve(vector)

    def _fresh(self, count: int) -> Channels:
        start = len(self._parent)
        self._parent.extend(range(start, start + count))
        return list(range(start, start + count))

    def _find(self, channel: int) -> int:
        while self._parent[channel] != channel:
            self._parent[channel] = self._parent[self._parent[channel]]
            channel = self._parent[channel]
        return channel

    def _union(self, a: int, b: int) -> None:
        low, high = sorted((self._find(a), self._find(b)))
        self._parent[high] = low  # the fixed channel, 0, stays a representative


class Op:
    """One node with what a rule needs to know about it.

    Args:
        graph: where channels are tied and pinned.
        node: the recorded operation; its inputs carry "channels" and "shapes" in `meta`.
        result: what it returned on the example.
        model: holds the module of a module call.
    """

    def __init__(
        self, graph: ChannelGraph, node: fx.Node, result: Any, model: nn.Module | None = None
    ) -> None:
        self.graph, self.node, self.result = graph, node, result
        self.module: Any = None
        if node.op == "call_module" and model is not None:
            self.module = model.get_submodule(str(node.target))
        self.args = node.args

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        """A positional or keyword argument of a function call."""
        if index < len(self.args):
            return self.args[index]
        return self.node.kwargs.get(name, default)

    @property
    def x(self) -> fx.Node:
        """The first tensor input."""
        first = self.args[0] if self.args else self.node.kwargs.get("input")
        assert isinstance(first, fx.Node)
        return first

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result."""
        return tuple(self.result.shape)

    def pinned(self) -> Any:
        """Pin all inputs; the result keeps its order."""
        for node in self.node.all_input_nodes:
            for part in _parts(node.meta["channels"]):
                for channels in part.values():
                    self.graph.pin(channels)
        if isinstance(self.result, (tuple, list)):
            return [{} if isinstance(r, Tensor) else None for r in self.result]
        return {} if isinstance(self.result, Tensor) else None

    def keep(self, value: Value, dims: Any) -> Value:
        """`value` on some axes; the others are pinned."""
        for dim, channels in value.items():
            if dim not in dims:
                self.graph.pin(channels)
        return {dim: channels for dim, channels in value.items() if dim in dims}

    def tie_params(self, owner: nn.Module, names: str, dim: int, channels: Channels | None) -> None:
        """Tie an axis of several of a module's tensors (those that exist) to channels."""
        for name in names.split():
            tensor = getattr(owner, name, None)
            if isinstance(tensor, Tensor) and tensor.ndim > dim:
                self.graph.tie(self.graph.axis(tensor, dim), channels)


def _parts(value: Any) -> list[Value]:
    if isinstance(value, list):
        return [part for item in value for part in _parts(item)]
    return [] if value is None else [value]
