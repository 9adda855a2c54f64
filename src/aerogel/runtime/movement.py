"""Where elements go: chains of views, transposes and slices, however a model spells them.

A chain is judged by what it does to the numbers of its source's elements, so that
`view(...).transpose(1, 2)`, `reshape(...).permute(...).unbind(0)[1]` and an einops pattern are all
the same to the passes.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from aerogel.runtime import graph

aten = torch.ops.aten

_MOVES = {
    aten.view.default,
    aten.reshape.default,
    aten.transpose.int,
    aten.permute.default,
    aten.t.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.select.int,
    aten.slice.Tensor,
    aten.unbind.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    operator.getitem,
}
# Larger sources are not traced: their elements' numbers would take more memory than they are worth.
_MOST_ELEMENTS = 1 << 25


def is_move(node: Any) -> bool:
    """Whether the node only rearranges its first argument."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.target not in _MOVES:
        return False
    return len(node.all_input_nodes) == 1


def origin(node: fx.Node) -> fx.Node:
    """The first node upstream that computes something."""
    while is_move(node):
        node = node.all_input_nodes[0]
    return node


def element_numbers(node: fx.Node, source: fx.Node) -> Tensor | None:
    """For every element of a node, its number in the source; None if that is too much to trace.

    Args:
        node: A tensor, made from the source by moves alone.
        source: `origin(node)`.
    """
    size = int(torch.Size(graph.shape(source)).numel())
    if size > _MOST_ELEMENTS:
        return None
    numbers = torch.arange(size, dtype=torch.int32).view(graph.shape(source))
    result = _follow(node, source, numbers)
    return result if isinstance(result, Tensor) else None


def _follow(node: fx.Node, source: fx.Node, numbers: Tensor) -> Any:
    chain = []
    while node is not source:
        chain.append(node)
        node = node.all_input_nodes[0]
    value: Any = numbers
    for step in reversed(chain):
        args, kwargs = fx.node.map_arg((step.args, step.kwargs), _Replace(value))
        value = step.target(*args, **kwargs)  # type: ignore[operator]
    return value


class _Replace:
    """Puts one value in the place of every node."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __call__(self, node: fx.Node) -> Any:
        return self._value
