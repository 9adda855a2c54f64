"""Options that are none are refused by name when a selector, a plan or a layer is made."""

from __future__ import annotations

import math

import pytest
import torch

from aerogel.attention import (
    AttentionShape,
    BlockSupport,
    ChannelOrder,
    CombinerAttention,
    CombinerSelector,
    CustomBlockPattern,
    DoubleSparsitySelector,
    ElasticSpan,
    LocalStridePattern,
    LocalSupport,
    MInferenceSelector,
    MoAPlan,
    MoASelector,
    PositiveRandomFeatures,
    RoutingAttention,
    RoutingSelector,
    S2Selector,
    ScatterbrainAttention,
    ScatterbrainSelector,
    SeerAttentionSelector,
    SmyrfClusters,
    SparseSelfAttention,
    SphericalKMeans,
    TopKSupport,
    ZipVLSelector,
    attend,
    combiner_summary,
    linear_attention,
    mass_budget,
    past_summaries,
    probe_rows,
    scatterbrain_attention,
    share_over_group,
    stable_topk,
    topk_mass,
)
from aerogel.attention.seer_gate import SeerGate

NAN, INF = math.nan, math.inf
FRACTIONS = (NAN, -0.1, 1.5, INF, "a", None, [0.5])
COUNTS = (NAN, -1, 1.5, INF, "a", [1], True)
SIZES = (0, None, *COUNTS)
CHOICES = ("nonsense", 3, None)


def qkv(kv_heads=4):
    draw = torch.Generator().manual_seed(0)
    shapes = ((1, 4, 32, 8), (1, kv_heads, 32, 8), (1, kv_heads, 32, 8))
    return dict(zip("qkv", (torch.randn(s, generator=draw) for s in shapes), strict=True))


def channels():
    return ChannelOrder({0: torch.arange(8).repeat(2, 1)})


def some_plan():
    return MoAPlan(((64.0, 64.0),), ((0.5, 0.2),))


