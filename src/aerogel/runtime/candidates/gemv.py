"""Sparse linear layers on one to a few vectors: heads at batch 1, decoding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from aerogel import kernels
from aerogel.runtime.candidates.registry import Candidate, provides
from aerogel.runtime.layer import Layer

NAME = "gemv"
# Sparsity at which it overtakes dense torch is 30 to 40 % (benchmarks/gemv.py: 1.5 x at 50 %). Only
# layers far below are left unmeasured.
_FAR_BELOW = 0.2
# With more vectors each weight is used often enough for `spmm` to be ahead.
_MOST_VECTORS = 8


class GemvLayer(nn.Module):
    """A linear layer called from torch, its weight streamed without zeros."""

    def __init__(self, layer: Layer, packed: Any, threads: int | None) -> None:
        super().__init__()
        self._packed, self._bias = packed, layer.bias
        self._activation, self._threads = layer.activation, threads

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """act(layer(x) + residual)."""
        return kernels.gemv(
            x,
            self._packed,
            self._bias,
            activation=self._activation,
            residual=residual,
            threads=self._threads,
        )


@provides("linear")
def sparse_vectors(layer: Layer, threads: int | None) -> Iterator[Candidate]:
    """A call from torch for a few vectors; inside a plan for one."""
    if layer.columns > _MOST_VECTORS or layer.zeros.sparsity < _FAR_BELOW:
        return
    packed = kernels.BlockRowWeight.pack(layer.matrix, block=1)
    planned = layer.columns == 1 and not layer.has_tokens
    yield Candidate(
        _name(packed),
        sparse=True,
        module=lambda: GemvLayer(layer, packed, threads),
        emit=_emit(layer, packed) if planned else None,
        pattern=kernels.nm_pattern(packed),
    )


@provides("conv2d")
def sparse_head(layer: Layer, threads: int | None) -> Iterator[Candidate]:
    """Pooled planes of one image, which are a vector in a plan."""
    one_vector = layer.is_pointwise and layer.input_shape[0] == layer.columns == 1
    if one_vector and layer.zeros.sparsity >= _FAR_BELOW:
        packed = kernels.BlockRowWeight.pack(layer.matrix, block=1)
        yield Candidate(
            _name(packed),
            sparse=True,
            emit=_emit(layer, packed),
            pattern=kernels.nm_pattern(packed),
        )


def _name(packed: kernels.BlockRowWeight) -> str:
    pattern = kernels.nm_pattern(packed)
    return NAME if pattern is None else f"{NAME} {pattern[0]}:{pattern[1]}"


def _emit(layer: Layer, packed: kernels.BlockRowWeight) -> Any:
    def emit(builder: kernels.PlanBuilder, x: Any, residual: Any) -> Any:
        return builder.gemv(
            x,
            packed,
            layer.bias,
            activation=layer.activation,
            residual=residual,
            name=layer.name,
        )

    return emit
