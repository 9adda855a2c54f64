"""ONNX operators between numbers and their quantised forms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aerogel.runtime.exchange.operators import OnnxNode, Value, register
from aerogel.runtime.exchange.values import as_tensor

_WHOLE = (torch.uint8, torch.int8, torch.uint16, torch.int16)


def _along(x: Tensor, part: Any, axis: int, block: int) -> Any:
    """A scale or zero point in a form that broadcasts: one, one a slice, or one a block."""
    part = as_tensor(part)
    if part.dim() == 0 or part.numel() == 1:
        return part.reshape(())
    if block:
        return part.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    return part.reshape([-1 if i == axis % x.dim() else 1 for i in range(x.dim())])


def dequantize(x: Any, scale: Any, zero: Any, axis: int, block: int) -> Tensor:
    """(x - zero) * scale."""
    x, scale = as_tensor(x), as_tensor(scale)
    values = x.to(torch.int32)
    if zero is not None:
        values = values - _along(x, zero, axis, block).to(torch.int32)
    return values.to(scale.dtype) * _along(x, scale, axis, block)


def quantize(x: Tensor, scale: Any, zero: Any, axis: int, block: int, dtype: torch.dtype) -> Tensor:
    """round(x / scale) + zero, to nearest even, held in the range of the dtype."""
    values = torch.round(x / _along(x, scale, axis, block))
    if zero is not None:
        values = values + _along(x, zero, axis, block).to(x.dtype)
    limits = torch.iinfo(dtype)
    return values.clamp(limits.min, limits.max).to(dtype)


@register("DequantizeLinear")
def _dequantize(node: OnnxNode) -> Value:
    axis, block = node.integer("axis", 1), node.integer("block_size", 0)
    zero = node.optional_tensor(2)
    return node.call(dequantize, node.tensor(0), node.tensor(1), zero, axis, block)


@register("QuantizeLinear")
def _quantize(node: OnnxNode) -> Value:
    zero, known = node.optional_tensor(2), node.constant(2)
    dtype = torch.uint8 if known is None else known.dtype
    if node.integer("output_dtype", 0):
        dtype = node.dtype("output_dtype")
    if (zero is not None and known is None) or dtype not in _WHOLE:
        node.fail("a zero point that is computed, or not a whole number of 8 or 16 bits")
    axis, block = node.integer("axis", 1), node.integer("block_size", 0)
    return node.call(quantize, node.tensor(0), node.tensor(1), zero, axis, block, dtype)


def dynamic_quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 values with the scale and zero point of what they range over."""
    low, high = x.amin().clamp(max=0.0), x.amax().clamp(min=0.0)
    scale = (high - low) / 255.0
    zero = torch.round(-low / scale).clamp(0, 255)
    values = (torch.round(x / scale) + zero).clamp(0, 255)
    return values.to(torch.uint8), scale, zero.to(torch.uint8)


@register("DynamicQuantizeLinear")
def _dynamic_quantize(node: OnnxNode) -> Any:
    return node.call(dynamic_quantize, node.tensor(0))


def integer_product(a: Tensor, b: Tensor, zero_a: Any, zero_b: Any) -> Tensor:
    """The int32 product of quantised matrices, without their zero points."""
    left, right = a.to(torch.int32), b.to(torch.int32)
    if zero_a is not None:
        zero_a = as_tensor(zero_a).to(torch.int32)
        left = left - (zero_a.unsqueeze(-1) if zero_a.dim() else zero_a)
    if zero_b is not None:
        right = right - as_tensor(zero_b).to(torch.int32)
    return left @ right


@register("MatMulInteger")
def _matmul_integer(node: OnnxNode) -> Value:
    zeros = node.optional_tensor(2), node.optional_tensor(3)
    return node.call(integer_product, node.tensor(0), node.tensor(1), *zeros)
