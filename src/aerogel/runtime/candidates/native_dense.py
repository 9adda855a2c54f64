"""Dense layers inside a plan: stems, depthwise convolutions, heads, and layers without zeros."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from aerogel.runtime.candidates.registry import Candidate, provides
from aerogel.runtime.layer import Layer

NAME = "native dense"


@provides("conv2d")
def native_convolution(layer: Layer, threads: int) -> Iterator[Candidate]:
    """Dense or depthwise convolution; other groupings stay with torch."""
    if layer.groups not in (1, layer.weight.shape[0]):
        return
    if layer.groups > 1 and layer.weight.shape[0] != layer.input_shape[1]:
        return

    def emit(builder: Any, x: Any, residual: Any) -> Any:
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
        )

    yield Candidate(NAME, sparse=False, emit=emit)


@provides("linear")
def native_linear(layer: Layer, threads: int) -> Iterator[Candidate]:
    """Dense linear layer over features or tokens."""

    def emit(builder: Any, x: Any, residual: Any) -> Any:
        return builder.linear(
            x, layer.weight, layer.bias, activation=layer.activation, residual=residual
        )

    yield Candidate(NAME, sparse=False, emit=emit)
