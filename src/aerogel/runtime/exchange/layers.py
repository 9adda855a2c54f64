"""ONNX operators with weights: matrix products and convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aerogel.runtime.exchange.operators import Constant, OnnxNode, Value, register
from aerogel.runtime.exchange.windows import explicit_pads, is_even, pad_same, padded

_CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def linear_layer(node: OnnxNode, weight: Constant, bias: Constant | None, transposed: bool) -> Any:
    """`nn.Linear` of a constant matrix: (in, out) as it is multiplied, or transposed (out, in)."""
    outputs, inputs = weight.tensor.shape if transposed else reversed(weight.tensor.shape)
    layer = nn.Linear(inputs, outputs, bias is not None, device="meta")
    layer.weight = node.parameter(weight, transposed=not transposed)
    if bias is not None:
        values = bias.tensor.flatten().expand(outputs).clone()
        layer.bias = nn.Parameter(values, requires_grad=values.is_floating_point())
    return layer


@register("MatMul")
def _matmul(node: OnnxNode) -> Value:
    x, weight = node.tensor(0), node.need(1)
    if isinstance(weight, Constant) and not isinstance(x, Constant):
        matrix = weight.tensor
        if matrix.dim() == 2 and matrix.is_floating_point():
            return node.layer(x, [id(weight)], lambda: linear_layer(node, weight, None, False))
    return node.call(torch.matmul, x, node.tensor(1))


def gemm(
    a: Tensor, b: Tensor, c: Any, alpha: float, beta: float, turn_a: bool, turn_b: bool
) -> Tensor:
    """alpha * a @ b + beta * c, either matrix transposed first."""
    product = alpha * ((a.t() if turn_a else a) @ (b.t() if turn_b else b))
    return product if c is None else product + beta * c


@register("Gemm")
def _gemm(node: OnnxNode) -> Value:
    a, b, c = node.tensor(0), node.need(1), node.optional(2)
    alpha, beta = node.real("alpha", 1.0), node.real("beta", 1.0)
    turn_a, turn_b = bool(node.integer("transA", 0)), bool(node.integer("transB", 0))
    plain = alpha == 1.0 and (c is None or beta == 1.0) and not turn_a
    if plain and isinstance(b, Constant) and isinstance(c, Constant | None):
        outputs = b.tensor.shape[0 if turn_b else 1]
        if b.tensor.dim() == 2 and (c is None or _is_row(c.tensor, outputs)):
            key = [id(b), id(c), turn_b]
            return node.layer(a, key, lambda: linear_layer(node, b, c, turn_b))
    return node.call(gemm, a, node.tensor(1), c, alpha, beta, turn_a, turn_b)


def _is_row(bias: Tensor, outputs: int) -> bool:
    return bias.numel() in (1, outputs) and (bias.dim() < 2 or bias.shape[-1] == bias.numel())


def einsum(*operands: Any, equation: str) -> Tensor:
    """Einstein's summation."""
    return torch.einsum(equation, *operands)


@register("Einsum")
def _einsum(node: OnnxNode) -> Value:
    operands = (node.tensor(i) for i in range(len(node.inputs)))
    return node.call(einsum, *operands, equation=node.text("equation", ""))


def _geometry(node: OnnxNode, spatial: int) -> tuple[list[int], list[int]]:
    strides, dilations = node.ints("strides", [1] * spatial), node.ints("dilations", [1] * spatial)
    for name, values in (("strides", strides), ("dilations", dilations)):
        if len(values) != spatial or min(values) < 1:
            node.fail(f"attribute {name} = {values}, expected {spatial} positive numbers")
    return strides, dilations


def _spatial(node: OnnxNode, weight: Value) -> int:
    """Over how many axes a weight slides."""
    spatial = len(node.ints("kernel_shape", []))
    if isinstance(weight, Constant):
        spatial = weight.tensor.dim() - 2
    if spatial not in _CONVS:
        node.fail(f"a weight that slides over {spatial} axes (or computed, with no kernel_shape)")
    return spatial


