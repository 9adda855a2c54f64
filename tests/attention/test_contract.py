"""Every selector keeps the contract."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial

import contract
import pytest
import small_selectors as small
import torch
from contract import Case
from torch import Tensor

from aerogel.attention import (
    AttentionContext,
    AttentionShape,
    ChannelOrder,
    CombinerSelector,
    DoubleSparsitySelector,
    ElasticSpan,
    MInferenceSelector,
    MoAPlan,
    MoASelector,
    Plan,
    RoutingSelector,
    S2Selector,
    ScatterbrainSelector,
    SeerAttentionSelector,
    SpanPlan,
    ZipVLSelector,
)
from aerogel.attention.pattern_file import HeadPattern, PatternConfig
from aerogel.attention.prompt_patterns import (
    AShapeSelector,
    PooledBlockSelector,
    TriShapeSelector,
    VerticalSlashSelector,
)
from aerogel.attention.seer_gate import SeerGate
from aerogel.attention.spherical_kmeans import SphericalKMeans


def minference() -> MInferenceSelector:
    """Every head another pattern."""
    patterns = [
        HeadPattern("stream_llm", 4, 30),
        HeadPattern("vertical_and_slash", 8, 20),
        HeadPattern("block_sparse", 2, 0),
        HeadPattern("vertical_and_slash", 30, 8),
    ]
    layer = {head: patterns[head % 4] for head in range(8)}
    layers = ({head: layer[head] for head in range(4)}, layer)
    return _ByHeads(PatternConfig(layers), last_q=16, force_first=4, force_local=8)


class _ByHeads(MInferenceSelector):
    """Takes the configuration's layer for as many heads as there are."""

    def patterns(self, layer: int, heads: int) -> list[HeadPattern]:
        return super().patterns(0 if heads <= 4 else 1, heads)


