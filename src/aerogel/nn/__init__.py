"""Layers that are sparse or compressed by construction, for building networks.

conv = aerogel.nn.SparseConv1x1(256, 512, density=0.1, activation="relu6")
...                 # trains as a masked dense layer
conv.finalize()     # from now on only the non-zeros are stored and multiplied

model = aerogel.nn.compress_a_priori(model)  # convolutions of one-way filters, before training
...
model = aerogel.nn.fold(model, images).model  # multiplied out where that runs faster

y = aerogel.nn.fft_conv(u, k, pre_gate=v, post_gate=w)  # filters as long as the sequence
aerogel.nn.sparsify_frequency(model, 0.5)  # of a trained model's long convolutions

`SparseParallel*`, `SparseFactorized*` and `SparseDoped*` are larger than a dense layer and, at
their sparsity, cost the same; `aerogel.pruning.sparse_ift` puts them into a network.
"""

from aerogel.nn.a_priori_compression import Folded, FoldedLayer, compress_a_priori, fold
from aerogel.nn.flashfftconv import (
    FlashFFTConv,
    FrequencySparseConv,
    PartialConv,
    depthwise_conv1d,
    fft_conv,
)
from aerogel.nn.long_conv_layers import (
    HyenaOperator,
    LongConv,
    shorten_filters,
    sparsify_frequency,
)
from aerogel.nn.oneway_conv import (
    OneWayConv2d,
    OneWayConv3d,
    OneWayConvTranspose2d,
    OneWayConvTranspose3d,
)
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
    "FlashFFTConv",
    "Folded",
    "FoldedLayer",
    "FrequencySparseConv",
    "HyenaOperator",
    "LongConv",
    "OneWayConv2d",
    "OneWayConv3d",
    "OneWayConvTranspose2d",
    "OneWayConvTranspose3d",
    "PartialConv",
    "SparseConv1x1",
    "SparseDopedConv2d",
    "SparseDopedLinear",
    "SparseFactorizedConv2d",
    "SparseFactorizedLinear",
    "SparseParallelConv2d",
    "SparseParallelLinear",
    "compress_a_priori",
    "depthwise_conv1d",
    "fft_conv",
    "fold",
    "shorten_filters",
    "sparsify_frequency",
]
