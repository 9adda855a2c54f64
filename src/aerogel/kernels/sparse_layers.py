"""The sparse convolution as a layer of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from aerogel.kernels._library import native
from aerogel.kernels.layers import Packed, Shape, address, same_shape
from aerogel.kernels.sparse_conv import dense_conv2d
from aerogel.kernels.spmm import ACTIVATIONS
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
