"""Layers that are sparse by construction, for building networks.

conv = aerogel.nn.SparseConv1x1(256, 512, density=0.1, activation="relu6")
...                 # trains as a masked dense layer
conv.finalize()     # from now on only the non-zeros are stored and multiplied

`SparseParallel*`, `SparseFactorized*` and `SparseDoped*` are larger than a dense layer and, at
their sparsity, cost the same; `aerogel.pruning.sparse_ift` puts them into a network.
"""

from aerogel.nn.sparse_conv import SparseConv1x1
from aerogel.nn.sparse_ift import (
    SparseDopedConv2d,
    SparseDopedLinear,
    SparseFactorizedConv2d,
    SparseFactorizedLinear,
    SparseParallelConv2d,
    SparseParallelLinear,
)

__all__ = [
    "SparseConv1x1",
    "SparseDopedConv2d",
    "SparseDopedLinear",
    "SparseFactorizedConv2d",
    "SparseFactorizedLinear",
    "SparseParallelConv2d",
    "SparseParallelLinear",
]
