"""Convolution with sparse weights, any kernel, without unfolding the image.

The weight is a packed matrix (out, in / groups * kh * kw), each row a flattened kernel:
`BlockRowWeight.pack(conv.weight.flatten(1))`. For a panel of outputs the input rows it needs are
copied once, with their padding, to scratch that the caches hold, and every tap reads them from its
own offset; otherwise the product is that of `spmm`. Values that are not stored do not take part:
infinities and NaN in `x` reach exactly the outputs whose row stores a tap over them.

Reference: Elsen, Dukhan, Gale, Simonyan, Fast Sparse ConvNets, arXiv 1911.09723 (the product);
Park et al., Faster CNNs with Direct Sparse Convolutions and Guided Pruning, arXiv 1608.01409 (taps
as offsets).
"""

from __future__ import annotations

from collections.abc import Sequence
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
from aerogel.kernels.spmm import check_activation, reference_activation
from aerogel.kernels.variants import SpmmVariant, sparse_conv_variants
from aerogel.kernels.window import ConvGeometry


def _checked_shape(
    x: Tensor,
    weight: BlockRowWeight,
    bias: Tensor | None,
    geometry: ConvGeometry,
    residual: Tensor | None,
) -> tuple[int, ...]:
    """Shape of the result; ValueError names the operand that does not fit."""
    if x.dim() != 4:
        raise ValueError(f"x: shape {tuple(x.shape)}, expected (batch, channels, height, width)")
    shape = (x.shape[0], *geometry.output_shape(weight, tuple(x.shape[1:])))
    if bias is not None and bias.shape != shape[1:2]:
        raise ValueError(f"bias: shape {tuple(bias.shape)}, expected ({shape[1]},)")
    if residual is not None and tuple(residual.shape) != shape:
        raise ValueError(f"residual: shape {tuple(residual.shape)}, expected {shape}")
    return shape


