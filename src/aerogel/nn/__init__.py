"""Layers that are sparse by construction, for building networks.

conv = aerogel.nn.SparseConv1x1(256, 512, density=0.1, activation="relu6")
...                 # trains as a masked dense layer
conv.finalize()     # from now on only the non-zeros are stored and multiplied
"""

from aerogel.nn.sparse_conv import SparseConv1x1

__all__ = ["SparseConv1x1"]
