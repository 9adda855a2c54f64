"""Which operators a native plan knows, and how each enters it.

In a plan of the spatial family a (batch, C, H, W) tensor is the value (C, H, W) of each image,
(batch, T, F) tokens are (F, T), a (batch, F) tensor and pooled (batch, C, 1, 1) planes are vectors.
In a plan of the tokens family a (..., F) tensor is one value of F features by tokens, and in one of
the sequences family these are the tokens of whole sequences, and (batch, F) has a column for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from aerogel.runtime import graph, ops
from aerogel.runtime.emission import Emission, NativeOp, is_pooled
from aerogel.runtime.layer import epilogue, plain_arguments
from aerogel.runtime.segments import EITHER, SPATIAL, TOKENS

aten = torch.ops.aten


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _emit_layer(emission: Emission, node: fx.Node) -> Any:
    candidate = emission.chosen[node]
    assert candidate.emit is not None
    _, residual = epilogue(node)
    x = emission.values[plain_arguments(node)[0]]
    added = None if residual is None else emission.values[residual]
    return candidate.emit(emission.builder, x, added)


def _linear_family(node: fx.Node) -> str:
    return EITHER if len(graph.shape(node)) == 2 else TOKENS


def _elementwise_family(node: fx.Node) -> str | None:
    return {2: EITHER, 3: TOKENS, 4: SPATIAL}.get(len(graph.shape(node)))


def _emit_activation(emission: Emission, node: fx.Node) -> Any:
    x, kind = node.args
    return emission.builder.activation(emission.values[x], str(kind))


def _pair(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The operands of a sum or product, the larger first; None if a plan cannot combine them."""
    left, right = node.args[:2]
    if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
        return None
    if "get_attr" in (left.op, right.op) or graph.arguments(node).get("alpha", 1) != 1:
        return None
    if not (graph.is_float32(left) and graph.is_float32(right)):
        return None
    out = graph.shape(node)
    if graph.shape(left) != out:
        left, right = right, left
    per_channel = is_pooled(graph.shape(right)) and graph.shape(right)[:2] == out[:2]
    fits = graph.shape(right) == out or per_channel
    return (left, right) if graph.shape(left) == out and fits else None


def pair_family(node: fx.Node) -> str | None:
    """Of a sum or product of two values."""
    return None if _pair(node) is None else _elementwise_family(node)


def emit_pair(method: str) -> Callable[[Emission, fx.Node], Any]:
    """For the builder's `add` or `mul`."""

    def emit(emission: Emission, node: fx.Node) -> Any:
        operands = _pair(node)
        assert operands is not None
        left, right = (emission.values[each] for each in operands)
        return getattr(emission.builder, method)(left, right)

    return emit


def _global_pool_family(node: fx.Node) -> str | None:
    rank, args = len(graph.shape(_source(node))), graph.arguments(node)
    if rank == 3 and node.target is aten.mean.dim:  # over tokens
        plain = not args["keepdim"] and args["dtype"] is None
        return SPATIAL if plain and [axis % 3 for axis in args["dim"] or ()] == [1] else None
    if rank != 4:
        return None
    if node.target is aten.mean.dim:
        axes = sorted(axis % 4 for axis in args["dim"] or ())
        return SPATIAL if axes == [2, 3] and args["dtype"] is None else None
    return SPATIAL if list(args["output_size"]) in ([1], [1, 1]) else None


def _emit_global_pool(emission: Emission, node: fx.Node) -> Any:
    x = emission.values[_source(node)]
    return x if len(x.shape) == 1 else emission.builder.global_avg_pool(x)


def _window_family(node: fx.Node) -> str | None:
    """Windows over planes; a divisor of its own is torch's alone."""
    own_divisor = graph.arguments(node).get("divisor_override") is not None
    source = graph.shape(_source(node))
    return SPATIAL if len(source) == 4 and not is_pooled(source) and not own_divisor else None


def _emit_max_pool(emission: Emission, node: fx.Node) -> Any:
    args = graph.arguments(node)
    return emission.builder.max_pool2d(
        emission.values[_source(node)],
        args["kernel_size"],
        args["stride"] or None,
        args["padding"],
        args["dilation"],
        args["ceil_mode"],
    )


def _emit_avg_pool(emission: Emission, node: fx.Node) -> Any:
    args = graph.arguments(node)
    return emission.builder.avg_pool2d(
        emission.values[_source(node)],
        args["kernel_size"],
        args["stride"] or None,
        args["padding"],
        args["ceil_mode"],
        args["count_include_pad"],
    )


def _flatten_family(node: fx.Node) -> str | None:
    """(batch, C, H, W) -> (batch, C * H * W), however it is spelled."""
    before, after = graph.shape(_source(node)), graph.shape(node)
    flat = (before[0], math.prod(before[1:]))
    return SPATIAL if len(before) == 4 and after == flat else None


def _emit_flatten(emission: Emission, node: fx.Node) -> Any:
    x = emission.values[_source(node)]
    return x if len(x.shape) == 1 else emission.builder.flatten(x)


NATIVE_OPS: dict[Any, NativeOp] = {
    ops.conv2d: NativeOp(lambda node: SPATIAL, _emit_layer),
    ops.linear: NativeOp(_linear_family, _emit_layer),
    ops.activation: NativeOp(_elementwise_family, _emit_activation),
    aten.add.Tensor: NativeOp(pair_family, emit_pair("add")),
    aten.mul.Tensor: NativeOp(pair_family, emit_pair("mul")),
    aten.max_pool2d.default: NativeOp(_window_family, _emit_max_pool),
    aten.avg_pool2d.default: NativeOp(_window_family, _emit_avg_pool),
    aten.adaptive_avg_pool2d.default: NativeOp(_global_pool_family, _emit_global_pool),
    aten.mean.dim: NativeOp(_global_pool_family, _emit_global_pool),
    aten.flatten.using_ints: NativeOp(_flatten_family, _emit_flatten),
    aten.view.default: NativeOp(_flatten_family, _emit_flatten),
    aten.reshape.default: NativeOp(_flatten_family, _emit_flatten),
}
