"""Sparse convolutions, and sparse linear layers on a vector, as layers of a plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from aerogel.kernels._calls import address, stored_arrays
from aerogel.kernels._library import native
from aerogel.kernels.formats import BlockRowWeight
from aerogel.kernels.gemv import gemv_reference
from aerogel.kernels.layers import Packed, Shape, Weighted, same_shape
from aerogel.kernels.nm import native_nm_weight, nm_pattern
from aerogel.kernels.sparse_conv import dense_conv2d
from aerogel.kernels.spmm import ACTIVATIONS
from aerogel.kernels.values import VALUE_TYPES
from aerogel.kernels.window import ConvGeometry


@dataclass(frozen=True)
class SparseConv2d(Packed):
    """Packed (out, in / groups * kh * kw) weight under a sliding window."""

    kind: ClassVar[str] = "sparse_conv2d"
    geometry: ConvGeometry

    def output_shape(self, *shapes: Shape) -> Shape:
        result = self.geometry.output_shape(self.weight, shapes[0])
        for residual in shapes[1:]:
            same_shape("residual", residual, result)
        return result

    def reference(self, *inputs: Tensor) -> Tensor:
        x, *residual = inputs
        y = dense_conv2d(x, self.weight, self.bias, self.geometry)
        return self.finish(y, tuple(residual))

    def emit(self, builder: Any, inputs: Sequence[int], name: str) -> int:
        assert self.variant is not None
        residual = inputs[1] if len(inputs) > 1 else -1
        return builder.sparse_conv(
            inputs[0], *(address(part) for part in self.arrays), *self.weight.shape,
            self.weight.block, address(self.bias), self.geometry.groups, self.geometry.numbers,
            native().SpmmVariant(*self.variant), ACTIVATIONS[self.activation], residual, name,
        )  # fmt: skip


@dataclass(frozen=True)
class Gemv(Weighted):
    """Packed (out, in) weight on a vector, streamed as it is stored."""

    kind: ClassVar[str] = "gemv"
    weight: BlockRowWeight
    # values, columns (int32) and row_ptr as the native builder borrows them
    arrays: tuple[Tensor, Tensor, Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "arrays", stored_arrays(self.weight))

    def output_shape(self, *shapes: Shape) -> Shape:
        rows, cols = self.weight.shape
        same_shape("x", shapes[0], (cols,))
        for residual in shapes[1:]:
            same_shape("residual", residual, (rows,))
        return (rows,)

    def reference(self, *inputs: Tensor) -> Tensor:
        x, *residual = inputs
        return self.finish(gemv_reference(x, self.weight, self.bias), tuple(residual))

    def emit(self, builder: Any, inputs: Sequence[int], name: str) -> int:
        values, columns, row_ptr = self.arrays
        residual = inputs[1] if len(inputs) > 1 else -1
        pattern = nm_pattern(self.weight)
        emit, shape = (
            (builder.gemv, (self.weight.block,)) if pattern is None else (builder.nm, pattern)
        )
        return emit(
            inputs[0], address(values), VALUE_TYPES[values.dtype], address(self.weight.scales),
            address(columns), address(row_ptr), *self.weight.shape, *shape,
            address(self.bias), ACTIVATIONS[self.activation], residual, name,
        )  # fmt: skip

    def flops(self, output: Shape) -> int:
        return 2 * self.weight.values.numel() * math.prod(output[1:])

    @property
    def weight_bytes(self) -> int:
        values, pattern = self.weight.values, nm_pattern(self.weight)
        if pattern is not None:
            return native_nm_weight(self.weight, *pattern).nbytes + self.bias_bytes
        return (values.element_size() + 1) * values.numel() + self.bias_bytes
