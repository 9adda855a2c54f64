"""The vocabulary of sparsity: what may be zero together, who decides, how much and when.

| part | where |
| --- | --- |
| which parameters | `select_parameters` |
| what is zero together | `parse_pattern`, `Unstructured`, `NM`, `Block`, `Filter`, ... |
| who decides | `compute_scores` and `SCORES` |
| how much where, and when | `allocate`; `Cubic`, `OneShot`, `Cosine`, `NMLadder`, ... |
| the masks | `build_masks`, `random_masks`, `MaskSet` |
| how they change | `Rebuild`, `DropGrow`, `drop`, `grow` |
| how they act | `Hard`, `Frozen`, `STE`, `Soft`, `Bidirectional`, ... |
| one training step | `MaskController` |
| whole trainers | `RigL`, `SET`, `ITOP`, `StaticSparseTrainer` |
| without training | `magnitude_`, `wanda_`, `sparsegpt_`, `collect_input_stats` |
| learning from a dense network | `DistillationObjective`, `FeatureTap` |
| training for integers | `FakeQuantize`, `ActivationQuantiser`, `QuantisedAttention` |
| around training | `Snapshot` and `rewind`, `RetrainingLR`, `average_models`, penalties |
| on paper, and in which order | `inference_flops`, `storage_bytes`; `permutation_classes` |

Masks are bool, ``True`` = kept; scores are higher = keep; sparsity is the fraction of zeros.
"""

from aerogel.sparsity.allocation import allocate
from aerogel.sparsity.average import (
    average_models,
    greedy_soup,
    recalibrate_batchnorm,
    soup_distance,
)
from aerogel.sparsity.bidirectional import nm_linear_bidirectional
from aerogel.sparsity.calibrate import collect_input_stats, sequential_stages
from aerogel.sparsity.controller import MaskController
from aerogel.sparsity.cost import (
    gradual_training_flops,
    inference_flops,
    nm_training_flops,
    storage_bytes,
    training_flops,
)
from aerogel.sparsity.coupling import (
    COUPLINGS,
    SRSTE,
    STE,
    Bidirectional,
    Coupling,
    Frozen,
    Hard,
    HardDenseGrad,
    Shrink,
    Soft,
    make_coupling,
)
from aerogel.sparsity.distillation import DistillationObjective, FeatureTap
from aerogel.sparsity.dynamic import ITOP, SET, DynamicSparseTrainer, RigL
from aerogel.sparsity.fake_quantize import (
    ActivationQuantiser,
    FakeQuantize,
    QuantisedAttention,
    calibrate_activations,
)
from aerogel.sparsity.group_patterns import nm_mask_
from aerogel.sparsity.input_stats import InputStats
from aerogel.sparsity.masks import MaskSet, build_masks, random_masks
from aerogel.sparsity.oneshot import magnitude_, sparsegpt_, wanda_, wanda_mask
from aerogel.sparsity.parametrizations import LearnedMask, MaskedWeight, SoftMaskedWeight
from aerogel.sparsity.patterns import (
    NM,
    Block,
    Channel,
    Filter,
    GroupPattern,
    KernelGroup,
    KernelPattern,
    NMPairs,
    Pattern,
    TransposableNM,
    UnitPattern,
    Unstructured,
    parse_pattern,
)
from aerogel.sparsity.penalties import (
    AttentionLogPenalty,
    GroupLasso,
    WeightL1,
    WeightLogPenalty,
    attention_log,
)
from aerogel.sparsity.permute import (
    PermutationClass,
    apply_permutation,
    invert,
    permutation_classes,
)
from aerogel.sparsity.retraining import (
    ALLR,
    CLR,
    FT,
    LLR,
    LRW,
    SLR,
    RetrainingLR,
    learning_rate_curve,
    norm_drop,
    retraining_curve,
)
from aerogel.sparsity.rewind import reinitialize, rewind, shuffle_masks
from aerogel.sparsity.schedules import (
    Constant,
    Cosine,
    CosineFloor,
    Cubic,
    Exponential,
    FixedFraction,
    Geometric,
    InversePower,
    Linear,
    NMLadder,
    OneShot,
    Schedule,
)
from aerogel.sparsity.scores import SCORES, ScoreContext, compute_scores
from aerogel.sparsity.select import ParamRef, ParamSelection, select_parameters
from aerogel.sparsity.sensitivity import (
    balanced_halves,
    hessian_gradients,
    loss_gradients,
    synflow_gradients,
)
from aerogel.sparsity.snapshot import Snapshot
from aerogel.sparsity.static import StaticSparseTrainer
from aerogel.sparsity.topk import kept_count, pruned_count, topk_mask, topk_rows
from aerogel.sparsity.updates import DropGrow, Rebuild, UpdateContext, UpdateRule, drop, grow

__all__ = [
    "ALLR",
    "CLR",
    "COUPLINGS",
    "FT",
    "ITOP",
    "LLR",
    "LRW",
    "NM",
    "SCORES",
    "SET",
    "SLR",
    "SRSTE",
    "STE",
    "ActivationQuantiser",
    "AttentionLogPenalty",
    "Bidirectional",
    "Block",
    "Channel",
    "Constant",
    "Cosine",
    "CosineFloor",
    "Coupling",
    "Cubic",
    "DistillationObjective",
    "DropGrow",
    "DynamicSparseTrainer",
    "Exponential",
    "FakeQuantize",
    "FeatureTap",
    "Filter",
    "FixedFraction",
    "Frozen",
    "Geometric",
    "GroupLasso",
    "GroupPattern",
    "Hard",
    "HardDenseGrad",
    "InputStats",
    "InversePower",
    "KernelGroup",
    "KernelPattern",
    "LearnedMask",
    "Linear",
    "MaskController",
    "MaskSet",
    "MaskedWeight",
    "NMLadder",
    "NMPairs",
    "OneShot",
    "ParamRef",
    "ParamSelection",
    "Pattern",
    "PermutationClass",
    "QuantisedAttention",
    "Rebuild",
    "RetrainingLR",
    "RigL",
    "Schedule",
    "ScoreContext",
    "Shrink",
    "Snapshot",
    "Soft",
    "SoftMaskedWeight",
    "StaticSparseTrainer",
    "TransposableNM",
    "UnitPattern",
    "Unstructured",
    "UpdateContext",
    "UpdateRule",
    "WeightL1",
    "WeightLogPenalty",
    "allocate",
    "apply_permutation",
    "attention_log",
    "average_models",
    "balanced_halves",
    "build_masks",
    "calibrate_activations",
    "collect_input_stats",
    "compute_scores",
    "drop",
    "gradual_training_flops",
    "greedy_soup",
    "grow",
    "hessian_gradients",
    "inference_flops",
    "invert",
    "kept_count",
    "learning_rate_curve",
    "loss_gradients",
    "magnitude_",
    "make_coupling",
    "nm_linear_bidirectional",
    "nm_mask_",
    "nm_training_flops",
    "norm_drop",
    "parse_pattern",
    "permutation_classes",
    "pruned_count",
    "random_masks",
    "recalibrate_batchnorm",
    "reinitialize",
    "retraining_curve",
    "rewind",
    "select_parameters",
    "sequential_stages",
    "shuffle_masks",
    "soup_distance",
    "sparsegpt_",
    "storage_bytes",
    "synflow_gradients",
    "topk_mask",
    "topk_rows",
    "training_flops",
    "wanda_",
    "wanda_mask",
]