PATTERN = {"num_heads": 4, "num_kv_heads": 2, "block": 16}
STRIDES = {
    "block": SIZES,
    "stride": SIZES,
    "local_blocks": (0, *COUNTS),
    "dense_heads": COUNTS,
    "head_offset": COUNTS,
    "step": COUNTS,
}
LAYER = {"d_model": 64, "num_heads": 4}
HEADS = {"d_model": SIZES, "num_heads": SIZES}
CASES = [
    (
        ZipVLSelector,
        {},
        {
            "tau": (0, *FRACTIONS),
            "probe_recent": FRACTIONS,
            "probe_random": FRACTIONS,
            "probe_max": SIZES,
            "keep_last": COUNTS,
            "keep_first": COUNTS,
            "seed": COUNTS,
            "dense_layers": COUNTS,
            "stream_gap": SIZES,
            "normalizer": CHOICES,
            "kv": CHOICES,
        },
    ),
    (
        MInferenceSelector,
        {},
        {
            "ratio": (NAN, 0, -1.0, INF, "a", None),
            "starting_layer": (-2, NAN, 1.5, "a"),
            "dense_below": COUNTS,
            "last_q": SIZES,
            "force_first": COUNTS,
            "force_local": COUNTS,
            "block": SIZES,
            "config": (3, NAN),
        },
    ),
    (S2Selector, {"block": 16, "local_blocks": 1}, {**STRIDES, "dense_layers": ("a", [-1])}),
    (LocalStridePattern, PATTERN, {**STRIDES, "num_heads": SIZES, "num_kv_heads": SIZES}),
    (
        CustomBlockPattern,
        {"mask": torch.ones(4, 2, 2, dtype=torch.bool).tril()},
        {"block": SIZES},
    ),
    (
        ScatterbrainSelector,
        {},
        {
            "num_features": (7, *COUNTS),
            "window": SIZES,
            "seed": COUNTS,
            "support": CHOICES,
        },
    ),
    (ScatterbrainSelector, {"support": "topk"}, {"count": SIZES}),
    (ScatterbrainSelector, {"support": "lsh"}, {"n_hashes": SIZES, "cluster_size": SIZES}),
    (
        CombinerSelector,
        {},
        {
            "seg_len": SIZES,
            "head_dim": (0, *COUNTS),
            "key_heads": (0, *COUNTS),
            "d_model": (0, *COUNTS),
            "dropout": (1.0, *FRACTIONS),
            "variant": CHOICES,
            "summary": CHOICES,
            "row_summary": CHOICES,
        },
    ),
    (
        RoutingSelector,
        {"num_heads": 2, "num_clusters": 4, "dim": 8},
        {
            "num_heads": SIZES,
            "num_clusters": SIZES,
            "dim": SIZES,
            "window": (0, *COUNTS),
            "context_window": (0, *COUNTS),
            "routing": CHOICES,
        },
    ),
    (
        SphericalKMeans,
        {"num_heads": 2, "num_clusters": 4, "dim": 8},
        {
            "decay": (1.0, *FRACTIONS),
            "commitment": (NAN, -1.0, INF, "a", None),
            "norm": CHOICES,
            "init": CHOICES,
        },
    ),
    (ElasticSpan, {"alpha": 64.0, "beta": 0.5}, {"alpha": (NAN, INF, "a"), "beta": FRACTIONS}),
    (
        MoAPlan,
        {"alphas": ((64.0,),), "betas": ((0.5,),)},
        {"block": SIZES, "sink": COUNTS},
    ),
    (
        MoASelector,
        {"plan": some_plan()},
        {"max_new": (None, *COUNTS), "length": (0, *COUNTS), "block": SIZES, "sink": COUNTS},
    ),
    (
        DoubleSparsitySelector,
        {"channels": channels()},
        {
            "heavy_tokens": SIZES,
            "group_factor": SIZES,
            "run": SIZES,
            "dense_layers": ([NAN], [-1], "a"),
            "label_bits": (3, NAN, "a", None),
        },
    ),
    (
        SeerAttentionSelector,
        {"gates": {0: SeerGate(4, 2, 16)}},
        {
            "start_layer": (None, *COUNTS),
            "method": CHOICES,
            "mode": CHOICES,
            "budget": (0, *COUNTS),
        },
    ),
    (
        SeerGate,
        {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16},
        {
            "num_q_heads": SIZES,
            "num_kv_heads": SIZES,
            "head_dim": SIZES,
            "gate_dim": SIZES,
            "rope_theta": (NAN, 0.0, -1.0, INF, "a"),
        },
    ),
    (LocalSupport, {}, {"window": SIZES}),
    (TopKSupport, {}, {"count": SIZES}),
    (BlockSupport, {"mask": torch.ones(2, 2, dtype=torch.bool)}, {"block": SIZES}),
    (
        SmyrfClusters,
        {},
        {"n_hashes": SIZES, "cluster_size_q": SIZES, "cluster_size_k": (0, *COUNTS)},
    ),
    (
        PositiveRandomFeatures,
        {"dim": 8},
        {
            "dim": SIZES,
            "num_features": (0, 7, *COUNTS),
            "eps": (NAN, -1.0, INF, "a", None),
            "softmax_scale": (NAN, 0.0, -1.0, INF, "a"),
            "norm": CHOICES,
        },
    ),
    (SparseSelfAttention, LAYER, {**HEADS, "num_kv_heads": (0, *COUNTS)}),
    (
        CombinerAttention,
        {**LAYER, "seg_len": 8},
        {**HEADS, "num_kv_heads": (0, *COUNTS), "dropout": (1.0, *FRACTIONS)},
    ),
    (ScatterbrainAttention, LAYER, {**HEADS, "dropout": (1.0, *FRACTIONS)}),
    (
        RoutingAttention,
        {**LAYER, "num_local_heads": 2, "num_clusters": 4},
        {
            **HEADS,
            "num_local_heads": (5, None, *COUNTS),
            "num_clusters": SIZES,
            "local_window": SIZES,
            "max_relative_position": SIZES,
            "num_mem_kv": COUNTS,
            "scale": (NAN, INF, "a"),
        },
    ),
    (
        attend,
        qkv(),
        {
            "scale": (NAN, INF, "a"),
            "softcap": (NAN, 0.0, -1.0, INF, "a"),
            "window": (0, *COUNTS),
            "dropout_p": (1.0, *FRACTIONS),
        },
    ),
    (combiner_summary, {**qkv(), "size": 8}, {"size": SIZES, "how": CHOICES}),
    (mass_budget, {"scores": torch.rand(2, 8)}, {"tau": (0, *FRACTIONS)}),
    (
        topk_mass,
        {"x": torch.rand(2, 8), "mass": 0.9},
        {"mass": (0, *FRACTIONS), "min_keep": (None, *COUNTS)},
    ),
    (stable_topk, {"x": torch.rand(2, 8)}, {"k": (9, None, *COUNTS)}),
    (share_over_group, {"scores": torch.rand(1, 4, 8)}, {"kv_heads": SIZES}),
    (
        probe_rows,
        {"length": 32},
        {
            "length": (None, *COUNTS),
            "recent": FRACTIONS,
            "random": FRACTIONS,
            "most": SIZES,
            "seed": (None, *COUNTS),
        },
    ),
    (
        past_summaries,
        {"shape": AttentionShape(1, 4, 4, 32, 32, causal=True), "block": 8, "summaries": 4},
        {"block": SIZES, "summaries": (None, *COUNTS)},
    ),
]


@pytest.mark.parametrize(
    ("call", "good", "name", "value"),
    [
        pytest.param(call, good, name, value, id=f"{call.__name__}-{name}-{value!r}")
        for call, good, bad in CASES
        for name, values in bad.items()
        for value in values
    ],
)
def test_bad_options_are_named(call, good, name, value):
    # A cluster's size is both sides'.
    said = f"{name}(_q)?" if name == "cluster_size" else name
    with pytest.raises((ValueError, TypeError), match=rf"\b{said}\b"):
        call(**{**good, name: value})


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("change", [lambda t: t[0], lambda t: t.flatten(), lambda t: t.long()])
@pytest.mark.parametrize(
    "call",
    [
        lambda q, k, v: attend(q, k, v),
        lambda q, k, v: combiner_summary(q, k, v, 8),
        lambda q, k, v: scatterbrain_attention(q, k, v, None, LocalSupport(4)),
    ],
    ids=["attend", "combiner_summary", "scatterbrain_attention"],
)
def test_tensors_of_other_kinds_are_named(call, change, name):
    tensors = qkv()
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        call(**{**tensors, name: change(tensors[name])})


@pytest.mark.parametrize("name", ["phi_q", "phi_k", "v"])
@pytest.mark.parametrize("change", [lambda t: t[0], lambda t: t.flatten(), lambda t: t[:, :3]])
def test_features_that_do_not_fit_are_named(change, name):
    tensors = dict(zip(("phi_q", "phi_k", "v"), qkv().values(), strict=True))
    with pytest.raises(ValueError, match=name):
        linear_attention(**{**tensors, name: change(tensors[name])})
