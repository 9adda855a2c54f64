"""Sparse weights x dense activations: 1x1 convolutions and linear layers.

`y = activation(W x + bias (+ residual))` for a packed `W`, on activations as torch holds them:
`(batch, channels, *spatial)` or token-major `(*, features)`. Values that are not stored do not take
part: infinities and NaN in `x` reach exactly the outputs whose row stores their column.

Reference: Elsen, Dukhan, Gale, Simonyan, Fast Sparse ConvNets, arXiv 1911.09723.
"""

from __future__ import annotations

import difflib
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aerogel.kernels._calls import (
    PreparedCall,
    Rows,
    checked_out,
    kept_call,
    kept_stream,
    native_arrays,
    needs_grad,
    row_strides,
    runs_natively,
    version,
)
from aerogel.kernels._library import native, native_in_use
from aerogel.kernels.formats import BlockRowWeight
from aerogel.kernels.variants import LAYOUTS, SpmmVariant, default_variant

# Codes of csrc/epilogue.h.
ACTIVATIONS: dict[str, int] = {
    "none": 0,
    "relu": 1,
    "relu6": 2,
    "hardswish": 3,
    "silu": 4,
    "gelu": 5,
    "gelu_tanh": 6,
    "sigmoid": 7,
}

_REFERENCE_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
}


def reference_activation(x: Tensor, activation: str) -> Tensor:
    """The activation by name, in torch."""
    check_activation(activation)
    return _REFERENCE_ACTIVATIONS[activation](x)


def check_activation(activation: str) -> int:
    """The native code of an activation; ValueError names the nearest."""
    code = ACTIVATIONS.get(activation)
    if code is None:
        near = difflib.get_close_matches(str(activation), ACTIVATIONS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"activation={activation!r}: expected one of {', '.join(ACTIVATIONS)}{hint}"
        )
    return code


def output_shape(x: Tensor, rows: int, cols: int, layout: str) -> tuple[int, ...]:
    """Shape of the result, after checking that `x` fits a (rows, cols) weight."""
    shape = tuple(x.shape)
    if layout == "channels":
        if len(shape) < 2 or shape[1] != cols:
            raise ValueError(f"x: shape {shape}, expected (batch, {cols}, *spatial)")
        return (shape[0], rows, *shape[2:])
    if layout == "tokens":
        if not shape or shape[-1] != cols:
            raise ValueError(f"x: shape {shape}, expected (*, {cols})")
        return (*shape[:-1], rows)
    raise ValueError(f"layout={layout!r}: expected one of {', '.join(LAYOUTS)}")


def check_operands(
    x: Tensor, rows: int, cols: int, bias: Tensor | None, residual: Tensor | None, layout: str
) -> tuple[int, ...]:
    """The output's shape; ValueError names the operand that does not fit."""
    shape = output_shape(x, rows, cols, layout)
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"bias: shape {tuple(bias.shape)}, expected ({rows},)")
    if residual is not None and tuple(residual.shape) != shape:
        raise ValueError(f"residual: shape {tuple(residual.shape)}, expected {shape}")
    return shape


def linear_reference(x: Tensor, dense: Tensor, bias: Tensor | None, layout: str) -> Tensor:
    """W x + bias with a dense weight."""
    if layout == "tokens":
        return F.linear(x, dense, bias)
    planes = x.reshape(x.shape[0], x.shape[1], x.shape[2:].numel())
    out = torch.matmul(dense, planes)
    if bias is not None:
        out = out + bias[:, None]
    return out.reshape(x.shape[0], dense.shape[0], *x.shape[2:])


def spmm_reference(
    x: Tensor,
    weight: BlockRowWeight,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    layout: str = "channels",
) -> Tensor:
    """`spmm` with a dense product in torch: any dtype, any device, differentiable."""
    check_operands(x, *weight.shape, bias, residual, layout)
    out = linear_reference(x, weight.dense(x.dtype), bias, layout)
    if residual is not None:
        out = out + residual
    return reference_activation(out, activation)


