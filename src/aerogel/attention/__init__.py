"""Sparse attention: one engine for every published choice of what to attend to.

plan = BlockPlan.from_topk(scores, 16)
out = attend(q, k, v, plan=plan, causal=True)
"""

from aerogel.attention.bank_plan import Bank, BankPlan, past_summaries
from aerogel.attention.block_plan import BlockPlan
from aerogel.attention.calibration import CALIBRATIONS, add_calibration, calibrate
from aerogel.attention.channel_calibration import calibrate_channels
from aerogel.attention.channel_order import ChannelOrder
from aerogel.attention.combiner import CombinerSelector
from aerogel.attention.combiner_cache import CombinerCache
from aerogel.attention.combiner_layer import CombinerAttention
from aerogel.attention.double_sparsity import DoubleSparsitySelector
from aerogel.attention.engine import Attended, attend, sparse_attention
from aerogel.attention.group_plan import GroupPlan
from aerogel.attention.hf import attach, detach, register, register_once_there
from aerogel.attention.key_list_plan import KeyListPlan
from aerogel.attention.layer import SparseSelfAttention
from aerogel.attention.linear import PositiveRandomFeatures, linear_attention
from aerogel.attention.local_stride import CustomBlockPattern, LocalStridePattern
from aerogel.attention.minference import MInferenceSelector
from aerogel.attention.mix_plan import HeadMixPlan
from aerogel.attention.moa import ElasticSpan, MoAPlan, MoASelector
from aerogel.attention.pattern_calibration import calibrate_patterns
from aerogel.attention.plan import DensePlan, Plan, PlanStats
from aerogel.attention.primitives import (
    PairList,
    plan_logsumexp,
    plan_pairs,
    plan_softmax,
    sddmm,
    spmm,
)
from aerogel.attention.probe import mass_budget, probe_rows, probe_scores
from aerogel.attention.routing_layer import RoutingAttention
from aerogel.attention.routing_transformer import RoutingSelector
from aerogel.attention.s2_attention import S2Selector
from aerogel.attention.scatterbrain import (
    ScatterbrainAttention,
    ScatterbrainSelector,
    scatterbrain_attention,
)
from aerogel.attention.seerattention import SeerAttentionSelector
from aerogel.attention.selector import (
    SELECTORS,
    AttentionContext,
    Selector,
    add_selector,
    make_selector,
    select,
)
from aerogel.attention.selector_file import load_selector, save_selector
from aerogel.attention.shape import AttentionShape
from aerogel.attention.softmax import merge
from aerogel.attention.span_plan import SpanPlan
from aerogel.attention.spherical_kmeans import SphericalKMeans
from aerogel.attention.summaries import combiner_summary
from aerogel.attention.supports import (
    BlockSupport,
    LocalSupport,
    SmyrfClusters,
    Support,
    TopKSupport,
)
from aerogel.attention.token_plan import TokenPlan, gather_tokens, scatter_tokens
from aerogel.attention.topk import share_over_group, stable_topk, topk_mass
from aerogel.attention.zipvl import ZipVLHandle, ZipVLSelector, apply_zipvl

# Names of attention that transformers knows from here on: "aerogel:<slug>".
register_once_there()

__all__ = [
    "CALIBRATIONS",
    "SELECTORS",
    "Attended",
    "AttentionContext",
    "AttentionShape",
    "Bank",
    "BankPlan",
    "BlockPlan",
    "BlockSupport",
    "ChannelOrder",
    "CombinerAttention",
    "CombinerCache",
    "CombinerSelector",
    "CustomBlockPattern",
    "DensePlan",
    "DoubleSparsitySelector",
    "ElasticSpan",
    "GroupPlan",
    "HeadMixPlan",
    "KeyListPlan",
    "LocalStridePattern",
    "LocalSupport",
    "MInferenceSelector",
    "MoAPlan",
    "MoASelector",
    "PairList",
    "Plan",
    "PlanStats",
    "PositiveRandomFeatures",
    "RoutingAttention",
    "RoutingSelector",
    "S2Selector",
    "ScatterbrainAttention",
    "ScatterbrainSelector",
    "SeerAttentionSelector",
    "Selector",
    "SmyrfClusters",
    "SpanPlan",
    "SparseSelfAttention",
    "SphericalKMeans",
    "Support",
    "TokenPlan",
    "TopKSupport",
    "ZipVLHandle",
    "ZipVLSelector",
    "add_calibration",
    "add_selector",
    "apply_zipvl",
    "attach",
    "attend",
    "calibrate",
    "calibrate_channels",
    "calibrate_patterns",
    "combiner_summary",
    "detach",
    "gather_tokens",
    "linear_attention",
    "load_selector",
    "make_selector",
    "mass_budget",
    "merge",
    "past_summaries",
    "plan_logsumexp",
    "plan_pairs",
    "plan_softmax",
    "probe_rows",
    "probe_scores",
    "register",
    "save_selector",
    "scatter_tokens",
    "scatterbrain_attention",
    "sddmm",
    "select",
    "share_over_group",
    "sparse_attention",
    "spmm",
    "stable_topk",
    "topk_mass",
]
