"""Dense layers inside a plan: stems, depthwise convolutions, heads, and layers without zeros."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from aerogel import kernels
from aerogel.runtime.candidates.registry import Candidate, provides
from aerogel.runtime.layer import Layer

NAME = "native dense"


@provides("conv2d")
def native_convolution(layer: Layer, threads: int | None) -> Iterator[Candidate]:
    """Dense, grouped or depthwise convolution."""

    def emit(builder: kernels.PlanBuilder, x: Any, residual: Any) -> Any:
        if len(x.shape) == 1:  # pooled planes are a vector in a plan
            return _emit_matrix(builder, layer, x, residual)
        return builder.conv2d(
            x,
            layer.weight,
            layer.bias,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            activation=layer.activation,
            residual=residual,
            name=layer.name,
        )

    if layer.input_shape[2:] != (1, 1) or layer.is_pointwise:
        yield Candidate(NAME, sparse=False, emit=emit)


@provides("linear")
def native_linear(layer: Layer, threads: int | None) -> Iterator[Candidate]:
    """Dense linear layer over features or tokens."""

    def emit(builder: kernels.PlanBuilder, x: Any, residual: Any) -> Any:
        return _emit_matrix(builder, layer, x, residual)

    yield Candidate(NAME, sparse=False, emit=emit)


def _emit_matrix(builder: kernels.PlanBuilder, layer: Layer, x: Any, residual: Any) -> Any:
    return builder.linear(
        x,
        layer.matrix,
        layer.bias,
        activation=layer.activation,
        residual=residual,
        name=layer.name,
    )