def spmm(
    x: Tensor,
    weight: BlockRowWeight,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    layout: str = "channels",
    variant: SpmmVariant | None = None,
    threads: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Multiplies a packed weight by dense activations.

    Native for float32 activations on the CPU; other dtypes and devices (with a warning, once), and
    `AEROGEL_KERNELS=reference`, take the torch reference. Weights in bfloat16 and int8 are expanded
    to float32 once, when they are first used: many columns share each weight, so that reading it
    is not what takes the time (for one to a few vectors see `gemv`). Where a gradient is needed it
    goes through `torch.ops.aerogel.spmm`.

    Args:
        x: (batch, in, *spatial) for layout "channels", (*, in) for "tokens"; other strides than
            torch's default are copied first.
        weight: packed (out, in) weight.
        bias: (out,) or None.
        activation: one of `ACTIVATIONS`, default "none".
        residual: added before the activation; shape of the result.
        layout: "channels" or "tokens".
        variant: how to execute; default `spmm_variants(...)[0]`.
        threads: default `torch.get_num_threads()`; the result does not depend on it.
        out: contiguous tensor to write to (no gradient flows then).

    Returns:
        (batch, out, *spatial) or (*, out).

    Raises:
        ValueError: shapes, activation, layout, variant, threads or out do not fit.
    """
    operands = (x, bias, residual)
    if torch.compiler.is_compiling() or needs_grad((weight.values, *operands)):
        if out is not None:
            raise ValueError("out: expected None where a gradient is needed")
        values = weight.float_values().to(x.dtype) if weight.low_bit else weight.values
        parts = (values, weight.columns, weight.row_ptr, *weight.shape, weight.block)
        return torch.ops.aerogel.spmm(x, *parts, bias, residual, activation, layout)
    return spmm_now(x, weight, bias, activation, residual, layout, variant, threads, out)


def spmm_now(
    x: Tensor,
    weight: BlockRowWeight,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    layout: str,
    variant: SpmmVariant | None = None,
    threads: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`spmm` without gradients and outside of tracing: what the op itself runs.

    The op must not ask whether code is being traced: torch's answer is the process's, and another
    thread may be compiling.
    """
    operands = (x, bias, residual)
    if native_in_use() is None or not runs_natively(weight, operands):
        warn_of_device(x.device.type)
        result = spmm_reference(
            x, weight, bias, activation=activation, residual=residual, layout=layout
        )
        return result if out is None else checked_out(out, x, tuple(result.shape)).copy_(result)
    call = _prepared_call(x, weight, bias, residual, activation, layout, variant, threads)
    y = x.new_empty(call.shape) if out is None else checked_out(out, x, call.shape)
    call.run(x, y, bias, residual)
    return y


@functools.cache
def warn_of_device(kind: str) -> None:
    """Says once for each kind of device that nothing is gained there."""
    if kind != "cpu":
        warnings.warn(
            f"aerogel's kernels run on the CPU: activations on {kind!r} are multiplied by the "
            "dense weight in torch, zeros included",
            stacklevel=3,
        )


def _prepared_call(
    x: Tensor,
    weight: BlockRowWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    layout: str,
    variant: SpmmVariant | None,
    threads: int | None,
) -> PreparedCall:
    """The call for these shapes and strides; prepared once, then kept."""
    threads = torch.get_num_threads() if threads is None else threads
    key = (
        x.shape,
        x.stride(),
        None if bias is None else bias.shape,
        None if residual is None else (residual.shape, residual.stride()),
        activation,
        layout,
        variant,
        threads,
        native().isa(),
        version(weight),
    )
    return kept_call(
        weight,
        key,
        lambda: _prepare(x, weight, bias, residual, activation, layout, variant, threads),
    )


def _prepare(
    x: Tensor,
    weight: BlockRowWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    layout: str,
    variant: SpmmVariant | None,
    threads: int,
) -> PreparedCall:
    code = check_activation(activation)
    shape = check_operands(x, *weight.shape, bias, residual, layout)
    if threads < 1:
        raise ValueError(f"threads={threads}: expected at least 1")
    if 0 in shape:
        return PreparedCall(None, shape, False, False)
    batch = 1 if layout == "tokens" else x.shape[0]
    columns = math.prod(shape) // (batch * weight.shape[0])
    source = row_strides(x, columns, layout)
    contiguous = weight.shape[0] if layout == "tokens" else columns
    target = Rows(contiguous, weight.shape[0] * columns, False)
    extra = target if residual is None else row_strides(residual, columns, layout)
    if variant is None:
        variant = default_variant(weight, columns, layout)
    call = native().SpmmCall(
        native_weight(weight, variant, source.row, layout),
        *(source.row, source.image, target.row, target.image, extra.row, extra.image),
        *(columns, batch, code, layout == "tokens", threads),
    )
    return PreparedCall(call, shape, source.copy, extra.copy)


def native_weight(
    weight: BlockRowWeight, variant: SpmmVariant, ldx: int, layout: str = "channels"
) -> Any:
    """The native stream of a weight for one variant and row stride; packed once, then kept.

    Args:
        weight: float32 weight on the CPU.
        variant: how it will be executed; layout "tokens" always packs activations.
        ldx: floats from one row of activations to the next (a packing variant takes any).
        layout: "channels" or "tokens".

    Returns:
        A `_native.SpmmWeight`, immutable.
    """
    pack = variant.pack or layout == "tokens"
    module = native()
    key = (
        *variant[:4],
        variant.column_tiles,
        0 if pack else ldx,
        module.isa(),
        version(weight),
    )
    return kept_stream(weight, key, lambda: _pack_native(weight, variant, pack, ldx))


def _pack_native(weight: BlockRowWeight, variant: SpmmVariant, pack: bool, ldx: int) -> Any:
    module = native()
    parts = native_arrays(weight)
    native_variant = module.SpmmVariant(*variant._replace(pack=pack))
    return module.spmm_pack(
        *(part.data_ptr() for part in parts),
        *weight.shape,
        weight.block,
        native_variant,
        ldx,
    )
