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

Masks are bool, ``True`` = kept; scores are higher = keep; sparsity is the fraction of zeros.
"""

from aerogel.sparsity.allocation import allocate
from aerogel.sparsity.controller import MaskController
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
from aerogel.sparsity.masks import MaskSet, build_masks, random_masks
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
from aerogel.sparsity.persist import load_state, save_state
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
from aerogel.sparsity.topk import kept_count, pruned_count, topk_mask, topk_rows
from aerogel.sparsity.updates import DropGrow, Rebuild, UpdateContext, UpdateRule, drop, grow

__all__ = [
    "COUPLINGS",
    "NM",
    "SCORES",
    "SRSTE",
    "STE",
    "Bidirectional",
    "Block",
    "Channel",
    "Constant",
    "Cosine",
    "CosineFloor",
    "Coupling",
    "Cubic",
    "DropGrow",
    "Exponential",
    "Filter",
    "FixedFraction",
    "Frozen",
    "Geometric",
    "GroupPattern",
    "Hard",
    "HardDenseGrad",
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
    "Rebuild",
    "Schedule",
    "ScoreContext",
    "Shrink",
    "Soft",
    "SoftMaskedWeight",
    "TransposableNM",
    "UnitPattern",
    "Unstructured",
    "UpdateContext",
    "UpdateRule",
    "allocate",
    "balanced_halves",
    "build_masks",
    "compute_scores",
    "drop",
    "grow",
    "hessian_gradients",
    "kept_count",
    "load_state",
    "loss_gradients",
    "make_coupling",
    "parse_pattern",
    "pruned_count",
    "random_masks",
    "save_state",
    "select_parameters",
    "synflow_gradients",
    "topk_mask",
    "topk_rows",
]
