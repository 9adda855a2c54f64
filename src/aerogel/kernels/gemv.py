"""Sparse weights x one to a few vectors: a language model decoding, a classifier's head at batch 1.

Such a product reads each weight once, so that its time is the weight's way from memory. The kernel
streams 5 bytes for a non-zero in float32, 3 in bfloat16 and 2 in int8 (`BlockRowWeight.pack(...,
dtype=...)`); dense float32 takes 4 for every element. Where the zeros are n:m along the inputs an
index takes 2 or 3 bits instead of a byte (nm.py). For many vectors `spmm` is faster: it reads
the weight once for all of them.

Reference: Kreutzer, Hager, Wellein, Fehske, Bishop, A unified sparse matrix data format for
efficient general sparse matrix-vector multiplication on modern processors with wide SIMD units,
arXiv 1307.6209, for rows sorted by length that walk as lanes. csrc/gemv.h describes the format.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from aerogel.kernels._calls import (
    PreparedCall,
    checked_out,
    kept_call,
    kept_stream,
    needs_grad,
    pack_stored,
    row_strides,
    runs_natively,
    version,
)
from aerogel.kernels._library import isa, native, native_in_use
from aerogel.kernels.formats import BlockRowWeight
from aerogel.kernels.nm import native_nm_weight, nm_pattern
from aerogel.kernels.spmm import (
    check_activation,
    check_operands,
    spmm,
    spmm_reference,
    warn_of_device,
)


def gemv_reference(
    x: Tensor,
    weight: BlockRowWeight,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """`gemv` with `F.linear` and the unpacked weight: any dtype, any device, differentiable."""
    return spmm_reference(
        x, weight, bias, activation=activation, residual=residual, layout="tokens"
    )


def gemv(
    x: Tensor,
    weight: BlockRowWeight,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    threads: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Multiplies a packed weight by one to a few vectors, streaming it from memory.

    Native for float32 activations on the CPU and weights in float32, bfloat16 or int8; everything
    else, and `AEROGEL_KERNELS=reference`, takes the torch reference. Where a gradient is needed it
    is `spmm` that runs. Any number of vectors is right; beyond the lanes of a vector register (4 to
    16) the weight is read again.

    Args:
        x: (*, in); copied first if it is not contiguous.
        weight: packed (out, in) weight.
        bias: (out,) or None.
        activation: one of `ACTIVATIONS`, default "none".
        residual: (*, out), added before the activation.
        threads: default `torch.get_num_threads()`; the result does not depend on it.
        out: contiguous tensor to write to (no gradient flows then), another than `residual`.

    Returns:
        (*, out).

    Raises:
        ValueError: shapes, activation, threads or out do not fit.
    """
    operands = (x, bias, residual)
    if needs_grad((weight.values, *operands)):
        return spmm(
            x, weight, bias, activation=activation, residual=residual, layout="tokens", out=out
        )
    if torch.compiler.is_compiling():
        if out is not None:
            raise ValueError("out: expected None in traced code")
        parts = (weight.values, weight.scales, weight.columns, weight.row_ptr)
        return torch.ops.aerogel.gemv(
            x, *parts, *weight.shape, weight.block, bias, residual, activation
        )
    return gemv_now(x, weight, bias, activation, residual, threads, out)


def gemv_now(
    x: Tensor,
    weight: BlockRowWeight,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    threads: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`gemv` without gradients and outside of tracing: what the op itself runs (see `spmm_now`)."""
    operands = (x, bias, residual)
    if native_in_use() is None or not runs_natively(weight, operands):
        warn_of_device(x.device.type)
        result = gemv_reference(x, weight, bias, activation=activation, residual=residual)
        return result if out is None else checked_out(out, x, tuple(result.shape)).copy_(result)
    call = _prepared_call(x, weight, bias, residual, activation, threads)
    y = x.new_empty(call.shape) if out is None else checked_out(out, x, call.shape)
    if out is not None and residual is not None and out.data_ptr() == residual.data_ptr():
        raise ValueError("out: expected another tensor than residual")
    call.run(x, y, bias, residual)
    return y


def _prepared_call(
    x: Tensor,
    weight: BlockRowWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    threads: int | None,
) -> PreparedCall:
    """The call for these shapes and strides; prepared once, then kept."""
    threads = torch.get_num_threads() if threads is None else threads
    key = (
        "gemv",
        x.shape,
        x.stride(),
        None if bias is None else bias.shape,
        None if residual is None else (residual.shape, residual.stride()),
        activation,
        threads,
        isa(),  # n:m streams belong to one
        version(weight),
    )
    return kept_call(weight, key, lambda: _prepare(x, weight, bias, residual, activation, threads))


def _prepare(
    x: Tensor,
    weight: BlockRowWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    threads: int,
) -> PreparedCall:
    code = check_activation(activation)
    shape = check_operands(x, *weight.shape, bias, residual, "tokens")
    if threads < 1:
        raise ValueError(f"threads={threads}: expected at least 1")
    if 0 in shape:
        return PreparedCall(None, shape, False, False)
    tokens = math.prod(shape[:-1])
    copy_residual = residual is not None and row_strides(residual, tokens, "tokens").copy
    pattern = nm_pattern(weight)
    if pattern is not None:
        call = native().NmCall(native_nm_weight(weight, *pattern), tokens, code, threads)
    else:
        call = native().GemvCall(native_gemv_weight(weight), tokens, code, threads)
    return PreparedCall(call, shape, row_strides(x, tokens, "tokens").copy, copy_residual)


def native_gemv_weight(weight: BlockRowWeight) -> Any:
    """The native stream of a weight, packed once and then kept; `.nbytes` is what a product reads.

    Args:
        weight: float32, bfloat16 or int8 weight on the CPU.

    Returns:
        A `_native.GemvWeight`, immutable.
    """
    return kept_stream(
        weight,
        ("gemv", version(weight)),
        lambda: pack_stored(weight, native().gemv_pack, weight.block),
    )