def sparse_conv2d_reference(
    x: Tensor,
    weight: BlockRowWeight,
    bias: Tensor | None = None,
    *,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """`sparse_conv2d` with a dense `F.conv2d`: any dtype, any device, differentiable."""
    geometry = ConvGeometry.of(kernel_size, stride, padding, dilation, groups)
    check_activation(activation)
    _checked_shape(x, weight, bias, geometry, residual)
    return _reference(x, weight, bias, geometry, activation, residual)


def _reference(
    x: Tensor,
    weight: BlockRowWeight,
    bias: Tensor | None,
    geometry: ConvGeometry,
    activation: str,
    residual: Tensor | None,
) -> Tensor:
    y = dense_conv2d(x, weight, bias, geometry)
    return reference_activation(y if residual is None else y + residual, activation)


def dense_conv2d(
    x: Tensor, weight: BlockRowWeight, bias: Tensor | None, geometry: ConvGeometry
) -> Tensor:
    """`F.conv2d` with the unpacked weight."""
    inputs = x.shape[1] // geometry.groups
    kernel = weight.dense(x.dtype).reshape(weight.shape[0], inputs, *geometry.kernel)
    return F.conv2d(x, kernel, bias, *geometry[1:])


def sparse_conv2d(
    x: Tensor,
    weight: BlockRowWeight,
    bias: Tensor | None = None,
    *,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    activation: str = "none",
    residual: Tensor | None = None,
    variant: SpmmVariant | None = None,
    threads: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """activation(conv2d(x) + bias (+ residual)) with a packed weight.

    Native for float32 on the CPU; other dtypes and devices, `AEROGEL_KERNELS=reference`, traced
    code and whatever needs a gradient take the torch reference.

    Args:
        x: (batch, in, height, width); planes that are not contiguous are copied first.
        weight: packed (out, in / groups * kh * kw), rows in the order of a flattened torch weight.
        bias: (out,) or None.
        kernel_size: (kh, kw), or one number for both.
        stride: one number or (vertical, horizontal).
        padding: likewise, zeros on either side.
        dilation: likewise.
        groups: a divisor of both channel counts; a block of rows lies in one group.
        activation: one of `ACTIVATIONS`, default "none".
        residual: added before the activation; shape of the result.
        variant: how to execute, its `pack` aside; default `sparse_conv_variants(...)[0]`.
        threads: default `torch.get_num_threads()`; the result does not depend on it.
        out: contiguous tensor to write to (no gradient flows then).

    Returns:
        (batch, out, out_height, out_width).

    Raises:
        ValueError: shapes, geometry, activation, variant, threads or out do not fit.
    """
    geometry = ConvGeometry.of(kernel_size, stride, padding, dilation, groups)
    operands = (x, bias, residual)
    differentiable = torch.compiler.is_compiling() or needs_grad((weight.values, *operands))
    if differentiable and out is not None:
        raise ValueError("out: expected None where a gradient is needed")
    if differentiable or native_in_use() is None or not runs_natively(weight, operands):
        check_activation(activation)
        shape = _checked_shape(x, weight, bias, geometry, residual)
        y = _reference(x, weight, bias, geometry, activation, residual)
        return y if out is None else checked_out(out, x, shape).copy_(y)
    call = _prepared_call(x, weight, bias, geometry, activation, residual, variant, threads)
    y = x.new_empty(call.shape) if out is None else checked_out(out, x, call.shape)
    call.run(x, y, bias, residual)
    return y


def _prepared_call(
    x: Tensor,
    weight: BlockRowWeight,
    bias: Tensor | None,
    geometry: ConvGeometry,
    activation: str,
    residual: Tensor | None,
    variant: SpmmVariant | None,
    threads: int | None,
) -> PreparedCall:
    """The call for these shapes and strides; prepared once, then kept with the weight."""
    threads = torch.get_num_threads() if threads is None else threads
    key = (
        geometry,
        x.shape,
        x.stride(),
        None if bias is None else bias.shape,
        None if residual is None else (residual.shape, residual.stride()),
        activation,
        variant,
        threads,
        native().isa(),
        version(weight),
    )
    return kept_call(
        weight,
        key,
        lambda: _prepare(x, weight, bias, geometry, activation, residual, variant, threads),
    )


def _prepare(
    x: Tensor,
    weight: BlockRowWeight,
    bias: Tensor | None,
    geometry: ConvGeometry,
    activation: str,
    residual: Tensor | None,
    variant: SpmmVariant | None,
    threads: int,
) -> PreparedCall:
    code = check_activation(activation)
    shape = _checked_shape(x, weight, bias, geometry, residual)
    if threads < 1:
        raise ValueError(f"threads={threads}: expected at least 1")
    if 0 in shape:
        return PreparedCall(None, shape, False, False)
    batch, rows, *size = shape
    columns = size[0] * size[1]
    source = row_strides(x, x.shape[2] * x.shape[3], "channels")
    extra = Rows(columns, rows * columns, False)
    if residual is not None:
        extra = row_strides(residual, columns, "channels")
    if variant is None:
        variant = sparse_conv_variants(weight, geometry, x.shape[2:], threads)[0]
    call = native().SparseConvCall(
        native_conv_weight(weight, variant, geometry, x.shape[2:]),
        *source[:2],
        *extra[:2],
        *(batch, code, threads),
    )
    return PreparedCall(call, shape, source.copy, extra.copy)


def native_conv_weight(
    weight: BlockRowWeight, variant: SpmmVariant, geometry: ConvGeometry, size: Sequence[int]
) -> Any:
    """The native streams of a weight for one variant and size of image; packed once, then kept.

    Args:
        weight: float32 weight on the CPU that fits the geometry.
        variant: how it will be executed.
        geometry: the window.
        size: height and width of the image.

    Returns:
        A `_native.SparseConvWeight`, immutable.
    """
    module = native()
    execution = variant._replace(pack=True)
    key = ("conv", execution, geometry, tuple(size), module.isa(), version(weight))

    def pack() -> Any:
        values, columns, row_ptr = native_arrays(weight)
        return module.sparse_conv_pack(
            *(part.data_ptr() for part in (values, columns, row_ptr)),
            *(*weight.shape, weight.block, geometry.groups, *size),
            geometry.numbers,
            module.SpmmVariant(*execution),
        )

    return kept_stream(weight, key, pack)
