"""How near a layer's kernel comes to what the machine allows, and which limit that is.

Three limits, each measured with a micro-benchmark: multiply-adds; loads from the first cache (a
sparse kernel loads a vector of activations for every stored column); and bytes, moved at the speed
of the nearest level of memory that holds the whole layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from aerogel import kernels
from aerogel.runtime.layer import Layer

_FLOAT = 4
_INDEX = 1  # the least that says where a stored column is: a gap of csrc/gemv.h, shared by a block
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


def bound_of(layer: Layer, sparse: bool, threads: int) -> Bound | None:
    """The tightest limit of a layer; None where the native micro-benchmarks cannot run.

    Args:
        layer: With the shapes of the example.
        sparse: Whether its kernel skips the zeros.
        threads: That run it.
    """
    if kernels.reference_mode() or not kernels.native_available():
        return None
    roof = _roofline(threads, kernels.isa())
    kept = 1.0 - layer.zeros.sparsity if sparse else 1.0
    stored = kept * layer.weight.numel()
    products = kept * layer.macs
    # Neighbouring outputs share a load where zeros come in blocks; dense kernels share many.
    loads = _FLOAT * products / layer.zeros.block if sparse else 0.0
    planes = math.prod(layer.input_shape) + math.prod(layer.output_shape)
    indices = _INDEX * stored / layer.zeros.block if sparse else 0.0
    values = layer.weight.element_size() * stored
    moved = values + indices + _FLOAT * planes * (1 + layer.has_residual)
    bounds = (
        Bound("FMA", 2e-9 * products / roof.fma_gflops),
        Bound("loads", 1e-9 * loads / roof.load_gbps_l1),
        Bound("bytes", 1e-9 * moved / _bandwidth(roof, moved)),
    )
    return max(bounds, key=lambda each: each.seconds)


@lru_cache(maxsize=8)
def _roofline(threads: int, isa: str) -> kernels.Roofline:
    return kernels.roofline(threads, seconds=_SECONDS)


def _bandwidth(roof: kernels.Roofline, moved: float) -> float:
    if moved <= _L2_BYTES:
        return roof.load_gbps_l2
    return roof.load_gbps_l3 if moved <= _L3_BYTES else roof.load_gbps_dram
