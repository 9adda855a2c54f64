"""The sparse convolution as a layer of a plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from aerogel.kernels._calls import native_arrays
from aerogel.kernels._library import native
from aerogel.kernels.formats import BlockRowWeight
from aerogel.kernels.layers import Shape, Weighted, address, float_tensor, same_shape
from aerogel.kernels.sparse_conv import dense_conv2d
from aerogel.kernels.spmm import ACTIVATIONS
from aerogel.kernels.variants import SpmmVariant
from aerogel.kernels.window import ConvGeometry


@dataclass(frozen=True)
class SparseConv2d(Weighted):
    """Packed (out, in / groups * kh * kw) weight under a sliding window."""

    kind: ClassVar[str] = "sparse_conv2d"
    weight: BlockRowWeight
    geometry: ConvGeometry
    variant: SpmmVariant | None
    # values, columns (int32) and row_ptr as the native builder borrows them
    arrays: tuple[Tensor, Tensor, Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        float_tensor("weight.values", self.weight.values)
        object.__setattr__(self, "arrays", native_arrays(self.weight))

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

    def flops(self, output: Shape) -> int:
        return 2 * self.weight.values.numel() * math.prod(output[1:])

    @property
    def weight_bytes(self) -> int:
        values, columns, _ = self.arrays
        return 4 * (values.numel() + columns.numel()) + self.bias_bytes
