"""Sampled products: the gradient of a packed weight, computed only where it stores values.

`gradient[n, k] = sum over columns of grad[n] * x[k]` for the stored (n, k): at 90 % zeros a tenth
of the multiply-adds of the dense gradient, and nothing of its size in memory.

Reference: Gale, Zaharia, Young, Elsen, Sparse GPU Kernels for Deep Learning, arXiv 2006.10901
(the name SDDMM, and its use for sparse training).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from aerogel.kernels._library import native, native_in_use
from aerogel.kernels.formats import BlockRowWeight, entry_indices
from aerogel.kernels.spmm import output_shape


def check_gradient(grad: Tensor, x: Tensor, shape: tuple[int, int], layout: str) -> None:
    """Raises ValueError unless `grad` is the gradient of a (rows, cols) product with `x`."""
    expected = output_shape(x, *shape, layout)
    if tuple(grad.shape) != expected:
        raise ValueError(f"grad: shape {tuple(grad.shape)}, expected {expected}")
    if grad.dtype != x.dtype:
        raise ValueError(f"grad: {grad.dtype}, expected the dtype of x, {x.dtype}")


def as_planes(t: Tensor, layout: str) -> Tensor:
    """(images, features, columns), whatever the layout."""
    if layout == "tokens":
        return t.reshape(1, -1, t.shape[-1]).transpose(1, 2)
    return t.reshape(t.shape[0], t.shape[1], t.shape[2:].numel())


def sddmm_reference(
    grad: Tensor, x: Tensor, weight: BlockRowWeight, *, layout: str = "channels"
) -> Tensor:
    """`sddmm` with a dense product in torch: any dtype, any device, differentiable."""
    check_gradient(grad, x, weight.shape, layout)
    index = entry_indices(
        weight.columns, weight.row_ptr, weight.shape, weight.block, weight.values.shape[0]
    )
    dense = torch.einsum("bnm,bkm->nk", as_planes(grad, layout), as_planes(x, layout))
    return dense[index]


def sddmm(
    grad: Tensor,
    x: Tensor,
    weight: BlockRowWeight,
    *,
    layout: str = "channels",
    threads: int | None = None,
) -> Tensor:
    """The gradient of `spmm(x, weight)` with respect to the weight's values.

    Native for float32 on the CPU; other dtypes and devices, and `AEROGEL_KERNELS=reference`, take
    the torch reference. Columns of activations that no value meets do not take part.

    Args:
        grad: gradient of the product, (batch, out, *spatial) for layout "channels", (*, out) for
            "tokens"; other strides than torch's default are copied first.
        x: the product's input, (batch, in, *spatial) or (*, in).
        weight: packed (out, in) weight; only its pattern is read.
        layout: "channels" or "tokens".
        threads: default `torch.get_num_threads()`; the result does not depend on it.

    Returns:
        (stored values,), in the order of `weight.values`.

    Raises:
        ValueError: shapes, dtypes, layout or threads do not fit.
    """
    check_gradient(grad, x, weight.shape, layout)
    threads = torch.get_num_threads() if threads is None else threads
    if threads < 1:
        raise ValueError(f"threads={threads}: expected at least 1")
    fits = x.dtype is torch.float32 and x.is_cpu and grad.is_cpu
    if not fits or native_in_use() is None:
        return sddmm_reference(grad, x, weight, layout=layout)
    if not weight._pattern:
        weight._pattern.append(_native_pattern(weight))
    grad, x = grad.detach().contiguous(), x.detach().contiguous()
    values = x.new_empty(weight.values.shape)
    native().sddmm(
        weight._pattern[0],
        *_operand(x, weight.shape[1], layout),
        *_operand(grad, weight.shape[0], layout),
        values.data_ptr(),
        *_columns(x, layout),
        layout == "tokens",
        threads,
    )
    return values


def _operand(t: Tensor, features: int, layout: str) -> tuple[int, int, int]:
    """Address, floats from row to row, floats from image to image."""
    if layout == "tokens":
        return t.data_ptr(), features, 0
    columns = t.shape[2:].numel()
    return t.data_ptr(), columns, features * columns


def _columns(x: Tensor, layout: str) -> tuple[int, int]:
    """Tokens and 1, or pixels of an image and images."""
    if layout == "tokens":
        return math.prod(x.shape[:-1]), 1
    return x.shape[2:].numel(), x.shape[0]


def _native_pattern(weight: BlockRowWeight) -> Any:
    weight.check()
    columns = weight.columns.to(torch.int32).contiguous()
    row_ptr = weight.row_ptr.contiguous()
    return native().sddmm_pattern(
        columns.data_ptr(), row_ptr.data_ptr(), *weight.shape, weight.block
    )
