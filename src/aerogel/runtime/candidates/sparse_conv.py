"""Convolutions with sparse kernels wider than a point, or with a stride, padding or groups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from aerogel import kernels
from aerogel.runtime.candidates.registry import Candidate, provides
from aerogel.runtime.layer import Layer

# Sparsity at which the kernel overtakes dense torch, by block width: 3x3 layers of ResNet-50 on
# AVX2 (benchmarks/conv.py, benchmarks/group_kernels.py). Only layers far below are left unmeasured,
# and those with next to no zeros.
BREAK_EVEN = {1: 0.60, 2: 0.55, 4: 0.15}
_FAR_BELOW, _LEAST = 0.20, 0.05


class SparseConvLayer(nn.Module):
    """A convolution called from torch, its weight packed without zeros."""

    def __init__(self, layer: Layer, packed: Any, variant: Any, threads: int | None) -> None:
        super().__init__()
        self._packed, self._bias, self._geometry = packed, layer.bias, _geometry(layer)
        self._activation, self._variant, self._threads = layer.activation, variant, threads

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """act(layer(x) + residual)."""
        return kernels.sparse_conv2d(
            x,
            self._packed,
            self._bias,
            **self._geometry,
            activation=self._activation,
            residual=residual,
            variant=self._variant,
            threads=self._threads,
        )


@provides("conv2d")
def sparse_convolution(layer: Layer, threads: int | None) -> Iterator[Candidate]:
    """Every kernel variant worth timing, for the block width that the zeros admit."""
    depthwise = layer.groups > 1 and layer.weight.shape[1] == 1
    if layer.is_pointwise or depthwise:
        return
    block = _block(layer)
    if layer.zeros.sparsity < max(BREAK_EVEN[block] - _FAR_BELOW, _LEAST):
        return
    packed = kernels.BlockRowWeight.pack(layer.matrix, block=block)
    for variant in _variants(packed, layer, threads, 1):
        # Each keeps its own native streams, whatever else is being compared.
        yield _called(layer, packed.without_cache(), variant, threads)
    if layer.input_shape[2:] == (1, 1):  # pooled planes are a vector in a plan
        return
    for variant in _variants(packed, layer, threads, layer.images_together(threads)):
        yield _planned(layer, packed, variant)


def _block(layer: Layer) -> int:
    """The widest block that the zeros fill and that no group's end cuts."""
    outputs = layer.weight.shape[0] // layer.groups
    block = layer.zeros.block
    while layer.groups > 1 and outputs % block:
        block //= 2
    return block


def _geometry(layer: Layer) -> dict[str, Any]:
    return {
        "kernel_size": tuple(layer.weight.shape[2:]),
        "stride": layer.stride,
        "padding": layer.padding,
        "dilation": layer.dilation,
        "groups": layer.groups,
    }


def _variants(
    packed: kernels.BlockRowWeight, layer: Layer, threads: int | None, images: int
) -> list[Any]:
    if kernels.native_in_use() is None:
        return [None]
    geometry = kernels.ConvGeometry.of(**_geometry(layer))
    size = layer.input_shape[2:]
    return list(kernels.sparse_conv_variants(packed, geometry, size, threads, images))


def _name(packed: kernels.BlockRowWeight, variant: Any) -> str:
    if variant is None:
        return f"sparse conv {packed.block}x1 reference"
    words = (f"{name[0]}{int(value)}" for name, value in variant._asdict().items())
    return f"sparse conv {packed.block}x1 {' '.join(words)}"


def _called(
    layer: Layer, packed: kernels.BlockRowWeight, variant: Any, threads: int | None
) -> Candidate:
    return Candidate(
        _name(packed, variant),
        sparse=True,
        module=lambda: SparseConvLayer(layer, packed, variant, threads),
    )


def _planned(layer: Layer, packed: kernels.BlockRowWeight, variant: Any) -> Candidate:
    def emit(builder: kernels.PlanBuilder, x: Any, residual: Any) -> Any:
        return builder.sparse_conv2d(
            x,
            packed,
            bias=layer.bias,
            **_geometry(layer),
            activation=layer.activation,
            residual=residual,
            variant=variant,
            name=layer.name,
        )

    return Candidate(f"planned {_name(packed, variant)}", sparse=True, emit=emit)
