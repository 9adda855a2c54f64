"""ONNX operators that reduce, normalise or order along axes."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import BatchNorm2d

from aerogel.runtime.exchange.operators import (
    Constant,
    OnnxNode,
    Output,
    Value,
    host_aware,
    register,
)
from aerogel.runtime.exchange.values import as_tensor, to_int, to_ints

_HOST_REDUCTIONS: dict[str, Callable[[Any], Any]] = {
    "sum": sum,
    "prod": math.prod,
    "min": min,
    "max": max,
}


@host_aware
def reduced(x: Any, kind: str, axes: Any = None, keep: bool = True, noop: bool = False) -> Any:
    """A reduction over axes; over all if none are named, unless `noop` says over none."""
    axes = None if axes is None else to_ints(axes)
    if isinstance(x, list | tuple) and kind in _HOST_REDUCTIONS:
        number = _HOST_REDUCTIONS[kind](x)
        return [number] if keep else number
    x = as_tensor(x)
    if not axes:
        if noop:
            return x
        axes = list(range(x.dim()))
    return x if not axes else _REDUCTIONS[kind](x, tuple(axes), keep)


def _product(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


_REDUCTIONS: dict[str, Callable[[Tensor, tuple[int, ...], bool], Tensor]] = {
    "mean": lambda x, axes, keep: x.mean(axes, keepdim=keep),
    "sum": lambda x, axes, keep: x.sum(axes, keepdim=keep, dtype=x.dtype),
    "prod": _product,
    "min": lambda x, axes, keep: x.amin(axes, keepdim=keep),
    "max": lambda x, axes, keep: x.amax(axes, keepdim=keep),
    "l1": lambda x, axes, keep: x.abs().sum(axes, keepdim=keep, dtype=x.dtype),
    "l2": lambda x, axes, keep: x.square().sum(axes, keepdim=keep).sqrt(),
    "sum_square": lambda x, axes, keep: x.square().sum(axes, keepdim=keep, dtype=x.dtype),
    "log_sum": lambda x, axes, keep: x.sum(axes, keepdim=keep).log(),
    "log_sum_exp": lambda x, axes, keep: x.logsumexp(axes, keepdim=keep),
}
_REDUCE_OPS = {
    "ReduceMean": "mean", "ReduceSum": "sum", "ReduceProd": "prod", "ReduceMin": "min",
    "ReduceMax": "max", "ReduceL1": "l1", "ReduceL2": "l2", "ReduceSumSquare": "sum_square",
    "ReduceLogSum": "log_sum", "ReduceLogSumExp": "log_sum_exp",
}  # fmt: skip


@register(*_REDUCE_OPS)
def _reduce(node: OnnxNode) -> Value:
    keep, noop = bool(node.integer("keepdims", 1)), bool(node.integer("noop_with_empty_axes", 0))
    axes = node.numbers(1, "axes")
    return node.call(reduced, node.need(0), _REDUCE_OPS[node.op], axes, keep, noop)


def softmax(x: Tensor, axis: int, log: bool = False, flat: bool = False) -> Tensor:
    """Softmax along an axis; before opset 13 (`flat`) over it and all that follow."""
    function = F.log_softmax if log else F.softmax
    if not flat or axis in (-1, x.dim() - 1):
        return function(x, axis)
    return function(x.flatten(axis), -1).reshape(x.shape)


@register("Softmax", "LogSoftmax")
def _softmax(node: OnnxNode) -> Value:
    flat = node.opset < 13
    axis = node.integer("axis", 1 if flat else -1)
    return node.call(softmax, node.tensor(0), axis, node.op == "LogSoftmax", flat)


def arg_extreme(x: Tensor, axis: int, keep: bool, largest: bool) -> Tensor:
    """Position of the first largest or smallest element."""
    return (torch.argmax if largest else torch.argmin)(x, axis, keepdim=keep)


@register("ArgMax", "ArgMin")
def _arg(node: OnnxNode) -> Value:
    if node.integer("select_last_index", 0):
        node.fail("attribute select_last_index = 1")
    keep = bool(node.integer("keepdims", 1))
    return node.call(
        arg_extreme, node.tensor(0), node.integer("axis", 0), keep, node.op == "ArgMax"
    )


def top_k(x: Tensor, count: Any, axis: int, largest: bool) -> Any:
    """The largest or smallest elements and their places; of equal ones the first come first."""
    values, places = torch.sort(x, dim=axis, descending=largest, stable=True)
    return values.narrow(axis, 0, to_int(count)), places.narrow(axis, 0, to_int(count))


@register("TopK")
def _top_k(node: OnnxNode) -> Output:
    count = node.integer("k", None) if node.has("k") else node.number(1)
    largest = bool(node.integer("largest", 1))
    return node.call(top_k, node.tensor(0), count, node.integer("axis", -1), largest)


def cumulative(x: Tensor, axis: Any, exclusive: bool, reverse: bool) -> Tensor:
    """Running sums."""
    axis = to_int(axis)
    x = x.flip(axis) if reverse else x
    total = x.cumsum(axis, dtype=x.dtype)
    total = total - x if exclusive else total
    return total.flip(axis) if reverse else total


@register("CumSum")
def _cumsum(node: OnnxNode) -> Value:
    flags = bool(node.integer("exclusive", 0)), bool(node.integer("reverse", 0))
    return node.call(cumulative, node.tensor(0), node.number(1), *flags)


class BatchNorm(BatchNorm2d):
    """Batch normalisation of an input of any rank: the file does not say which it will be."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {tuple(input.shape)}")


