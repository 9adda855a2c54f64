"""ONNX operators that make and rearrange: shapes, slices, joins, views."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aerogel.runtime.exchange.operators import (
    Constant,
    OnnxNode,
    Output,
    Value,
    host_aware,
    register,
)
from aerogel.runtime.exchange.values import as_tensor, check_size, is_host, to_int, to_ints, to_list

# Longer lists of one number are tensors.
_MAX_HOST = 64


@host_aware
def shape(x: Any, start: int = 0, end: int | None = None) -> Any:
    """Sizes of a tensor (or of a list of numbers), or a part of them."""
    if is_host(x):
        sizes = [len(x)] if isinstance(x, list | tuple) else []
    else:
        sizes = list(x.shape)
    return sizes[start:end]


@host_aware
def size(x: Any) -> Any:
    """The number of elements."""
    return math.prod(shape(x))


@host_aware
def concat(parts: Sequence[Any], axis: int) -> Any:
    """Parts joined along an axis."""
    if all(isinstance(part, list | tuple) for part in parts):
        return [number for part in parts for number in part]
    like = next((part for part in parts if isinstance(part, Tensor)), None)
    return torch.cat([as_tensor(part, like) for part in parts], axis)


@host_aware
def unsqueeze(x: Any, axes: Any) -> Any:
    """With axes of size one put in, at places of the result."""
    axes = to_ints(axes)
    if is_host(x) and not isinstance(x, list | tuple) and axes in ([0], [-1]):
        return [x]
    x = as_tensor(x)
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


@host_aware
def squeeze(x: Any, axes: Any = None) -> Any:
    """Without axes of size one: all, or those named."""
    if isinstance(x, list | tuple) and len(x) == 1:
        return x[0]
    x = as_tensor(x)
    if axes is None:
        return x.squeeze()
    axes = to_ints(axes)
    if any(x.shape[axis] != 1 for axis in axes):
        raise ValueError(f"axes {axes} of {tuple(x.shape)} are not all of size one")
    return x.squeeze(tuple(axes))


@host_aware
def reshape(x: Any, sizes: Any, allow_zero: bool = False) -> Any:
    """In another shape; -1 is worked out, and 0 (unless allowed) keeps what was there."""
    sizes = to_ints(sizes)
    if is_host(x):
        numbers = to_list(x)
        if sizes in ([-1], [len(numbers)]):
            return numbers
        if sizes == [] and len(numbers) == 1:
            return numbers[0]
        x = as_tensor(x)
    if not allow_zero:
        sizes = [x.shape[i] if isinstance(n, int) and n == 0 else n for i, n in enumerate(sizes)]
    return x.reshape(sizes)


def flatten(x: Tensor, axis: int) -> Tensor:
    """(axes before the given one, all others)."""
    axis = axis + x.dim() if axis < 0 else axis
    if axis == 1:
        return x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def transpose(x: Tensor, order: Sequence[int] | None) -> Tensor:
    """Axes in another order; by default the reverse."""
    return x.permute(*(order or range(x.dim() - 1, -1, -1)))


@host_aware
def expand(x: Any, sizes: Any) -> Any:
    """Broadcast against a shape."""
    sizes = to_ints(sizes)
    if is_host(x) and len(sizes) == 1 and isinstance(sizes[0], int) and sizes[0] <= _MAX_HOST:
        numbers = to_list(x)
        return numbers * sizes[0] if len(numbers) == 1 else numbers
    x = as_tensor(x)
    full = torch.broadcast_shapes(x.shape, tuple(sizes))
    check_size(full, "Expand's result")
    return x.expand(full)


def tile(x: Any, repeats: Any) -> Tensor:
    """Repeated along every axis."""
    x, repeats = as_tensor(x), to_ints(repeats)
    check_size([n * r for n, r in zip(x.shape, repeats, strict=True)], "Tile's result")
    return x.repeat(repeats)


@host_aware
def filled(sizes: Any, number: Any, dtype: torch.dtype) -> Any:
    """One number everywhere."""
    sizes = to_ints(sizes)
    if (
        dtype == torch.int64
        and len(sizes) == 1
        and isinstance(sizes[0], int)
        and sizes[0] <= _MAX_HOST
    ):
        check_size(sizes, "ConstantOfShape's result")
        return [number] * sizes[0]
    check_size(sizes, "ConstantOfShape's result")
    return torch.full(sizes, number, dtype=dtype)


def count(start: Any, limit: Any, step: Any) -> Tensor:
    """Numbers from start up to the limit."""
    like = next((each for each in (start, limit, step) if isinstance(each, Tensor)), None)
    first, last, by = (each.item() if isinstance(each, Tensor) else each
                       for each in (start, limit, step))  # fmt: skip
    if by == 0:
        raise ValueError("Range steps by 0")
    if all(isinstance(each, int | float) for each in (first, last, by)):
        check_size([max(math.ceil((last - first) / by), 0)], "Range's result")
    return torch.arange(first, last, by, dtype=None if like is None else like.dtype)


def parts_of(x: Any, sizes: Any, axis: int, pieces: int) -> Any:
    """A tensor cut along an axis: into given sizes, or into so many that differ least."""
    x = as_tensor(x)
    if sizes is None:
        each = -(-x.shape[axis] // pieces)
        sizes = [each] * (pieces - 1) + [x.shape[axis] - each * (pieces - 1)]
    return torch.split(x, to_ints(sizes), axis)


def triangle(x: Tensor, diagonal: Any, upper: bool) -> Tensor:
    """The part of matrices on one side of a diagonal."""
    return (torch.triu if upper else torch.tril)(x, to_int(diagonal))


def depth_to_space(x: Tensor, block: int, columns_first: bool) -> Tensor:
    """Channels laid out as block x block pixels."""
    if columns_first:
        return F.pixel_shuffle(x, block)
    batch, channels, height, width = x.shape
    x = x.reshape(batch, block, block, channels // block**2, height, width)
    x = x.permute(0, 3, 4, 1, 5, 2)
    return x.reshape(batch, channels // block**2, height * block, width * block)


def space_to_depth(x: Tensor, block: int, columns_first: bool) -> Tensor:
    """Pixels of block x block gathered as channels."""
    if columns_first:
        return F.pixel_unshuffle(x, block)
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // block, block, width // block, block)
    x = x.permute(0, 3, 5, 1, 2, 4)
    return x.reshape(batch, channels * block**2, height // block, width // block)


@register("Identity")
def _identity(node: OnnxNode) -> Value:
    return node.need(0)


@register("Constant")
def _constant(node: OnnxNode) -> Value:
    name = node.outputs[0]
    value = node.tensor_attribute("value")
    if value is not None:
        return Constant(value, name)
    for key, dtype in (("value_int", torch.int64), ("value_float", torch.float32)):
        if node.has(key):
            number = node.integer(key, 0) if key == "value_int" else node.real(key, 0.0)
            return Constant(torch.tensor(number, dtype=dtype), name)
    for key, dtype in (("value_ints", torch.int64), ("value_floats", torch.float32)):
        if node.has(key):
            numbers = node.ints(key) if key == "value_ints" else node.floats(key)
            return Constant(torch.tensor(numbers, dtype=dtype), name)
    node.fail("a constant that is not numbers")


@register("Shape")
def _shape(node: OnnxNode) -> Value:
    call = node.call(shape, node.need(0), node.integer("start", 0), node.integer("end", None))
    return _maybe_numbers(call)


@register("Size")
def _size(node: OnnxNode) -> Value:
    return _maybe_numbers(node.call(size, node.need(0)))


def _maybe_numbers(value: Value) -> Value:
    """Mark what gives numbers, whatever it is given."""
    if not isinstance(value, Constant):
        value.meta["host"] = True
    return value


@register("Concat")
def _concat(node: OnnxNode) -> Value:
    return node.call(concat, node.all_inputs(), node.integer("axis", 1))


@register("Unsqueeze")
def _unsqueeze(node: OnnxNode) -> Value:
    return node.call(unsqueeze, node.need(0), node.numbers(1, "axes"))


@register("Squeeze")
def _squeeze(node: OnnxNode) -> Value:
    return node.call(squeeze, node.need(0), node.numbers(1, "axes"))


@register("Reshape")
def _reshape(node: OnnxNode) -> Value:
    sizes = node.numbers(1, "shape")
    return node.call(reshape, node.need(0), sizes, bool(node.integer("allowzero", 0)))


@register("Flatten")
def _flatten(node: OnnxNode) -> Value:
    return node.call(flatten, node.tensor(0), node.integer("axis", 1))


@register("Transpose")
def _transpose(node: OnnxNode) -> Value:
    return node.call(transpose, node.tensor(0), node.ints("perm"))


@register("Expand")
def _expand(node: OnnxNode) -> Value:
    return node.call(expand, node.need(0), node.numbers(1))


@register("Tile")
def _tile(node: OnnxNode) -> Value:
    return node.call(tile, node.tensor(0), node.numbers(1))


@register("ConstantOfShape")
def _constant_of_shape(node: OnnxNode) -> Value:
    value = node.tensor_attribute("value")
    value = torch.zeros(1) if value is None else value
    if value.numel() != 1:
        node.fail(f"attribute value has {value.numel()} elements, expected one")
    call = node.call(filled, node.numbers(0), value.item(), value.dtype)
    return _maybe_numbers(call) if value.dtype == torch.int64 else call


@register("Range")
def _range(node: OnnxNode) -> Value:
    return node.call(count, *(node.need(i) for i in range(3)))


@register("Split")
def _split(node: OnnxNode) -> Output:
    sizes, pieces = node.numbers(1, "split"), len(node.outputs)
    return node.call(parts_of, node.tensor(0), sizes, node.integer("axis", 0), pieces)


@register("Trilu")
def _trilu(node: OnnxNode) -> Value:
    diagonal = 0 if node.optional(1) is None else node.number(1)
    return node.call(triangle, node.tensor(0), diagonal, bool(node.integer("upper", 1)))


@register("DepthToSpace")
def _depth_to_space(node: OnnxNode) -> Value:
    columns_first = node.text("mode", "DCR") == "CRD"
    return node.call(depth_to_space, node.tensor(0), node.integer("blocksize", 0), columns_first)


@register("SpaceToDepth")
def _space_to_depth(node: OnnxNode) -> Value:
    columns_first = node.text("mode", "DCR") == "CRD"
    return node.call(space_to_depth, node.tensor(0), node.integer("blocksize", 0), columns_first)


@register("EyeLike")
def _eye_like(node: OnnxNode) -> Value:
    dtype = node.dtype("dtype") if node.has("dtype") else None
    return node.call(eye_like, node.tensor(0), node.integer("k", 0), dtype)


def eye_like(x: Tensor, diagonal: int, dtype: torch.dtype | None) -> Tensor:
    """Ones on a diagonal of a matrix of the same size."""
    ones = torch.ones_like(x, dtype=dtype)
    return torch.triu(torch.tril(ones, diagonal), diagonal)
