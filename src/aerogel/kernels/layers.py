"""The layers a plan is made of: what each computes (in torch), which shapes it takes, how it is
handed to the native builder.

Shapes are of one image, without the batch: (channels, height, width), (features, columns) or
(features,). References work on whole batches. A new kind of layer is a class here, a method of
`PlanBuilder`, and a struct in csrc/plan_ops.h.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from aerogel.kernels._calls import address, native_arrays
from aerogel.kernels._library import native
from aerogel.kernels.formats import BlockRowWeight
from aerogel.kernels.spmm import (
    ACTIVATIONS,
    check_activation,
    reference_activation,
    spmm_reference,
)
from aerogel.kernels.variants import SpmmVariant, spmm_variants
from aerogel.kernels.window import Pair, window_sizes

Shape = tuple[int, ...]

_POOLS = {"max": 0, "average": 1, "average_valid": 2}
_BINARIES = {"add": 0, "mul": 1}


def float_tensor(name: str, value: object, shape: Shape | None = None) -> Tensor:
    """A detached, contiguous float32 CPU tensor of the given shape."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype != torch.float32 or value.device.type != "cpu":
        raise TypeError(f"{name}: {value.dtype} on {value.device}, expected float32 on the CPU")
    if shape is not None and tuple(value.shape) != shape:
        raise ValueError(f"{name}: shape {tuple(value.shape)}, expected {shape}")
    return value.detach().contiguous()


def same_shape(name: str, shape: Shape, expected: Shape) -> None:
    """ValueError unless the shapes are equal."""
    if shape != expected:
        raise ValueError(f"{name}: shape {shape}, expected {expected}")