class _Labels(DoubleSparsitySelector):
    """Takes drawn channels for whatever heads there are."""

    def __init__(self, **options):
        super().__init__(ChannelOrder({0: torch.arange(4)[None]}), **options)

    def label_channels(self, layer, q_heads, kv_heads, head_dim):
        heads = kv_heads if self.share_group is True else q_heads
        draw = torch.Generator().manual_seed(0)
        order = torch.rand(heads, head_dim, generator=draw).argsort(-1)
        return order[:, : head_dim // self.group_factor]


def labels(**options):
    return _Labels(**{"heavy_tokens": 20, "dense_layers": (), "sparse_prefill": True, **options})


class _Gated(SeerAttentionSelector):
    """Draws a gate for whatever heads there are; without rotary embedding, before is after."""

    def __init__(self, **options):
        super().__init__({0: SeerGate(4, 4, 16, gate_dim=8, block_size=16)}, **options)

    def plan_prefill(self, ctx):
        torch.manual_seed(0)
        sizes = (ctx.shape.q_heads, ctx.shape.kv_heads, ctx.q.shape[-1])
        self.gates["0"] = SeerGate(*sizes, gate_dim=8, block_size=16)
        ctx.q_pre, ctx.k_pre = ctx.q * 50, ctx.k[:, :, ctx.shape.q_offset :]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return super().plan_prefill(ctx)


CASES = {
    "seerattention": Case(
        lambda: _Gated(method="ratio", ratio=0.4, last_block_dense=False),
        lambda: _Gated(threshold=0.0),
        looks_ahead=True,  # a block's mean query knows its last rows
        chunk_invariant=False,
    ),
    "double-sparsity": Case(labels, lambda: labels(heavy_tokens=1000)),
    "double-sparsity, 4 bits": Case(lambda: labels(label_bits=4, group_factor=2)),
    "double-sparsity, runs": Case(
        lambda: labels(run=5, share_group=True), lambda: labels(heavy_tokens=1000, run=5)
    ),
    "test-dense": Case(small.Dense, small.Dense),
    "test-blocks": Case(small.Blocks, lambda: small.Blocks(1000)),
    "test-lists": Case(small.Lists, lambda: small.Lists(1000)),
    "test-spans": Case(small.Spans, lambda: small.Spans(0, 1000)),
    "test-block-spans": Case(
        lambda: small.Spans(1, 2, "block"), lambda: small.Spans(0, 1000, "block")
    ),
    "minference": Case(minference, MInferenceSelector, looks_ahead=True, chunk_invariant=False),
    "minference, columns and diagonals": Case(
        lambda: VerticalSlashSelector(12, 20, 16, 4, 8, 16),
        VerticalSlashSelector,
        looks_ahead=True,
        chunk_invariant=False,
    ),
    "minference, A-shape": Case(lambda: AShapeSelector(3, 40), AShapeSelector),
    "minference, tri-shape": Case(
        lambda: TriShapeSelector(3, 40, 20), TriShapeSelector, chunk_invariant=False
    ),
    "minference, blocks": Case(
        lambda: PooledBlockSelector(3, 16),
        PooledBlockSelector,
        looks_ahead=True,  # a block's mean query knows its last rows
    ),
    "zipvl": Case(
        lambda: ZipVLSelector(0.7),
        lambda: ZipVLSelector(1.0),
        looks_ahead=True,
        chunk_invariant=False,
        right_padding=False,
    ),
    "scatterbrain, window": Case(
        lambda: ScatterbrainSelector(support="local", window=40),
        lambda: ScatterbrainSelector(support="local", window=1000),
    ),
    "scatterbrain, top-k": Case(
        lambda: ScatterbrainSelector(support="topk", count=20),
        lambda: ScatterbrainSelector(support="topk", count=1000),
    ),
}
CASES["s2-attention"] = Case(
    lambda: S2Selector(16, 2, 3, dense_layers=(9,)), lambda: S2Selector(16, 1, 1)
)


class _AsManyHeads(MoASelector):
    """Spans for as many key heads as there are."""

    heads = 4

    def span(self, layer: int, length: int, granularity: str = "block") -> SpanPlan:
        span = super().span(layer, length, granularity)
        return span if self.heads == 4 else replace(span, **_first_two(span))

    def _placed(self, ctx: AttentionContext, granularity: str) -> Plan:
        self.heads = ctx.shape.kv_heads
        return super()._placed(ctx, granularity)

    def plan_decode(self, ctx: AttentionContext) -> Plan:
        self.heads = ctx.shape.kv_heads
        return super().plan_decode(ctx)


def _first_two(span: SpanPlan) -> dict[str, Tensor]:
    return {n: getattr(span, n)[:2] for n in ("sink", "window", "stride", "phase", "dense")}


def moa(*rules: ElasticSpan) -> MoASelector:
    return _AsManyHeads(MoAPlan.of([list(rules)], 16, 16), 0, 320)


CASES["moa"] = Case(
    lambda: moa(ElasticSpan(0, 0.25), ElasticSpan(48, 0), ElasticSpan(0, 1), ElasticSpan(-32, 0.5)),
    lambda: moa(*[ElasticSpan(0, 1)] * 4),
)


class _Routed(RoutingSelector):
    """Draws centroids for whatever heads there are."""

    def __init__(self, clusters: int, window: int, **options):
        super().__init__(1, clusters, 16, window, share_qk=False, fit=True, **options)

    def plan_prefill(self, ctx):
        torch.manual_seed(0)
        sizes = (ctx.shape.q_heads, self.kmeans.mu.shape[1], ctx.q.shape[-1])
        self.kmeans = SphericalKMeans(*sizes)
        return super().plan_prefill(ctx)

    plan_decode = plan_prefill


# Both read whole sequences: earlier queries choose centroids, and pool summaries.
WHOLE = {"whole": True, "one_softmax": False, "chunk_invariant": False}
CASES["routing-transformer"] = Case(
    lambda: _Routed(4, 30),
    lambda: _Routed(1, 1000),
    looks_ahead=True,
    right_padding=False,
    **WHOLE,
)
CASES["routing-transformer, causal"] = Case(
    lambda: _Routed(4, 30, causal_selection=True), right_padding=False, longest=7, **WHOLE
)
for variant in ("fixed", "logsparse", "axial", "mixture"):
    CASES[f"combiner, {variant}"] = Case(
        partial(CombinerSelector, variant, 16, row_summary="wsum"), **WHOLE
    )
CASES["combiner, one block"] = Case(
    partial(CombinerSelector, "fixed", 16), partial(CombinerSelector, "fixed", 1000), **WHOLE
)
SHAPES = {
    "one token": AttentionShape(3, 8, 2, 1, 65, causal=True),
    "few": AttentionShape(1, 4, 4, 7, 7, causal=True),
    "block": AttentionShape(3, 8, 2, 64, 64, causal=True),
    "chunk": AttentionShape(1, 4, 4, 64, 190, causal=True),
    "long": AttentionShape(1, 8, 2, 300, 300, causal=True),
}


def calls(*sizes: str, one_softmax: bool = False):
    """Parametrizes over the selectors and the shapes that each plans."""
    return pytest.mark.parametrize(
        ("slug", "size"),
        [
            (slug, size)
            for slug, case in CASES.items()
            for size in sizes or SHAPES
            if case.takes(SHAPES[size]) and (case.one_softmax or not one_softmax)
        ],
    )


@calls()
@pytest.mark.parametrize("dim", [16, 96])
def test_native_is_the_reference(slug, size, dim):
    contract.check_native_is_the_reference(CASES[slug], SHAPES[size], dim)


@calls("chunk")
def test_native_is_the_reference_in_heads_of_64(slug, size):
    contract.check_native_is_the_reference(CASES[slug], SHAPES[size], 64)


@calls()
def test_a_full_budget_is_dense_attention(slug, size):
    contract.check_full_budget_is_dense(CASES[slug], SHAPES[size])


@calls()
def test_no_row_sees_later_keys(slug, size):
    contract.check_no_row_sees_later_keys(CASES[slug], SHAPES[size])


@calls(one_softmax=True)
def test_a_step_is_the_last_row_of_the_prompt(slug, size):
    contract.check_decode_is_the_last_row(CASES[slug], SHAPES[size])


@calls("block", "chunk", "long")
def test_chunks_are_one_prompt(slug, size):
    contract.check_chunks_are_one_prompt(CASES[slug], SHAPES[size])


@calls()
def test_counts_batches_and_threads(slug, size):
    contract.check_counts_batches_and_threads(CASES[slug], SHAPES[size])


@calls(one_softmax=True)
def test_splits_merge(slug, size):
    contract.check_splits_merge(CASES[slug], SHAPES[size])
