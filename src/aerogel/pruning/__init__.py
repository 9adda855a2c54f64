"""The published pruning methods, one file each, on the parts of `aerogel.sparsity`.

Methods that others build on live there and are shown here too: the dynamic trainers `RigL`, `SET`
and `ITOP`, and the one-shot `magnitude_`, `wanda_` and `sparsegpt_`.
"""

from aerogel.pruning import (
    bdwp,
    fast_sparse_convnets,
    gradual_pruning,
    progressive_gradient_flow,
    sparse_model_soups,
    sparsebytenn,
)
from aerogel.pruning.bdwp import BidirectionalNM
from aerogel.pruning.fast_sparse_convnets import PointwisePruner
from aerogel.pruning.gradual_pruning import GradualPruner
from aerogel.pruning.method import Goal, Method, OneShotMethod, SearchMethod, TrainingMethod
from aerogel.pruning.nm_training import SRSTE, STE
from aerogel.pruning.progressive_gradient_flow import ProgressiveGradientFlow, gradient_noise
from aerogel.pruning.shared_methods import SHARED_METHODS
from aerogel.pruning.sparse_ift import (
    IFTReport,
    SparseWide,
    joint_decay_groups,
    joint_weight_decay,
    sparse_ift,
)
from aerogel.pruning.sparse_model_soups import SoupResult, SparseModelSoups
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

_SYSTEMS = (
    gradual_pruning,
    fast_sparse_convnets,
    sparsebytenn,
    progressive_gradient_flow,
    bdwp,
    sparse_model_soups,
)

METHODS: dict[str, Method] = {
    method.slug: method for method in (*(system.METHOD for system in _SYSTEMS), *SHARED_METHODS)
}
"""Every pruning method by its slug, as `aerogel compress --method` and the arena take it."""

__all__ = [
    "ITOP",
    "METHODS",
    "SET",
    "SRSTE",
    "STE",
    "BidirectionalNM",
    "Goal",
    "GradualPruner",
    "GroupKernelConfig",
    "GroupKernelPruner",
    "IFTReport",
    "MaskSet",
    "Method",
    "OneShotMethod",
    "PointwisePruner",
    "ProgressiveGradientFlow",
    "RigL",
    "SearchMethod",
    "SoupResult",
    "SparseModelSoups",
    "SparseWide",
    "TrainingMethod",
    "apply_plan",
    "gradient_noise",
    "group_kernel_prune",
    "invert_plan",
    "joint_decay_groups",
    "joint_weight_decay",
    "magnitude_",
    "rearrange_network",
    "sparse_ift",
    "sparsegpt_",
    "wanda_",
]
