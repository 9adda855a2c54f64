"""The published pruning methods, one file each, on the parts of `aerogel.sparsity`."""

from aerogel.pruning.gradual_pruning import GradualPruner
from aerogel.sparsity.masks import MaskSet

__all__ = ["GradualPruner", "MaskSet"]
