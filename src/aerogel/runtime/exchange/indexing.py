"""ONNX operators that read and write at positions: gathers, scatters, slices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from aerogel.runtime.exchange.operators import Constant, OnnxNode, Value, host_aware, register
from aerogel.runtime.exchange.values import as_tensor, check_size, is_host, to_int, to_ints


@host_aware
def gather(x: Any, index: Any, axis: int = 0) -> Any:
    """Elements of one axis, in the order of an index of any rank."""
    if isinstance(x, list | tuple) and is_host(index):
        return [x[i] for i in index] if isinstance(index, list | tuple) else x[index]
    x = as_tensor(x)
    if isinstance(index, int):
        return x.select(axis, index)
    index = as_tensor(index).long()
    axis = axis % x.dim()
    index = torch.where(index < 0, index + x.shape[axis], index)
    found = x.index_select(axis, index.reshape(-1))
    return found.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


@host_aware
def take(x: Any, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Any:
    """A slice of each of the axes."""
    starts, ends = to_ints(starts), to_ints(ends)
    axes = list(range(len(starts))) if axes is None else to_ints(axes)
    steps = [1] * len(starts) if steps is None else to_ints(steps)
    if isinstance(x, list | tuple):
        (start,), (end,), (step,) = starts, ends, steps
        return list(x)[start:end:step]
    x = as_tensor(x)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis = axis % x.dim()
        if step > 0:
            x = x[(*[slice(None)] * axis, slice(start, end, step))]
        else:  # torch has no negative steps
            order = torch.tensor(range(x.shape[axis])[start:end:step], dtype=torch.int64)
            x = x.index_select(axis, order)
    return x


def gather_nd(x: Tensor, index: Tensor, batch_axes: int = 0) -> Tensor:
    """Slices at positions that the last axis of an index spells out."""
    index = as_tensor(index).long()
    if batch_axes == 0:
        return x[index.unbind(-1)]
    shared = x.shape[:batch_axes]
    flat = x.reshape(-1, *x.shape[batch_axes:])
    positions = index.reshape(flat.shape[0], -1, index.shape[-1])
    rows = torch.arange(flat.shape[0]).unsqueeze(1).expand(positions.shape[:2])
    found = flat[(rows, *positions.unbind(-1))]
    return found.reshape(*shared, *index.shape[batch_axes:-1], *found.shape[2:])


def scatter_nd(x: Tensor, index: Tensor, updates: Tensor, adds: bool = False) -> Tensor:
    """A copy with slices replaced (or added to) at given positions."""
    return x.index_put(as_tensor(index).long().unbind(-1), updates, accumulate=adds)


def scatter(x: Tensor, index: Any, updates: Tensor, axis: int, adds: bool = False) -> Tensor:
    """A copy with elements replaced (or added to) along an axis."""
    index = gather_index(x, index, axis)
    return x.scatter_add(axis, index, updates) if adds else x.scatter(axis, index, updates)


def gather_elements(x: Any, index: Any, axis: int) -> Tensor:
    """One element of an axis for each element of the index."""
    x = as_tensor(x)
    return x.gather(axis, gather_index(x, index, axis))


def gather_index(x: Tensor, index: Any, axis: int) -> Tensor:
    """An index along an axis without negative numbers."""
    index = as_tensor(index).long()
    return torch.where(index < 0, index + x.shape[axis], index)


def one_hot(index: Any, depth: Any, values: Any, axis: int) -> Tensor:
    """One value at the index, another elsewhere, along a new axis."""
    index, depth, values = as_tensor(index).long(), to_int(depth), as_tensor(values)
    check_size([*index.shape, depth], "OneHot's result")
    axis = axis % (index.dim() + 1)
    places = torch.arange(depth).reshape([-1] + [1] * (index.dim() - axis))
    hot = torch.where(index < 0, index + depth, index).unsqueeze(axis) == places
    return torch.where(hot, values[1], values[0])


@register("Gather")
def _gather(node: OnnxNode) -> Value:
    table, axis = node.need(0), node.integer("axis", 0)
    index = node.need(1)
    if isinstance(table, Constant) and not isinstance(index, Constant):
        weight = table.tensor
        if axis == 0 and weight.dim() == 2 and weight.is_floating_point():
            return node.layer(node.tensor(1), [id(table)], lambda: _embedding(node, table))
    return node.call(gather, table, index, axis)


def _embedding(node: OnnxNode, table: Constant) -> nn.Embedding:
    rows, width = table.tensor.shape
    layer = nn.Embedding(rows, width, device="meta")
    layer.weight = node.parameter(table)
    return layer


@register("Slice")
def _slice(node: OnnxNode) -> Value:
    starts, ends = node.numbers(1, "starts"), node.numbers(2, "ends")
    axes, steps = node.numbers(3, "axes"), node.numbers(4)
    return node.call(take, node.need(0), starts, ends, axes, steps)


@register("GatherND")
def _gather_nd(node: OnnxNode) -> Value:
    return node.call(gather_nd, node.tensor(0), node.tensor(1), node.integer("batch_dims", 0))


@register("GatherElements")
def _gather_elements(node: OnnxNode) -> Value:
    return node.call(gather_elements, node.tensor(0), node.tensor(1), node.integer("axis", 0))


@register("ScatterND")
def _scatter_nd(node: OnnxNode) -> Value:
    tensors = (node.tensor(i) for i in range(3))
    return node.call(scatter_nd, *tensors, _adds(node))


@register("ScatterElements", "Scatter")
def _scatter(node: OnnxNode) -> Value:
    tensors = (node.tensor(i) for i in range(3))
    return node.call(scatter, *tensors, node.integer("axis", 0), _adds(node))


def _adds(node: OnnxNode) -> bool:
    reduction = node.text("reduction", "none")
    if reduction not in ("none", "add"):
        node.fail(f"attribute reduction = {reduction!r}, expected 'none' or 'add'")
    return reduction == "add"


@register("OneHot")
def _one_hot(node: OnnxNode) -> Value:
    return node.call(
        one_hot, node.tensor(0), node.number(1), node.tensor(2), node.integer("axis", -1)
    )


@register("NonZero")
def _non_zero(node: OnnxNode) -> Value:
    return node.call(Tensor.t, node.call(torch.nonzero, node.tensor(0)))