@register("BatchNormalization")
def _batch_norm(node: OnnxNode) -> Value:
    node.only_first_output()
    if node.opset < 9 and not node.integer("spatial", 1):
        node.fail("attribute spatial = 0")
    parts = [node.need(i) for i in range(1, 5)]
    epsilon, momentum = node.real("epsilon", 1e-5), node.real("momentum", 0.9)
    if all(isinstance(part, Constant) for part in parts):
        key = [*(id(part) for part in parts), epsilon]
        return node.layer(node.tensor(0), key, lambda: _norm(node, parts, epsilon, momentum))
    scale, shift, mean, variance = parts
    return node.call(
        F.batch_norm, node.tensor(0), mean, variance, scale, shift, False, 1 - momentum, epsilon
    )


def _norm(node: OnnxNode, parts: list[Any], epsilon: float, momentum: float) -> BatchNorm:
    layer = BatchNorm(parts[0].tensor.numel(), eps=epsilon, momentum=1 - momentum)
    layer.weight, layer.bias = node.parameter(parts[0]), node.parameter(parts[1])
    layer.running_mean, layer.running_var = parts[2].tensor.clone(), parts[3].tensor.clone()
    return layer.eval()


def layer_norm(x: Tensor, scale: Any, shift: Any, axis: int, epsilon: float) -> Tensor:
    """Normalised over an axis and all that follow, then scaled and shifted (both broadcast)."""
    sizes = x.shape[axis:] if axis >= 0 else x.shape[x.dim() + axis :]
    y = F.layer_norm(x, sizes, eps=epsilon) * scale
    return y if shift is None else y + shift


def statistics(x: Tensor, axis: int, epsilon: float) -> tuple[Tensor, Tensor]:
    """Mean and inverse deviation over an axis and all that follow."""
    axes = tuple(range(axis % x.dim(), x.dim()))
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return mean, torch.rsqrt(variance + epsilon)


@register("LayerNormalization")
def _layer_norm(node: OnnxNode) -> Output:
    axis, epsilon = node.integer("axis", -1), node.real("epsilon", 1e-5)
    y = _layer_normed(node, axis, epsilon)
    if not any(node.outputs[1:]):
        return y
    both = node.call(statistics, node.tensor(0), axis, epsilon)
    return (y, *(node.call(operator.getitem, both, index) for index in (0, 1)))


def _layer_normed(node: OnnxNode, axis: int, epsilon: float) -> Value:
    scale, shift = node.need(1), node.optional(2)
    if isinstance(scale, Constant) and isinstance(shift, Constant | None):
        fits = shift is None or shift.tensor.shape == scale.tensor.shape
        if -axis == scale.tensor.dim() and fits:
            key = [id(scale), id(shift), epsilon]
            return node.layer(node.tensor(0), key, lambda: _layer(node, scale, shift, epsilon))
    return node.call(layer_norm, node.tensor(0), scale, shift, axis, epsilon)


def _layer(node: OnnxNode, scale: Constant, shift: Constant | None, epsilon: float) -> nn.LayerNorm:
    layer = nn.LayerNorm(scale.tensor.shape, eps=epsilon, bias=shift is not None)
    layer.weight = node.parameter(scale)
    if shift is not None:
        layer.bias = node.parameter(shift)
    return layer


@register("InstanceNormalization")
def _instance_norm(node: OnnxNode) -> Value:
    x, scale, shift = (node.tensor(i) for i in range(3))
    return node.call(F.instance_norm, x, weight=scale, bias=shift, eps=node.real("epsilon", 1e-5))


def group_norm(x: Tensor, scale: Tensor, shift: Tensor, groups: int, epsilon: float) -> Tensor:
    """Normalised in groups of channels; scale and shift for each channel, or for each group."""
    if scale.numel() == groups != x.shape[1]:
        repeats = x.shape[1] // groups
        scale, shift = scale.repeat_interleave(repeats), shift.repeat_interleave(repeats)
    return F.group_norm(x, groups, scale, shift, epsilon)


@register("GroupNormalization")
def _group_norm(node: OnnxNode) -> Value:
    tensors = (node.tensor(i) for i in range(3))
    return node.call(
        group_norm, *tensors, node.integer("num_groups", 1), node.real("epsilon", 1e-5)
    )


@register("LpNormalization")
def _lp_norm(node: OnnxNode) -> Value:
    order, axis = float(node.integer("p", 2)), node.integer("axis", -1)
    return node.call(F.normalize, node.tensor(0), order, axis)


@register("LRN")
def _local_response_norm(node: OnnxNode) -> Value:
    alpha, beta = node.real("alpha", 1e-4), node.real("beta", 0.75)
    return node.call(
        F.local_response_norm, node.tensor(0), node.integer("size", 1), alpha, beta,
        node.real("bias", 1.0),
    )  # fmt: skip


def dropout_mask(x: Tensor) -> Tensor:
    """What a dropout that drops nothing has kept."""
    return torch.ones_like(x, dtype=torch.bool)


@register("Dropout")
def _dropout(node: OnnxNode) -> Output:
    ratio = node.real("ratio", 0.5) if node.opset < 12 else node.number(1)
    ratio = 0.5 if ratio is None else ratio
    if not isinstance(ratio, float):
        node.fail("the ratio is computed")
    training = node.constant(2)
    if node.optional(2) is not None and (training is None or bool(training)):
        node.fail("training_mode is on")
    x = node.tensor(0)
    # A key of its own: every dropout is a layer.
    y = node.layer(x, [node.outputs[0]], lambda: nn.Dropout(ratio).eval())
    mask = node.call(dropout_mask, x) if any(node.outputs[1:]) else None
    return (y, mask)
