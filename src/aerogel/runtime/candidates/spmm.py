"""Sparse weights times dense activations: 1x1 convolutions and linear layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from aerogel import kernels
from aerogel.runtime.candidates.registry import Candidate, provides
from aerogel.runtime.layer import Layer

# Sparsity at which the kernel overtakes dense torch, by block width (measured on AVX2, 1x1
# convolutions and 128 to 1024 tokens). Only layers far below are left unmeasured.
BREAK_EVEN = {1: 0.35, 2: 0.20, 4: 0.10}
_FAR_BELOW = 0.20
# With 4 full rows per column the kernel is a dense one too, worth a try where zeros are few.
_DENSE_BLOCK = 4
_DENSE_BELOW = 0.5
_PAGE = 4096
_SMALL_GROUPS = 4  # of rows; larger ones walk in lockstep
# A packed weight that stores nearly everything is no sparse kernel, whatever it is called.
_DENSE_ABOVE = 0.95


class SparseLayer(nn.Module):
    """A pointwise layer called from torch, its weight packed without zeros."""

    def __init__(self, layer: Layer, packed: Any, variant: Any, threads: int | None) -> None:
        super().__init__()
        self._packed, self._bias, self._layout = packed, layer.bias, layer.layout
        self._activation, self._variant, self._threads = layer.activation, variant, threads

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """act(layer(x) + residual)."""
        return kernels.spmm(
            x,
            self._packed,
            self._bias,
            activation=self._activation,
            residual=residual,
            layout=self._layout,
            variant=self._variant,
            threads=self._threads,
        )


@provides("conv2d", "linear")
def sparse_pointwise(layer: Layer, threads: int | None) -> Iterator[Candidate]:
    """Every kernel variant worth timing for each block width that the zeros admit."""
    if not layer.is_pointwise:
        return
    for block in blocks_worth_trying(layer):
        packed = kernels.BlockRowWeight.pack(layer.matrix, block=block)
        for variant in _variants(packed, layer.columns, layer.layout, threads):
            # Each keeps its own native streams, whatever else is being compared.
            yield _called(layer, packed.without_cache(), variant, threads)
        columns = layer.planned_columns * layer.images_together(threads)
        for variant in _variants(packed, columns, "channels", threads):
            if variant is None or not variant.pack or _pays_to_pack(layer, variant):
                yield _planned(layer, packed, variant)


def _pays_to_pack(layer: Layer, variant: kernels.SpmmVariant) -> bool:
    """A plan's rows are aligned: pack for rows in lockstep, or where each row has its own pages."""
    return variant.groups > _SMALL_GROUPS or 4 * layer.planned_columns >= _PAGE


def blocks_worth_trying(layer: Layer) -> list[int]:
    """Block widths that could win: the widest full one, 1 for scattered zeros, 4 for few."""
    zeros = layer.zeros
    tried = set()
    if zeros.sparsity >= BREAK_EVEN[zeros.block] - _FAR_BELOW:
        tried.add(zeros.block)
    if zeros.sparsity < _DENSE_BELOW:
        tried.add(_DENSE_BLOCK)
    return sorted(tried, reverse=True)


def _variants(
    packed: kernels.BlockRowWeight, columns: int, layout: str, threads: int | None
) -> list[Any]:
    if kernels.native_in_use() is None:
        return [None]
    return list(kernels.spmm_variants(packed, columns, layout, threads))


def _name(packed: kernels.BlockRowWeight, variant: Any) -> str:
    if variant is None:
        return f"spmm {packed.block}x1 reference"
    words = (f"{name[0]}{int(value)}" for name, value in variant._asdict().items())
    return f"spmm {packed.block}x1 {' '.join(words)}"


def _called(
    layer: Layer, packed: kernels.BlockRowWeight, variant: Any, threads: int | None
) -> Candidate:
    return Candidate(
        _name(packed, variant),
        sparse=packed.density < _DENSE_ABOVE,
        module=lambda: SparseLayer(layer, packed, variant, threads),
    )


def _planned(layer: Layer, packed: kernels.BlockRowWeight, variant: Any) -> Candidate:
    def emit(builder: kernels.PlanBuilder, x: Any, residual: Any) -> Any:
        return builder.sparse_conv1x1(
            x,
            packed,
            layer.bias,
            activation=layer.activation,
            residual=residual,
            variant=variant,
            name=layer.name,
        )

    name = f"planned {_name(packed, variant)}"
    return Candidate(name, sparse=packed.density < _DENSE_ABOVE, emit=emit)
