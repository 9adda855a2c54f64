"""Give layers and activations one name each, whichever ATen operator spelled them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from aerogel.runtime import graph, ops

aten = torch.ops.aten


def name_layers(gm: fx.GraphModule) -> fx.GraphModule:
    """Rewrite convolutions, products with a constant matrix and activations into `runtime.ops`.

    Only what the ops can say is rewritten: two-dimensional convolutions with symmetric padding,
    float matrices known at compile time, the activations of `ops.IN_PLACE`.
    """
    gm = graph.clone(gm)
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        rewrite = _REWRITES.get(node.target)
        if rewrite is not None:
            rewrite(gm, node)
    return graph.tidy(gm)


def _pair(value: Any) -> tuple[int, int]:
    values = [value] if isinstance(value, int) else list(value)
    return (values[0], values[0]) if len(values) == 1 else (values[0], values[1])


def _conv2d(gm: fx.GraphModule, node: fx.Node) -> None:
    args = graph.arguments(node)
    if len(graph.shape(args["input"])) != 4:
        return
    padding = _symmetric_padding(args, graph.shape(args["weight"]))
    if padding is None:
        return
    stride, dilation = _pair(args["stride"]), _pair(args["dilation"])
    layer = graph.replace(
        node,
        ops.conv2d,
        (args["input"], args["weight"], args["bias"], stride, padding, dilation, args["groups"]),
    )
    layer.meta["layer"] = _layer_name(layer, args["weight"])


def _symmetric_padding(args: dict[str, Any], weight: tuple[int, ...]) -> tuple[int, int] | None:
    """Padding as numbers; None for a "same" that pads one side more than the other."""
    padding = args["padding"]
    if padding == "valid":
        return (0, 0)
    if padding != "same":
        return _pair(padding)
    dilation = _pair(args["dilation"])
    total = [dilation[axis] * (weight[2 + axis] - 1) for axis in (0, 1)]
    return None if any(each % 2 for each in total) else (total[0] // 2, total[1] // 2)


def _linear(gm: fx.GraphModule, node: fx.Node) -> None:
    args = graph.arguments(node)
    if graph.constant(gm, args["weight"]) is None or len(graph.shape(args["input"])) < 2:
        return
    layer = graph.replace(node, ops.linear, (args["input"], args["weight"], args["bias"]))
    layer.meta["layer"] = _layer_name(layer, args["weight"])


def _addmm(gm: fx.GraphModule, node: fx.Node) -> None:
    args = graph.arguments(node)
    bias = graph.constant(gm, args["self"])
    if args["alpha"] == 1 and args["beta"] == 1 and bias is not None and bias.dim() == 1:
        _product(gm, node, args["mat1"], args["mat2"], args["self"])


def _matmul(gm: fx.GraphModule, node: fx.Node) -> None:
    args = graph.arguments(node)
    right = args["other"] if "other" in args else args["mat2"]
    _product(gm, node, args["self"], right, None)


def _product(
    gm: fx.GraphModule, node: fx.Node, left: Any, right: Any, bias: fx.Node | None
) -> None:
    """x @ M (+ bias) with a constant M (in, out) is a linear layer with M transposed."""
    matrix = graph.constant(gm, right)
    if matrix is None or matrix.dim() != 2 or len(graph.shape(left)) < 2:
        return
    fits = bias is None or graph.shape(bias) == (matrix.shape[1],)
    if not matrix.is_floating_point() or not fits:
        return
    transposed = graph.add_constant(gm, f"{right.target}_t", matrix.t().contiguous(), node)
    layer = graph.replace(node, ops.linear, (left, transposed, bias))
    layer.meta["layer"] = _layer_name(layer, right)


def _layer_name(layer: fx.Node, weight: Any) -> str:
    """The module's path where the weight is a parameter, else the node's own name."""
    path = weight.meta.get("fqn") if isinstance(weight, fx.Node) else None
    return str(path).removesuffix(".weight") if path else layer.name


def _activation(kind: str) -> Callable[[fx.GraphModule, fx.Node], None]:
    def rewrite(gm: fx.GraphModule, node: fx.Node) -> None:
        graph.replace(node, ops.activation, (node.args[0], kind))

    return rewrite


def _clamp(gm: fx.GraphModule, node: fx.Node) -> None:
    args = graph.arguments(node)
    low = args.get("min", args.get("min_val"))
    high = args.get("max", args.get("max_val"))
    kind = _CLAMPS.get((low, high))
    if kind is not None:
        graph.replace(node, ops.activation, (args["self"], kind))


def _gelu(gm: fx.GraphModule, node: fx.Node) -> None:
    args = graph.arguments(node)
    kind = "gelu_tanh" if args["approximate"] == "tanh" else "gelu"
    graph.replace(node, ops.activation, (args["self"], kind))


def _layer_norm(gm: fx.GraphModule, node: fx.Node) -> None:
    """The decomposed norm, where only its first result is read."""
    results = list(node.users)
    if len(results) != 1 or results[0].target is not operator.getitem or results[0].args[1] != 0:
        return
    args = graph.arguments(node)
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    graph.replace(results[0], aten.layer_norm.default, tuple(args[name] for name in names))


def _product_with_gate(gm: fx.GraphModule, node: fx.Node) -> None:
    """x * sigmoid(x), as some write silu."""
    left, right = node.args
    for x, gate in ((left, right), (right, left)):
        if (
            isinstance(gate, fx.Node)
            and gate.target is ops.activation
            and gate.args == (x, "sigmoid")
            and len(gate.users) == 1
        ):
            graph.replace(node, ops.activation, (x, "silu"))
            return


_CLAMPS: dict[tuple[Any, Any], str] = {
    (0, 6): "relu6",
    (0, None): "relu",
    (0, math.inf): "relu",
}

_REWRITES: dict[Any, Callable[[fx.GraphModule, fx.Node], None]] = {
    aten.conv2d.default: _conv2d,
    aten.conv2d.padding: _conv2d,
    aten.linear.default: _linear,
    aten.addmm.default: _addmm,
    aten.mm.default: _matmul,
    aten.matmul.default: _matmul,
    aten.relu.default: _activation("relu"),
    aten.relu6.default: _activation("relu6"),
    aten.hardswish.default: _activation("hardswish"),
    aten.silu.default: _activation("silu"),
    aten.sigmoid.default: _activation("sigmoid"),
    aten.gelu.default: _gelu,
    aten.native_layer_norm.default: _layer_norm,
    aten.hardtanh.default: _clamp,
    aten.clamp.default: _clamp,
    aten.clamp_min.default: _clamp,
    aten.mul.Tensor: _product_with_gate,
}
