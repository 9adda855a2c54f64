"""`torch.ops.aerogel.gemv` and `sparse_input_linear`, for `torch.export` and `torch.compile`.

Inference calls the kernels directly, which costs less. Gradients are those of the references, with
respect to everything but the weights: kernels for decoding are not what a weight is trained with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aerogel.kernels.formats import BlockRowWeight
from aerogel.kernels.gemv import gemv_now
from aerogel.kernels.ops import PackedCache, activation_gradient
from aerogel.kernels.sparse_input import check_operands_of, dense_of, sparse_input_now
from aerogel.kernels.spmm import check_activation, check_operands, linear_reference

_packed = PackedCache()


@torch.library.custom_op("aerogel::gemv", mutates_args=())
def gemv_op(
    x: Tensor,
    values: Tensor,
    scales: Tensor | None,
    columns: Tensor,
    row_ptr: Tensor,
    rows: int,
    cols: int,
    block: int,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """`aerogel.kernels.gemv` on the parts of a BlockRowWeight."""
    weight = _packed.get(values, columns, row_ptr, (rows, cols), block, scales)
    with torch.no_grad():
        return gemv_now(x, weight, bias, activation, residual)


@gemv_op.register_fake
def _(
    x: Tensor,
    values: Tensor,
    scales: Tensor | None,
    columns: Tensor,
    row_ptr: Tensor,
    rows: int,
    cols: int,
    block: int,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    check_activation(activation)
    return x.new_empty(check_operands(x, rows, cols, bias, residual, "tokens"))


def _gemv_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, scales, columns, row_ptr, rows, cols, block, bias, residual, activation = inputs
    ctx.save_for_backward(x, values, scales, columns, row_ptr, bias, residual)
    ctx.shape, ctx.block, ctx.activation = (rows, cols), block, activation


def _gemv_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, values, scales, columns, row_ptr, bias, residual = ctx.saved_tensors
    weight = BlockRowWeight(values, columns, row_ptr, ctx.shape, ctx.block, scales)
    dense = weight.dense(x.dtype)
    before = _before_activation(grad, x, dense, bias, residual, ctx.activation)
    of_x, of_bias, of_residual = _operand_gradients(
        before, dense, bias, residual, [ctx.needs_input_grad[i] for i in (0, 8, 9)]
    )
    return of_x, *(None,) * 7, of_bias, of_residual, None


gemv_op.register_autograd(_gemv_backward, setup_context=_gemv_context)


def _before_activation(
    grad: Tensor,
    x: Tensor,
    dense: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """The gradient of the activation's input."""
    if activation == "none":
        return grad
    z = linear_reference(x, dense, bias, "tokens")
    z = z if residual is None else z + residual
    return activation_gradient(grad.contiguous(), z, activation)


def _operand_gradients(
    grad: Tensor, dense: Tensor, bias: Tensor | None, residual: Tensor | None, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    of_x = grad @ dense if wanted[0] else None
    of_bias = grad.flatten(0, -2).sum(0) if bias is not None and wanted[1] else None
    return of_x, of_bias, grad if residual is not None and wanted[2] else None


@torch.library.custom_op("aerogel::sparse_input_linear", mutates_args=())
def sparse_input_linear_op(
    x: Tensor,
    weight_t: Tensor,
    bias: Tensor | None,
    scales: Tensor | None,
    residual: Tensor | None,
    threshold: float,
    activation: str,
) -> Tensor:
    """`aerogel.kernels.sparse_input_linear`."""
    with torch.no_grad():
        return sparse_input_now(x, weight_t, bias, scales, residual, threshold, activation)


@sparse_input_linear_op.register_fake
def _(
    x: Tensor,
    weight_t: Tensor,
    bias: Tensor | None,
    scales: Tensor | None,
    residual: Tensor | None,
    threshold: float,
    activation: str,
) -> Tensor:
    check_activation(activation)
    return x.new_empty(check_operands_of(x, weight_t, bias, scales, residual, threshold))


def _sparse_input_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight_t, bias, scales, residual, threshold, activation = inputs
    ctx.save_for_backward(x, weight_t, bias, scales, residual)
    ctx.threshold, ctx.activation = threshold, activation


def _sparse_input_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight_t, bias, scales, residual = ctx.saved_tensors
    passed_over = x.abs() <= ctx.threshold
    dense = dense_of(weight_t, scales, x.dtype)
    kept = torch.where(passed_over, 0.0, x)
    before = _before_activation(grad, kept, dense, bias, residual, ctx.activation)
    of_x, of_bias, of_residual = _operand_gradients(
        before, dense, bias, residual, [ctx.needs_input_grad[i] for i in (0, 2, 4)]
    )
    of_x = None if of_x is None else torch.where(passed_over, 0.0, of_x)
    return of_x, None, of_bias, None, of_residual, None, None


sparse_input_linear_op.register_autograd(
    _sparse_input_backward, setup_context=_sparse_input_context
)
