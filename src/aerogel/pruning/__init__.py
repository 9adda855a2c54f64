"""The published pruning methods, one file each, on the parts of `aerogel.sparsity`.

Methods that others build on live there and are shown here too: the dynamic trainers `RigL`, `SET`
and `ITOP`, and the one-shot `magnitude_`, `wanda_` and `sparsegpt_`.
"""

from aerogel.pruning.dsnot import DSnoTReport, dsnot_, refine_mask
from aerogel.pruning.fast_sparse_convnets import PointwisePruner
from aerogel.pruning.gradual_pruning import GradualPruner
from aerogel.pruning.sparsebytenn import (
    GroupKernelConfig,
    GroupKernelPruner,
    apply_plan,
    group_kernel_prune,
    invert_plan,
    rearrange_network,
)
from aerogel.sparsity.dynamic import ITOP, SET, RigL
from aerogel.sparsity.masks import MaskSet
from aerogel.sparsity.oneshot import magnitude_, sparsegpt_, wanda_

__all__ = [
    "ITOP",
    "SET",
    "DSnoTReport",
    "GradualPruner",
    "GroupKernelConfig",
    "GroupKernelPruner",
    "MaskSet",
    "PointwisePruner",
    "RigL",
    "apply_plan",
    "dsnot_",
    "group_kernel_prune",
    "invert_plan",
    "magnitude_",
    "rearrange_network",
    "refine_mask",
    "sparsegpt_",
    "wanda_",
]
