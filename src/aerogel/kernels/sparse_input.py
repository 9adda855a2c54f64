"""Dense weights x activations with zeros: only the rows of the weight that are needed are read.

`y = activation(W x + bias (+ residual))` where inputs of at most a threshold's magnitude count as
zero: after a ReLU, or by a threshold that was found to cost nothing. The weight lies transposed,
(in, out), so that an input that is zero saves a contiguous row; which inputs those are is found in
the kernel. Reading a tenth of the rows takes about a tenth of the time.

Reference: Liu et al., Deja Vu: contextual sparsity for efficient LLMs at inference time, arXiv
2310.17157; Lee et al., CATS: contextually-aware thresholding for sparsity in large language models,
arXiv 2404.08763.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from aerogel.kernels._calls import address, checked_out, fits_native, needs_grad
from aerogel.kernels._library import native, native_in_use
from aerogel.kernels.spmm import (
    check_activation,
    check_operands,
    reference_activation,
    warn_of_device,
)
from aerogel.kernels.values import VALUE_TYPES, check_scales


def check_operands_of(
    x: Tensor,
    weight_t: Tensor,
    bias: Tensor | None,
    scales: Tensor | None,
    residual: Tensor | None,
    threshold: float,
) -> tuple[int, ...]:
    """The output's shape; ValueError names the operand that does not fit."""
    if weight_t.dim() != 2:
        raise ValueError(f"weight_t: shape {tuple(weight_t.shape)}, expected (in, out)")
    inputs, outputs = weight_t.shape
    check_scales(weight_t.dtype, scales, outputs)
    if not threshold >= 0:
        raise ValueError(f"threshold={threshold}: expected 0 or more")
    return check_operands(x, outputs, inputs, bias, residual, "tokens")


def dense_of(weight_t: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The (out, in) weight of a transposed one, for activations of this type."""
    dense = weight_t.t().to(dtype)
    return dense if scales is None else dense * scales[:, None].to(dtype)


def sparse_input_linear_reference(
    x: Tensor,
    weight_t: Tensor,
    bias: Tensor | None = None,
    *,
    scales: Tensor | None = None,
    threshold: float = 0.0,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """`sparse_input_linear` with `F.linear`: any dtype, any device, differentiable."""
    check_operands_of(x, weight_t, bias, scales, residual, threshold)
    kept = torch.where(x.abs() <= threshold, 0.0, x)  # NaN is kept
    y = F.linear(kept, dense_of(weight_t, scales, x.dtype), bias)
    return reference_activation(y if residual is None else y + residual, activation)


def sparse_input_linear(
    x: Tensor,
    weight_t: Tensor,
    bias: Tensor | None = None,
    *,
    scales: Tensor | None = None,
    threshold: float = 0.0,
    activation: str = "none",
    residual: Tensor | None = None,
    threads: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """A linear layer that reads only the weights of inputs whose magnitude exceeds a threshold.

    Native for float32 activations on the CPU and weights in float32, bfloat16 or int8; everything
    else, `AEROGEL_KERNELS=reference`, and whatever needs a gradient takes the torch reference. A
    weight whose input does not take part is never read: infinities and NaN in it have no effect.

    Args:
        x: (*, in), one to a few tokens; of eight tokens at a time, a row that several need is read
            once. Copied first if it is not contiguous.
        weight_t: (in, out), the transposed weight, the outputs of each input side by side
            (otherwise it is copied in every call). int8 with `scales`.
        bias: (out,) or None.
        scales: (out,) float32 for an int8 weight, see `quantize_rows`; else None.
        threshold: inputs of at most this magnitude do not take part, default 0. NaN does.
        activation: one of `ACTIVATIONS`, default "none".
        residual: (*, out), added before the activation.
        threads: default `torch.get_num_threads()`; the result does not depend on it.
        out: contiguous tensor to write to (no gradient flows then), another than `residual`.

    Returns:
        (*, out).

    Raises:
        ValueError: shapes, scales, threshold, activation, threads or out do not fit.
    """
    operands = (x, bias, scales, residual)
    differentiable = needs_grad((weight_t, *operands))
    if out is not None and (differentiable or torch.compiler.is_compiling()):
        raise ValueError("out: expected None where a gradient is needed and in traced code")
    if torch.compiler.is_compiling():
        return torch.ops.aerogel.sparse_input_linear(
            x, weight_t, bias, scales, residual, threshold, activation
        )
    return sparse_input_now(
        x, weight_t, bias, scales, residual, threshold, activation, threads, out
    )


def sparse_input_now(
    x: Tensor,
    weight_t: Tensor,
    bias: Tensor | None,
    scales: Tensor | None,
    residual: Tensor | None,
    threshold: float,
    activation: str,
    threads: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`sparse_input_linear` outside of tracing: what the op itself runs (see `spmm_now`)."""
    operands = (x, bias, scales, residual)
    differentiable = needs_grad((weight_t, *operands))
    fits = weight_t.is_cpu and weight_t.dtype in VALUE_TYPES and all(map(fits_native, operands))
    if differentiable or native_in_use() is None or not fits:
        warn_of_device(x.device.type)
        result = sparse_input_linear_reference(
            x, weight_t, bias,
            scales=scales, threshold=threshold, activation=activation, residual=residual,
        )  # fmt: skip
        return result if out is None else checked_out(out, x, tuple(result.shape)).copy_(result)
    shape = check_operands_of(x, weight_t, bias, scales, residual, threshold)
    y = x.new_empty(shape) if out is None else checked_out(out, x, shape)
    if out is not None and residual is not None and out.data_ptr() == residual.data_ptr():
        raise ValueError("out: expected another tensor than residual")
    _run(x, weight_t, bias, scales, residual, threshold, activation, threads, y)
    return y


def _run(
    x: Tensor,
    weight_t: Tensor,
    bias: Tensor | None,
    scales: Tensor | None,
    residual: Tensor | None,
    threshold: float,
    activation: str,
    threads: int | None,
    y: Tensor,
) -> None:
    code = check_activation(activation)
    threads = torch.get_num_threads() if threads is None else threads
    if threads < 1:
        raise ValueError(f"threads={threads}: expected at least 1")
    inputs, outputs = weight_t.shape
    if weight_t.stride(1) != 1 or weight_t.stride(0) < outputs:
        weight_t = weight_t.contiguous()
    # Copies are bound to names: they live until the kernel has read them.
    x = x.contiguous()
    bias, scales, residual = (
        None if each is None else each.contiguous() for each in (bias, scales, residual)
    )
    native().sparse_input(
        weight_t.data_ptr(), VALUE_TYPES[weight_t.dtype], address(scales),
        max(weight_t.stride(0), outputs), inputs, outputs, address(bias), x.data_ptr(),
        y.data_ptr(), address(residual), math.prod(x.shape[:-1]), threshold, code, threads,
    )  # fmt: skip