@register("Conv")
def _conv(node: OnnxNode) -> Value:
    weight, bias = node.need(1), node.optional(2)
    spatial = _spatial(node, weight)
    strides, dilations = _geometry(node, spatial)
    x = node.tensor(0)
    pads = explicit_pads(node, spatial)
    if pads is None:
        kernel = node.ints("kernel_shape", None) or _kernel(node, weight)
        upper = node.text("auto_pad", "NOTSET") == "SAME_UPPER"
        x = node.call(pad_same, x, kernel, strides, dilations, upper)
        pads = [0] * 2 * spatial
    elif not is_even(pads):
        x, pads = node.call(padded, x, pads), [0] * 2 * spatial
    padding, groups = pads[:spatial], node.integer("group", 1)
    if isinstance(weight, Constant) and isinstance(bias, Constant | None):
        settings = {"stride": strides, "padding": padding, "dilation": dilations, "groups": groups}
        key = [id(weight), id(bias), str(settings)]
        return node.layer(x, key, lambda: _conv_layer(node, weight, bias, settings))
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[spatial]
    return node.call(
        convolve, x, node.tensor(1), node.optional_tensor(2), strides, padding, dilations, groups
    )


def _kernel(node: OnnxNode, weight: Value) -> list[int]:
    if not isinstance(weight, Constant):
        node.fail("auto_pad with a computed weight and no kernel_shape")
    return list(weight.tensor.shape[2:])


def _conv_layer(
    node: OnnxNode, weight: Constant, bias: Constant | None, settings: dict[str, Any]
) -> nn.Module:
    values, groups = weight.tensor, settings["groups"]
    if groups < 1 or values.shape[0] % groups:
        node.fail(f"attribute group = {groups} with {values.shape[0]} output channels")
    layer: nn.Module = _CONVS[values.dim() - 2](
        values.shape[1] * groups,
        values.shape[0],
        tuple(values.shape[2:]),
        bias=bias is not None,
        device="meta",
        **{name: _tuple(value) for name, value in settings.items()},
    )
    layer.weight = node.parameter(weight)
    if bias is not None:
        layer.bias = node.parameter(bias)
    return layer


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def crop(x: Tensor, pads: Sequence[int]) -> Tensor:
    """Without the margins: (before each axis ..., after each axis ...)."""
    spatial = len(pads) // 2
    for i in range(spatial):
        axis = x.dim() - spatial + i
        x = x.narrow(axis, pads[i], x.shape[axis] - pads[i] - pads[spatial + i])
    return x


@register("ConvTranspose")
def _conv_transpose(node: OnnxNode) -> Value:
    weight, bias = node.need(1), node.optional(2)
    spatial = _spatial(node, weight)
    strides, dilations = _geometry(node, spatial)
    x, groups = node.tensor(0), node.integer("group", 1)
    extra = node.ints("output_padding", [0] * spatial)
    pads = explicit_pads(node, spatial)
    if pads is None or node.has("output_shape"):
        node.fail("an output shape that is given instead of paddings")
    margins = None if is_even(pads) else pads
    padding = pads[:spatial] if margins is None else [0] * spatial
    settings = {
        "stride": strides,
        "padding": padding,
        "output_padding": extra,
        "groups": groups,
        "dilation": dilations,
    }
    if isinstance(weight, Constant) and isinstance(bias, Constant | None):
        key = [id(weight), id(bias), str(settings)]
        y = node.layer(x, key, lambda: _transposed_layer(node, weight, bias, settings))
    else:
        function = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[spatial]
        y = node.call(function, x, node.tensor(1), node.optional_tensor(2), **settings)
    return y if margins is None else node.call(crop, y, margins)


def _transposed_layer(
    node: OnnxNode, weight: Constant, bias: Constant | None, settings: dict[str, Any]
) -> nn.Module:
    values, groups = weight.tensor, settings["groups"]
    layer: nn.Module = _TRANSPOSED[values.dim() - 2](
        values.shape[0],
        values.shape[1] * groups,
        tuple(values.shape[2:]),
        bias=bias is not None,
        device="meta",
        **{name: _tuple(value) for name, value in settings.items()},
    )
    layer.weight = node.parameter(weight)
    if bias is not None:
        layer.bias = node.parameter(bias)
    return layer
