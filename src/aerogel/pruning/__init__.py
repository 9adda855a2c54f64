"""The published pruning methods, one file each, on the parts of `aerogel.sparsity`.

Methods that others build on live there and are shown here too: the dynamic trainers `RigL`, `SET`
and `ITOP`, the static `StaticSparseTrainer`, and the one-shot `magnitude_`, `wanda_` and
`sparsegpt_`.
"""

from aerogel.pruning import (
    a_priori_compression,
    bdwp,
    dsnot,
    dynamic_sparse_learning,
    fast_sparse_convnets,
    gpusq_vit,
    gradual_pruning,
    iss_p,
    lottery_ticket,
    progressive_gradient_flow,
    random_pruning,
    sparse_model_soups,
    sparse_then_prune,
    sparsebytenn,
)
from aerogel.pruning.bdwp import BidirectionalNM
from aerogel.pruning.dsnot import DSnoTReport, dsnot_, refine_mask
from aerogel.pruning.dynamic_sparse_learning import DynamicSparseLearning
from aerogel.pruning.fast_sparse_convnets import PointwisePruner
from aerogel.pruning.gpusq_vit import (
    GPUSQConfig,
    GPUSQTrainer,
    export_nm,
    gpusq,
    gpusq_prune,
    gpusq_quantise,
)
from aerogel.pruning.gradual_pruning import GradualPruner
from aerogel.pruning.iss_p import IterativeSoftShrinkage
from aerogel.pruning.lottery_ticket import LotteryTicket, TrainOutcome
from aerogel.pruning.method import (
    METHODS,
    Goal,
    Method,
    OneShotMethod,
    RewritingMethod,
    SearchMethod,
    TrainingMethod,
)
from aerogel.pruning.nm_training import SRSTE, STE
from aerogel.pruning.progressive_gradient_flow import (
    ProgressiveGradientFlow,
    gradient_noise,
    track_gradient_noise,
)
from aerogel.pruning.random_pruning import layerwise_report, random_prune
from aerogel.pruning.run import prune
from aerogel.pruning.shared_methods import SHARED_METHODS
from aerogel.pruning.sparse_ift import METHOD as _SPARSE_IFT  # the module is hidden by its function
from aerogel.pruning.sparse_ift import (
    IFTReport,
    SparseWide,
    joint_decay_groups,
    joint_weight_decay,
    sparse_ift,
)
from aerogel.pruning.sparse_model_soups import SoupResult, SparseModelSoups
from aerogel.pruning.sparse_then_prune import PenalisedPruner
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
from aerogel.sparsity.static import StaticSparseTrainer

_SYSTEMS = (
    a_priori_compression,
    gradual_pruning,
    fast_sparse_convnets,
    sparsebytenn,
    progressive_gradient_flow,
    bdwp,
    sparse_model_soups,
    dsnot,
    lottery_ticket,
    random_pruning,
    sparse_then_prune,
    dynamic_sparse_learning,
    gpusq_vit,
    iss_p,
)

METHODS.update(
    (method.slug, method)
    for method in (*(system.METHOD for system in _SYSTEMS), _SPARSE_IFT, *SHARED_METHODS)
)

__all__ = [
    "ITOP",
    "METHODS",
    "SET",
    "SRSTE",
    "STE",
    "BidirectionalNM",
    "DSnoTReport",
    "DynamicSparseLearning",
    "GPUSQConfig",
    "GPUSQTrainer",
    "Goal",
    "GradualPruner",
    "GroupKernelConfig",
    "GroupKernelPruner",
    "IFTReport",
    "IterativeSoftShrinkage",
    "LotteryTicket",
    "MaskSet",
    "Method",
    "OneShotMethod",
    "PenalisedPruner",
    "PointwisePruner",
    "ProgressiveGradientFlow",
    "RewritingMethod",
    "RigL",
    "SearchMethod",
    "SoupResult",
    "SparseModelSoups",
    "SparseWide",
    "StaticSparseTrainer",
    "TrainOutcome",
    "TrainingMethod",
    "apply_plan",
    "dsnot_",
    "export_nm",
    "gpusq",
    "gpusq_prune",
    "gpusq_quantise",
    "gradient_noise",
    "group_kernel_prune",
    "invert_plan",
    "joint_decay_groups",
    "joint_weight_decay",
    "layerwise_report",
    "magnitude_",
    "prune",
    "random_prune",
    "rearrange_network",
    "refine_mask",
    "sparse_ift",
    "sparsegpt_",
    "track_gradient_noise",
    "wanda_",
]
