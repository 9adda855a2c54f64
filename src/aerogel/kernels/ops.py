"""`torch.ops.aerogel.spmm` and `sddmm`: the packed products as PyTorch operators, with gradients.

Inference calls the kernels directly (an operator call costs more than many of the layers); the
operator exists for autograd, `torch.export` and `torch.compile`.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from aerogel.kernels.formats import BlockRowWeight, dense_weight
from aerogel.kernels.sddmm import as_planes, check_gradient, sddmm
from aerogel.kernels.spmm import check_activation, check_operands, linear_reference, spmm_now

_aten = torch.ops.aten


class PackedCache:
    """Packed weights by their values tensor, so that repeated calls reuse the native streams."""

    def __init__(self) -> None:
        self._entries: Any = WeakIdKeyDictionary()
        self._lock = threading.Lock()

    def get(
        self,
        values: Tensor,
        columns: Tensor,
        row_ptr: Tensor,
        shape: tuple[int, int],
        block: int,
        scales: Tensor | None = None,
    ) -> BlockRowWeight:
        """The weight of these parts, the one of an earlier call if they are the same."""
        state = (
            values._version if not values.is_inference() else None,
            values.data_ptr(),
            columns.data_ptr(),
            row_ptr.data_ptr(),
            None if scales is None else scales.data_ptr(),
            shape,
            block,
        )
        reusable = not values.is_inference()
        with self._lock:
            found = self._entries.get(values) if reusable else None
            if found is not None and found[0] == state:
                return found[1]
        weight = BlockRowWeight(values.detach(), columns, row_ptr, shape, block, scales)
        weight.check()
        if reusable:
            with self._lock:
                self._entries[values] = (state, weight)
        return weight


_packed = PackedCache()


@torch.library.custom_op("aerogel::spmm", mutates_args=())
def spmm_op(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    row_ptr: Tensor,
    rows: int,
    cols: int,
    block: int,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    layout: str,
) -> Tensor:
    """`aerogel.kernels.spmm` on the parts of a BlockRowWeight."""
    weight = _packed.get(values, columns, row_ptr, (rows, cols), block)
    with torch.no_grad():
        return spmm_now(x, weight, bias, activation, residual, layout)


@spmm_op.register_fake
def _(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    row_ptr: Tensor,
    rows: int,
    cols: int,
    block: int,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    layout: str,
) -> Tensor:
    check_activation(activation)
    return x.new_empty(check_operands(x, rows, cols, bias, residual, layout))


def activation_gradient(grad: Tensor, z: Tensor, activation: str) -> Tensor:
    """Gradient before the activation; z is the activation's input."""
    match activation:
        case "relu":
            return _aten.threshold_backward(grad, z, 0)
        case "relu6":
            return _aten.hardtanh_backward(grad, z, 0.0, 6.0)
        case "hardswish":
            return _aten.hardswish_backward(grad, z)
        case "silu":
            return _aten.silu_backward(grad, z)
        case "gelu":
            return _aten.gelu_backward(grad, z)
        case "gelu_tanh":
            return _aten.gelu_backward(grad, z, approximate="tanh")
        case "sigmoid":
            return _aten.sigmoid_backward(grad, torch.sigmoid(z))
    return grad


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, columns, row_ptr, rows, cols, block, bias, residual, activation, layout = inputs
    ctx.save_for_backward(x, values, columns, row_ptr, bias, residual)
    ctx.shape, ctx.block, ctx.activation, ctx.layout = (rows, cols), block, activation, layout


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, values, columns, row_ptr, bias, residual = ctx.saved_tensors
    dense = dense_weight(values, columns, row_ptr, ctx.shape, ctx.block)
    if ctx.activation != "none":
        z = linear_reference(x, dense, bias, ctx.layout)
        z = z if residual is None else z + residual
        grad = activation_gradient(grad.contiguous(), z, ctx.activation)
    grad_x = grad_values = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = linear_reference(grad, dense.t(), None, ctx.layout)
    if ctx.needs_input_grad[1]:
        parts = (columns, row_ptr, *ctx.shape, ctx.block, values.shape[0])
        grad_values = torch.ops.aerogel.sddmm(grad, x, *parts, ctx.layout)
    if bias is not None and ctx.needs_input_grad[7]:
        grad_bias = as_planes(grad, ctx.layout).sum((0, 2))
    grad_residual = grad if residual is not None and ctx.needs_input_grad[8] else None
    nothing = (None,) * 5
    return grad_x, grad_values, *nothing, grad_bias, grad_residual, None, None


spmm_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("aerogel::sddmm", mutates_args=())
def sddmm_op(
    grad: Tensor,
    x: Tensor,
    columns: Tensor,
    row_ptr: Tensor,
    rows: int,
    cols: int,
    block: int,
    num_values: int,
    layout: str,
) -> Tensor:
    """`aerogel.kernels.sddmm` on the pattern of a BlockRowWeight with so many values."""
    values = x.new_empty(num_values)
    weight = BlockRowWeight(values, columns, row_ptr, (rows, cols), block)
    with torch.no_grad():
        return sddmm(grad, x, weight, layout=layout)


@sddmm_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    columns: Tensor,
    row_ptr: Tensor,
    rows: int,
    cols: int,
    block: int,
    num_values: int,
    layout: str,
) -> Tensor:
    check_gradient(grad, x, (rows, cols), layout)
    return x.new_empty(num_values)


def _sddmm_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, x, columns, row_ptr, rows, cols, block, _, layout = inputs
    ctx.save_for_backward(grad, x, columns, row_ptr)
    ctx.shape, ctx.block, ctx.layout = (rows, cols), block, layout


def _sddmm_backward(ctx: Any, second: Tensor) -> tuple[Tensor | None, ...]:
    grad, x, columns, row_ptr = ctx.saved_tensors
    dense = dense_weight(second, columns, row_ptr, ctx.shape, ctx.block)
    of_grad = of_x = None
    if ctx.needs_input_grad[0]:
        of_grad = linear_reference(x, dense, None, ctx.layout)
    if ctx.needs_input_grad[1]:
        of_x = linear_reference(grad, dense.t(), None, ctx.layout)
    return of_grad, of_x, *(None,) * 7


sddmm_op.register_autograd(_sddmm_backward, setup_context=_sddmm_context)
