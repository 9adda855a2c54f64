"""Whole networks in one native call.

A `PlanBuilder` collects layers; `build()` plans their memory once; `Plan.run` executes all of them
in one parallel region, with every intermediate activation in a reused arena. Under
`AEROGEL_KERNELS=reference`, or without native kernels, the same plan runs on torch.

    b = PlanBuilder(batch=1)
    x = b.input((3, 224, 224))
    x = b.conv2d(x, stem, stride=2, padding=1, activation="relu")
    x = b.sparse_conv1x1(x, BlockRowWeight.pack(weight), bias, activation="relu")
    b.output(b.linear(b.global_avg_pool(x), head))
    (logits,) = b.build().run([image])
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from aerogel.kernels import layers
from aerogel.kernels._library import native_available
from aerogel.kernels.formats import BlockRowWeight
from aerogel.kernels.layers import Layer, Shape, float_tensor
from aerogel.kernels.plan import Network, Plan, Port, Step, Value
from aerogel.kernels.sparse_layers import Gemv, SparseConv2d
from aerogel.kernels.spmm import check_activation
from aerogel.kernels.token_builder import TokenMethods
from aerogel.kernels.variants import SpmmVariant, sparse_conv_variants
from aerogel.kernels.window import ConvGeometry, pair

LAYOUTS = ("channels", "tokens")


class PlanBuilder(TokenMethods):
    """Collects the layers of a network, in execution order.

    Weights are borrowed until `build()`; the plan then has its own packed copies, while the layers'
    references keep the tensors that were passed.

    Args:
        batch: images per run, at least 1.
        threads: threads of every run; default `torch.get_num_threads()` at the time of the run.

    Raises:
        ValueError: batch or threads below 1.
    """

    def __init__(self, batch: int = 1, threads: int | None = None) -> None:
        if batch < 1:
            raise ValueError(f"batch={batch}: expected at least 1")
        if threads is not None and threads < 1:
            raise ValueError(f"threads={threads}: expected at least 1 or None")
        self.batch = batch
        self.threads = threads
        self._shapes: list[Shape] = []
        self._steps: list[Step] = []
        self._inputs: list[Port] = []
        self._outputs: list[Port] = []

    def input(self, shape: Sequence[int], layout: str = "channels") -> Value:
        """A tensor that the caller passes to every run.

        Args:
            shape: of one image: (C, H, W), (F, T) or (F,); with layout "tokens" (T, F).
            layout: "channels", or "tokens" for token-major tensors, transposed on the way in.

        Returns:
            The value; one given as (T, F) tokens has shape (F, T).
        """
        sizes = tuple(int(n) for n in shape)
        _check_layout(layout)
        if not 1 <= len(sizes) <= 3 or min(sizes) < 1:
            raise ValueError(f"shape={sizes}: expected (C, H, W), (F, T) or (F,), all positive")
        if layout == "tokens" and len(sizes) != 2:
            raise ValueError(f"shape={sizes}: expected (T, F) with layout='tokens'")
        value = self._new_value(sizes[::-1] if layout == "tokens" else sizes)
        self._inputs.append(Port(value.index, layout))
        return value

    def output(self, x: Value, layout: str = "channels") -> None:
        """Declares a result of the plan.

        Args:
            x: any value.
            layout: "channels", or "tokens" to get an (F, T) value as (batch, T, F).
        """
        _check_layout(layout)
        self._check_value("x", x)
        if layout == "tokens" and len(x.shape) != 2:
            raise ValueError(f"x: shape {x.shape}, expected (F, T) with layout='tokens'")
        self._outputs.append(Port(x.index, layout))

    def conv2d(
        self,
        x: Value,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        activation: str = "none",
        residual: Value | None = None,
        name: str | None = None,
    ) -> Value:
        """activation(conv2d(x) + bias (+ residual)), dense or depthwise.

        Args:
            x: (C, H, W).
            weight: (out, C / groups, kh, kw).
            bias: (out,) or None.
            stride: one number or (vertical, horizontal).
            padding: likewise, zeros on either side.
            dilation: likewise.
            groups: a divisor of both channel counts; C for a depthwise convolution.
            activation: one of `ACTIVATIONS`.
            residual: value of the result's shape, added before the activation.
            name: for `describe` and `profile`; default the kind and a number.
        """
        weight = float_tensor("weight", weight)
        if weight.dim() != 4:
            raise ValueError(f"weight: shape {tuple(weight.shape)}, expected (out, in, kh, kw)")
        layer = layers.Conv2d(
            bias=_optional_bias(bias, weight.shape[0]),
            activation=_checked_activation(activation),
            weight=weight,
            stride=pair("stride", stride, 1),
            padding=pair("padding", padding, 0),
            dilation=pair("dilation", dilation, 1),
            groups=groups,
        )
        return self.add_layer(layer, x, residual, name=name)

    def sparse_conv1x1(
        self,
        x: Value,
        weight: BlockRowWeight,
        bias: Tensor | None = None,
        activation: str = "none",
        residual: Value | None = None,
        variant: SpmmVariant | None = None,
        name: str | None = None,
    ) -> Value:
        """activation(W x + bias (+ residual)) with a packed weight on every column of x.

        Args:
            x: (in, ...): planes, (F, T) tokens or a vector.
            weight: packed (out, in).
            bias: (out,) or None.
            activation: one of `ACTIVATIONS`.
            residual: value of the result's shape, added before the activation.
            variant: how to execute; default a good one for aligned planes.
            name: for `describe` and `profile`.
        """
        self._check_value("x", x)
        if not isinstance(weight, BlockRowWeight):
            raise TypeError(f"weight: expected a BlockRowWeight, got {type(weight).__name__}")
        if variant is None and native_available():
            columns = math.prod(x.shape[1:]) if len(x.shape) > 1 else self.batch
            variant = layers.plan_variant(weight, columns)
        layer = layers.SparseLinear(
            bias=_optional_bias(bias, weight.shape[0]),
            activation=_checked_activation(activation),
            weight=weight,
            variant=variant,
        )
        return self.add_layer(layer, x, residual, name=name)

    def sparse_conv2d(
        self,
        x: Value,
        weight: BlockRowWeight,
        kernel_size: int | Sequence[int],
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        activation: str = "none",
        residual: Value | None = None,
        variant: SpmmVariant | None = None,
        name: str | None = None,
    ) -> Value:
        """activation(conv2d(x) + bias (+ residual)) with a packed weight, any kernel.

        Args:
            x: (C, H, W).
            weight: packed (out, C / groups * kh * kw): `BlockRowWeight.pack(weight.flatten(1))`.
            kernel_size: (kh, kw), or one number for both.
            bias: (out,) or None.
            stride: one number or (vertical, horizontal).
            padding: likewise, zeros on either side.
            dilation: likewise.
            groups: a divisor of both channel counts; a block of rows lies in one group.
            activation: one of `ACTIVATIONS`.
            residual: value of the result's shape, added before the activation.
            variant: how to execute; default a good one.
            name: for `describe` and `profile`.
        """
        self._check_value("x", x)
        if not isinstance(weight, BlockRowWeight):
            raise TypeError(f"weight: expected a BlockRowWeight, got {type(weight).__name__}")
        geometry = ConvGeometry.of(kernel_size, stride, padding, dilation, groups)
        if variant is None and native_available():
            geometry.output_shape(weight, x.shape)  # names what does not fit
            variant = sparse_conv_variants(weight, geometry, x.shape[1:], self.threads)[0]
        layer = SparseConv2d(
            bias=_optional_bias(bias, weight.shape[0]),
            activation=_checked_activation(activation),
            weight=weight,
            geometry=geometry,
            variant=variant,
        )
        return self.add_layer(layer, x, residual, name=name)

    def linear(
        self,
        x: Value,
        weight: Tensor | BlockRowWeight,
        bias: Tensor | None = None,
        activation: str = "none",
        residual: Value | None = None,
        name: str | None = None,
    ) -> Value:
        """activation(W x + bias (+ residual)) on a vector, or on every column of (F, T) tokens.

        Args:
            x: (in,) or (in, T).
            weight: (out, in), dense or packed.
            bias: (out,) or None.
            activation: one of `ACTIVATIONS`.
            residual: value of the result's shape, added before the activation.
            name: for `describe` and `profile`.
        """
        if isinstance(weight, BlockRowWeight):
            return self.sparse_conv1x1(x, weight, bias, activation, residual, name=name)
        weight = float_tensor("weight", weight)
        if weight.dim() != 2:
            raise ValueError(f"weight: shape {tuple(weight.shape)}, expected (out, in)")
        layer = layers.Linear(
            bias=_optional_bias(bias, weight.shape[0]),
            activation=_checked_activation(activation),
            weight=weight,
        )
        return self.add_layer(layer, x, residual, name=name)

    def gemv(
        self,
        x: Value,
        weight: BlockRowWeight,
        bias: Tensor | None = None,
        activation: str = "none",
        residual: Value | None = None,
        name: str | None = None,
    ) -> Value:
        """activation(W x + bias (+ residual)) on one vector, the packed weight as it is stored.

        Args:
            x: (in,).
            weight: packed (out, in) in float32, bfloat16 or int8.
            bias: (out,) or None.
            activation: one of `ACTIVATIONS`.
            residual: (out,), added before the activation.
            name: for `describe` and `profile`.
        """
        layer = Gemv(
            bias=_optional_bias(bias, weight.shape[0]),
            activation=_checked_activation(activation),
            weight=weight,
        )
        return self.add_layer(layer, x, residual, name=name)

    def add(self, x: Value, y: Value, activation: str = "none", name: str | None = None) -> Value:
        """activation(x + y); y has x's shape, or (C,) to be added to every column."""
        layer = layers.Binary("add", _checked_activation(activation))
        return self.add_layer(layer, x, y, name=name)

    def mul(self, x: Value, y: Value, activation: str = "none", name: str | None = None) -> Value:
        """activation(x * y); y has x's shape, or (C,) to scale every column."""
        layer = layers.Binary("mul", _checked_activation(activation))
        return self.add_layer(layer, x, y, name=name)

    def activation(self, x: Value, kind: str, name: str | None = None) -> Value:
        """One of `ACTIVATIONS` on its own."""
        return self.add_layer(layers.Activation(_checked_activation(kind)), x, name=name)

    def max_pool2d(
        self,
        x: Value,
        kernel: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        ceil_mode: bool = False,
        name: str | None = None,
    ) -> Value:
        """Maximum over windows; the stride defaults to the kernel. NaN wins, as in torch."""
        layer = _pool("max", kernel, stride, padding, dilation, ceil_mode)
        return self.add_layer(layer, x, name=name)

    def avg_pool2d(
        self,
        x: Value,
        kernel: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: int | Sequence[int] = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        name: str | None = None,
    ) -> Value:
        """Mean over windows; the stride defaults to the kernel."""
        pooling = "average" if count_include_pad else "average_valid"
        layer = _pool(pooling, kernel, stride, padding, 1, ceil_mode)
        return self.add_layer(layer, x, name=name)

    def global_avg_pool(self, x: Value, name: str | None = None) -> Value:
        """Mean over all columns: (C, ...) to (C,)."""
        return self.add_layer(layers.GlobalAvgPool(), x, name=name)

    def flatten(self, x: Value, name: str | None = None) -> Value:
        """(C, H, W) to (C * H * W,)."""
        self._check_value("x", x)
        return self.reshape(x, (math.prod(x.shape),), name=name)

    def reshape(self, x: Value, shape: Sequence[int], name: str | None = None) -> Value:
        """Planes to a vector or back, or rows and columns of planes to columns alone."""
        return self.add_layer(layers.Reshape(tuple(int(n) for n in shape)), x, name=name)

    def add_layer(self, layer: Layer, *inputs: Value | None, name: str | None = None) -> Value:
        """Appends a layer of `aerogel.kernels.layers`; inputs that are None are left out."""
        name = name or f"{layer.kind}_{len(self._steps)}"
        given = [x for x in inputs if x is not None]
        for x in given:
            self._check_value("x", x)
        try:
            shape = layer.output_shape(*(x.shape for x in given))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        value = self._new_value(shape)
        self._steps.append(Step(name, layer, tuple(x.index for x in given), value.index))
        return value

    def build(self) -> Plan:
        """Plans memory, packs weights for the instruction set in use, and returns the plan.

        Raises:
            ValueError: no output was declared.
        """
        if not self._outputs:
            raise ValueError("outputs: expected at least one call of output()")
        network = Network(
            self.batch,
            self.threads,
            tuple(self._shapes),
            tuple(self._steps),
            tuple(self._inputs),
            tuple(self._outputs),
        )
        return Plan(network)

    def _new_value(self, shape: Shape) -> Value:
        self._shapes.append(shape)
        return Value(shape, len(self._shapes) - 1, self)

    def _check_value(self, name: str, value: object) -> None:
        if not isinstance(value, Value):
            raise TypeError(f"{name}: expected a value of this builder, got {type(value).__name__}")
        if value.builder is not self:
            raise ValueError(f"{name}: a value of another builder")


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: expected one of {', '.join(LAYOUTS)}")


def _checked_activation(activation: str) -> str:
    check_activation(activation)
    return activation


def _optional_bias(bias: Tensor | None, out: int) -> Tensor | None:
    return None if bias is None else float_tensor("bias", bias, (out,))


def _pool(
    pooling: str,
    kernel: int | Sequence[int],
    stride: int | Sequence[int] | None,
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    ceil_mode: bool,
) -> layers.Pool2d:
    size = pair("kernel", kernel, 1)
    return layers.Pool2d(
        pooling,
        size,
        size if stride is None else pair("stride", stride, 1),
        pair("padding", padding, 0),
        pair("dilation", dilation, 1),
        ceil_mode,
    )