@dataclass(frozen=True)
class Layer:
    """One operation on one or two values."""

    kind: ClassVar[str] = "layer"

    def output_shape(self, *shapes: Shape) -> Shape:
        """Shape of the result; ValueError if the inputs do not fit."""
        raise NotImplementedError

    def reference(self, *inputs: Tensor) -> Tensor:
        """The result for a batch, in torch."""
        raise NotImplementedError

    def emit(self, builder: Any, inputs: Sequence[int], name: str) -> int:
        """Adds the operation to a native builder; returns its native value."""
        raise NotImplementedError

    def flops(self, output: Shape) -> int:
        """Floating point operations for one image, two per multiply-add."""
        return math.prod(output)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights and bias that one image reads."""
        return 0


@dataclass(frozen=True)
class Weighted(Layer):
    """y = activation(W x + bias (+ residual)); the residual is the second input."""

    bias: Tensor | None
    activation: str

    def finish(self, y: Tensor, residual: tuple[Tensor, ...]) -> Tensor:
        """The epilogue in torch."""
        return reference_activation(y + residual[0] if residual else y, self.activation)

    @property
    def bias_bytes(self) -> int:
        """Bytes of the bias."""
        return 0 if self.bias is None else 4 * self.bias.numel()


@dataclass(frozen=True)
class Conv2d(Weighted):
    """Dense convolution (out, in / groups, kh, kw), depthwise included."""

    kind: ClassVar[str] = "conv2d"
    weight: Tensor
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int

    @property
    def depthwise(self) -> bool:
        """Whether every input channel is convolved on its own."""
        return self.weight.shape[1] == 1 and self.groups > 1

    def output_shape(self, *shapes: Shape) -> Shape:
        shape = shapes[0]
        out, per_group, *kernel = self.weight.shape
        if len(shape) != 3:
            raise ValueError(f"x: shape {shape}, expected (channels, height, width)")
        if self.groups < 1 or shape[0] % self.groups or out % self.groups:
            raise ValueError(
                f"groups={self.groups}: expected a divisor of {shape[0]} inputs and {out} outputs"
            )
        if per_group * self.groups != shape[0]:
            raise ValueError(
                f"weight: shape {tuple(self.weight.shape)}, expected ({out}, "
                f"{shape[0] // self.groups}, kh, kw) for {shape[0]} channels, groups={self.groups}"
            )
        size = window_sizes(shape, (kernel[0], kernel[1]), self.stride, self.padding, self.dilation)
        result = (out, *size)
        for residual in shapes[1:]:
            same_shape("residual", residual, result)
        return result

    def reference(self, *inputs: Tensor) -> Tensor:
        x, *residual = inputs
        y = F.conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )
        return self.finish(y, tuple(residual))

    def emit(self, builder: Any, inputs: Sequence[int], name: str) -> int:
        out, _, *kernel = self.weight.shape
        geometry = [*kernel, *self.stride, *self.padding, *self.dilation]
        weight, bias, activation = address(self.weight), address(self.bias), self.activation
        residual = inputs[1] if len(inputs) > 1 else -1
        if not self.depthwise:
            return builder.conv(
                inputs[0], weight, bias, out, self.groups, geometry, ACTIVATIONS[activation],
                residual, name,
            )  # fmt: skip
        code = ACTIVATIONS[activation if residual < 0 else "none"]
        y = builder.depthwise(inputs[0], weight, bias, out, geometry, code, name)
        if residual >= 0:
            y = builder.binary(y, residual, _BINARIES["add"], ACTIVATIONS[activation], name)
        return y

    def flops(self, output: Shape) -> int:
        return 2 * self.weight[0].numel() * math.prod(output)

    @property
    def weight_bytes(self) -> int:
        return 4 * self.weight.numel() + self.bias_bytes


@dataclass(frozen=True)
class Linear(Weighted):
    """Dense (out, in) weight on a vector, or on every column of a planar value."""

    kind: ClassVar[str] = "linear"
    weight: Tensor

    def output_shape(self, *shapes: Shape) -> Shape:
        return _linear_shape(tuple(self.weight.shape), shapes)

    def reference(self, *inputs: Tensor) -> Tensor:
        x, *residual = inputs
        y = torch.matmul(self.weight, x.reshape(*x.shape[:2], -1))
        if self.bias is not None:
            y = y + self.bias[:, None]
        return self.finish(y.reshape(x.shape[0], -1, *x.shape[2:]), tuple(residual))

    def emit(self, builder: Any, inputs: Sequence[int], name: str) -> int:
        residual = inputs[1] if len(inputs) > 1 else -1
        return builder.linear(
            inputs[0], address(self.weight), address(self.bias), self.weight.shape[0],
            ACTIVATIONS[self.activation], residual, name,
        )  # fmt: skip

    def flops(self, output: Shape) -> int:
        return 2 * self.weight.shape[1] * math.prod(output)

    @property
    def weight_bytes(self) -> int:
        return 4 * self.weight.numel() + self.bias_bytes


@dataclass(frozen=True)
class Packed(Weighted):
    """A layer whose weight is packed without its zeros."""

    weight: BlockRowWeight
    variant: SpmmVariant | None
    # values, columns (int32) and row_ptr as the native builder borrows them
    arrays: tuple[Tensor, Tensor, Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.weight.low_bit:
            float_tensor("weight.values", self.weight.values)
        object.__setattr__(self, "arrays", native_arrays(self.weight))

    def flops(self, output: Shape) -> int:
        return 2 * self.weight.values.numel() * math.prod(output[1:])

    @property
    def weight_bytes(self) -> int:
        values, columns, _ = self.arrays
        return 4 * (values.numel() + columns.numel()) + self.bias_bytes


@dataclass(frozen=True)
class SparseLinear(Packed):
    """Packed (out, in) weight on every column: a linear layer or 1x1 convolution."""

    kind: ClassVar[str] = "sparse"

    def output_shape(self, *shapes: Shape) -> Shape:
        return _linear_shape(self.weight.shape, shapes)

    def reference(self, *inputs: Tensor) -> Tensor:
        x, *residual = inputs
        return self.finish(spmm_reference(x, self.weight, self.bias), tuple(residual))

    def emit(self, builder: Any, inputs: Sequence[int], name: str) -> int:
        assert self.variant is not None
        residual = inputs[1] if len(inputs) > 1 else -1
        return builder.spmm(
            inputs[0], *(address(part) for part in self.arrays), *self.weight.shape,
            self.weight.block, address(self.bias), native().SpmmVariant(*self.variant),
            ACTIVATIONS[self.activation], residual, name,
        )  # fmt: skip


def plan_variant(weight: BlockRowWeight, columns: int) -> SpmmVariant:
    """A good variant for the aligned, padded planes of a plan: they need no packing."""
    variants = spmm_variants(weight, columns, "channels")
    return next((v for v in variants if not v.pack), variants[0])


@dataclass(frozen=True)
class Binary(Layer):
    """activation(x op y); y may be one number per channel."""

    operation: str
    activation: str

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.operation

    def output_shape(self, *shapes: Shape) -> Shape:
        x, y = shapes
        if y != x and y != x[:1] and y != (x[0], *(1 for _ in x[1:])):
            raise ValueError(f"y: shape {y}, expected {x} or {x[:1]}")
        return x

    def reference(self, *inputs: Tensor) -> Tensor:
        x, y = inputs
        y = y.reshape(*y.shape[:2], *(1 for _ in x.shape[2:])) if y.shape != x.shape else y
        return reference_activation(x + y if self.operation == "add" else x * y, self.activation)

    def emit(self, builder: Any, inputs: Sequence[int], name: str) -> int:
        code = ACTIVATIONS[self.activation]
        return builder.binary(inputs[0], inputs[1], _BINARIES[self.operation], code, name)


@dataclass(frozen=True)
class Activation(Layer):
    """An activation on its own."""

    function: str

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.function

    def output_shape(self, *shapes: Shape) -> Shape:
        return shapes[0]

    def reference(self, *inputs: Tensor) -> Tensor:
        return reference_activation(inputs[0], self.function)

    def emit(self, builder: Any, inputs: Sequence[int], name: str) -> int:
        return builder.activation(inputs[0], check_activation(self.function), name)


@dataclass(frozen=True)
class Pool2d(Layer):
    """Max or average pooling with torch's semantics."""

    pooling: str  # a key of _POOLS
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    ceil_mode: bool

    @property
    def kind(self) -> str:  # type: ignore[override]
        return "max_pool2d" if self.pooling == "max" else "avg_pool2d"

    def output_shape(self, *shapes: Shape) -> Shape:
        shape = shapes[0]
        if len(shape) != 3:
            raise ValueError(f"x: shape {shape}, expected (channels, height, width)")
        if any(2 * p > k for p, k in zip(self.padding, self.kernel, strict=True)):
            raise ValueError(f"padding={self.padding}: expected at most half of {self.kernel}")
        size = window_sizes(
            shape, self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode
        )
        return (shape[0], *size)

    def reference(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        if self.pooling == "max":
            return F.max_pool2d(
                x, self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode
            )
        count_pad = self.pooling == "average"
        return F.avg_pool2d(x, self.kernel, self.stride, self.padding, self.ceil_mode, count_pad)

    def emit(self, builder: Any, inputs: Sequence[int], name: str) -> int:
        geometry = [*self.kernel, *self.stride, *self.padding, *self.dilation]
        return builder.pool(inputs[0], _POOLS[self.pooling], geometry, self.ceil_mode, name)

    def flops(self, output: Shape) -> int:
        return math.prod(self.kernel) * math.prod(output)


@dataclass(frozen=True)
class GlobalAvgPool(Layer):
    """Mean over all columns: (channels, ...) to (channels,)."""

    kind: ClassVar[str] = "global_avg_pool"

    def output_shape(self, *shapes: Shape) -> Shape:
        if len(shapes[0]) < 2:
            raise ValueError(f"x: shape {shapes[0]}, expected (channels, ...) with columns")
        return shapes[0][:1]

    def reference(self, *inputs: Tensor) -> Tensor:
        return inputs[0].flatten(2).mean(2)

    def emit(self, builder: Any, inputs: Sequence[int], name: str) -> int:
        return builder.mean(inputs[0], name)


@dataclass(frozen=True)
class Reshape(Layer):
    """From planes to a vector or back; torch's element order."""

    kind: ClassVar[str] = "reshape"
    shape: Shape

    def output_shape(self, *shapes: Shape) -> Shape:
        (shape,) = shapes
        vector = math.prod(shape[1:]) == 1 or math.prod(self.shape[1:]) == 1
        if math.prod(shape) != math.prod(self.shape) or not (
            vector or (shape[0] == self.shape[0] and math.prod(shape[1:]) > 0)
        ):
            raise ValueError(f"shape={self.shape}: expected a vector of, or planes like, {shape}")
        return self.shape

    def reference(self, *inputs: Tensor) -> Tensor:
        return inputs[0].reshape(inputs[0].shape[0], *self.shape)

    def emit(self, builder: Any, inputs: Sequence[int], name: str) -> int:
        return builder.reshape(inputs[0], *planar(self.shape), name)

    def flops(self, output: Shape) -> int:
        return 0


def planar(shape: Shape) -> tuple[int, int, int]:
    """(channels, height, width) of any value; columns without rows have height 1."""
    return (
        (shape[0], shape[1], shape[2]) if len(shape) == 3 else (shape[0], 1, math.prod(shape[1:]))
    )


def _linear_shape(weight: Shape, shapes: tuple[Shape, ...]) -> Shape:
    shape = shapes[0]
    if shape[0] != weight[1]:
        hint = " (flatten it first?)" if math.prod(shape) == weight[1] else ""
        raise ValueError(f"x: shape {shape}, expected ({weight[1]}, ...) for {weight}{hint}")
    result = (weight[0], *shape[1:])
    for residual in shapes[1:]:
        same_shape("residual", residual, result)
    return result
