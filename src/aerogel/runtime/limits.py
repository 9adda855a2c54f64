"""How near a layer's kernel comes to what the machine allows, and which limit that is.

Three limits, each measured with a micro-benchmark: multiply-adds; loads from the first cache (a
sparse kernel loads a vector of activations for every stored column, and one for N:M its values once
for every few vectors); and bytes, moved at the speed of the nearest level of memory that holds the
whole layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from aerogel import kernels
from aerogel.runtime.layer import Layer

_FLOAT = 4
_INDEX = 1  # the least that says where a stored column is: a gap of csrc/gemv.h, shared by a block
_NM_INDEX = {4: 4 / 16, 8: 4 / 10}  # of a word with the places of 16 or 10 values: csrc/nm.h
_NM_VECTORS = 8  # that share a pass over an N:M weight, likewise
_SECONDS = 0.02  # for each micro-benchmark: a ceiling is what was reached, not a mean
# What fits the caches of small cores; a layer in larger ones is nearer than its limit says.
_L2_BYTES, _L3_BYTES = 512 << 10, 8 << 20


@dataclass(frozen=True)
class Bound:
    """The limit of one layer.

    Attributes:
        name: "FMA", "loads" or "bytes".
        seconds: The least time that it allows.
    """

    name: str
    seconds: float


def bound_of(
    layer: Layer, sparse: bool, threads: int, pattern: tuple[int, int] | None = None
) -> Bound | None:
    """The tightest limit of a layer; None where the native micro-benchmarks cannot run.

    Args:
        layer: With the shapes of the example.
        sparse: Whether its kernel skips the zeros.
        threads: That run it.
        pattern: (n, m) if it stores n values for every m inputs, else single columns or blocks.
    """
    if kernels.native_in_use() is None:
        return None
    roof = _roofline(threads, kernels.isa())
    kept, index = _stored(layer, sparse, pattern)
    products = kept * layer.macs
    weight = (layer.weight.element_size() + index) * kept * layer.weight.numel()
    # Neighbouring outputs share a load where zeros come in blocks; dense kernels share many.
    loads = _FLOAT * products / layer.zeros.block if sparse else 0.0
    if pattern is not None:
        loads = weight * math.ceil(layer.macs / layer.weight.numel() / _NM_VECTORS)
    planes = math.prod(layer.input_shape) + math.prod(layer.output_shape)
    moved = weight + _FLOAT * planes * (1 + layer.has_residual)
    bounds = (
        Bound("FMA", 2e-9 * products / roof.fma_gflops),
        Bound("loads", 1e-9 * loads / roof.load_gbps_l1),
        Bound("bytes", 1e-9 * moved / _bandwidth(roof, moved)),
    )
    return max(bounds, key=lambda each: each.seconds)


def _stored(layer: Layer, sparse: bool, pattern: tuple[int, int] | None) -> tuple[float, float]:
    """(share of the weight's places whose values are stored, bytes of an index beside each)."""
    if pattern is not None:
        return pattern[0] / pattern[1], _NM_INDEX[pattern[1]]
    if not sparse:
        return 1.0, 0.0
    return 1.0 - layer.zeros.sparsity, _INDEX / layer.zeros.block


@lru_cache(maxsize=8)
def _roofline(threads: int, isa: str) -> kernels.Roofline:
    return kernels.roofline(threads, seconds=_SECONDS)


def _bandwidth(roof: kernels.Roofline, moved: float) -> float:
    if moved <= _L2_BYTES:
        return roof.load_gbps_l2
    return roof.load_gbps_l3 if moved <= _L3_BYTES else roof.load_gbps_dram
