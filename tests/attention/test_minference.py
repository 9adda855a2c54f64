"""What MInference promises: lines recovered, bands as the kernel's, patterns searched and saved."""

from __future__ import annotations

import json

import plans as make
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import prompts, tiny

from aerogel.attention import (
    AttentionContext,
    AttentionShape,
    DensePlan,
    HeadMixPlan,
    attach,
    attend,
)
from aerogel.attention.minference import MInferenceSelector
from aerogel.attention.pattern_file import (
    HeadPattern,
    PatternConfig,
    load_patterns,
    save_patterns,
)
from aerogel.attention.pattern_search import search_patterns
from aerogel.attention.prompt_patterns import (
    AShapeSelector,
    PooledBlockSelector,
    TriShapeSelector,
    VerticalSlashSelector,
)
from aerogel.attention.vertical_slash import diagonal_sums, vertical_slash_plan


def context(shape, q=None, k=None, padding=None, layer=0, dim=16):
    drawn = make.tensors(shape, dim)
    q = drawn[0] if q is None else q
    k = drawn[1] if k is None else k
    return AttentionContext(
        q, k, drawn[2], shape, q.shape[-1] ** -0.5, layer_idx=layer, key_padding=padding
    )


@pytest.mark.parametrize(
    "positions",
    [
        [[11, 12, 13, 14, 15], [15, 16, 17, 18, 19]],  # neighbours
        [[-2, -1, 0, 1, 2], [20, 21, 22, 23, 24]],  # in part before and behind the keys
        [[0, 2, 3, 9, 15], [1, 2, 3, 4, 5]],
    ],
)
def test_diagonal_sums_are_those_of_a_loop(positions):
    weights = torch.rand(2, 3, 5, 20)
    positions = torch.tensor(positions)
    sums = diagonal_sums(weights, positions)
    want = torch.zeros(2, 3, 20)
    for b in range(2):
        for i in range(5):
            for j in range(20):
                o = int(positions[b, i]) - j
                if 0 <= o < 20:
                    want[b, :, o] += weights[b, :, i, j]
    torch.testing.assert_close(sums, want)


def bands_one_by_one(columns, offsets, tiles, first_end, block):
    """The published rule for one head, tile by tile."""
    for m in range(tiles):
        end, ranges = first_end + m * block, []
        for e in sorted(max(end - o, block) for o in offsets if o < end):
            if not ranges or e > ranges[-1][1] + block:
                ranges.append([e - block, e])
            elif e > ranges[-1][1]:
                ranges[-1][1] += block
        inside = [c for c in columns if not any(a <= c < b for a, b in ranges)]
        yield ranges, [c for c in inside if c < ranges[-1][0]]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 500), st.data())
def test_bands_join_by_the_published_rule(length, data):
    rows = data.draw(st.integers(1, length))
    block = data.draw(st.sampled_from([16, 64]))
    near = st.integers(0, length - 1)
    offsets = sorted({0, *data.draw(st.lists(near, max_size=30))})
    columns = sorted(set(data.draw(st.lists(near, max_size=30))))
    shape = AttentionShape(1, 1, 1, rows, length, causal=True)
    lists = torch.tensor([[columns]], dtype=torch.int64), torch.tensor([[offsets]])
    plan = vertical_slash_plan(*lists, length, rows, block=block)
    plan.validate(shape)
    want = torch.zeros(rows, length, dtype=torch.bool)
    tiles = shape.tiles(block)
    first_end = length - rows + block
    for m, (ranges, extra) in enumerate(
        bands_one_by_one(columns, offsets, tiles, first_end, block)
    ):
        for a, b in ranges:
            want[m * block : (m + 1) * block, a:b] = True
        want[m * block : (m + 1) * block, extra] = True
    got = plan.to_dense_mask(shape)[0, 0]
    assert torch.equal(got, want & shape.causal_mask())
    tight = vertical_slash_plan(*lists, length, rows, block=block, merge="tight")
    tight.validate(shape)
    for mask in (got, tight.to_dense_mask(shape)[0, 0]):
        p, j = shape.positions()[:, None], torch.arange(length)
        for o in offsets:
            assert bool(mask[(p - j) == o].all()), "a diagonal is not whole"
        for c in columns:
            assert bool(mask[:, c][p[:, 0] >= c].all()), "a column is not whole"


def test_the_estimate_recovers_exact_columns_and_diagonals():
    length, dim = 256, 64
    columns, offsets = [5, 77, 130], [0, 40, 96]
    q, k = torch.zeros(1, 1, length, dim), torch.zeros(1, 1, length, dim)
    phase = torch.arange(length) / length * 2 * torch.pi
    frequencies = torch.arange(1, 31)
    angles = phase[:, None] * frequencies
    k[0, 0, :, :30], k[0, 0, :, 30:60] = angles.cos(), angles.sin()
    for o in offsets:  # a query at p points to the keys at p - o
        shifted = (phase - o / length * 2 * torch.pi)[:, None] * frequencies
        q[0, 0, :, :30] += shifted.cos()
        q[0, 0, :, 30:60] += shifted.sin()
    k[0, 0, columns, 60], q[0, 0, :, 60] = 30.0, 1.0
    shape = AttentionShape(1, 1, 1, length, length, causal=True)
    selector = VerticalSlashSelector(3, 3, force_first=0, force_local=1)
    ctx = context(shape, q * 8, k)
    found = selector.estimate(ctx, torch.tensor([0]))
    assert found[0].flatten().tolist() == columns
    assert found[1].flatten().tolist() == offsets


def test_forced_lines_are_always_there_and_start_at_the_first_real_key():
    shape = AttentionShape(2, 4, 2, 200, 200, causal=True)
    padding = torch.arange(200) >= torch.tensor([[0], [50]])
    selector = VerticalSlashSelector(40, 60, force_first=10, force_local=20)
    columns, offsets = selector.estimate(context(shape, padding=padding), torch.arange(4))
    assert columns.shape == (2, 4, 40)
    assert offsets.shape == (2, 4, 60)
    for b, first in ((0, 0), (1, 50)):
        for head in range(4):
            assert set(range(first, first + 10)) <= set(columns[b, head].tolist())
            assert set(range(20)) <= set(offsets[b, head].tolist())


def test_the_last_real_queries_vote_whatever_the_padding():
    shape = AttentionShape(1, 4, 2, 100, 100, causal=True)
    selector = VerticalSlashSelector(20, 50, force_first=2, force_local=4)
    alone = selector.estimate(context(shape), torch.arange(4))
    ctx = context(shape)
    q, k = (torch.nn.functional.pad(t, (0, 0, 0, 30)) for t in (ctx.q, ctx.k))
    longer = AttentionShape(1, 4, 2, 130, 130, causal=True)
    real = torch.arange(130)[None] < 100
    padded = selector.estimate(context(longer, q, k, real), torch.arange(4))
    assert torch.equal(alone[0], padded[0])
    assert torch.equal(alone[1], padded[1])


def test_a_shape_and_tri_shape_keep_their_keys():
    shape = AttentionShape(1, 2, 2, 150, 150, causal=True)
    p, j = torch.arange(150)[:, None], torch.arange(150)
    local = (j <= p) & ((j < 4) | (p - j < 20))
    plan = AShapeSelector(4, 20).plan_prefill(context(shape))
    assert torch.equal(plan.to_dense_mask(shape)[0, 0], local)
    plan = TriShapeSelector(4, 20, 30).plan_prefill(context(shape))
    mask = plan.to_dense_mask(shape)[0, 0]
    assert torch.equal(mask, torch.where(p >= 120, j <= p, local))
    q, k, v = make.tensors(shape)
    for backend in ("native", "reference"):
        out = attend(q, k, v, plan=plan, causal=True, backend=backend)
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        torch.testing.assert_close(out, want, rtol=2e-5, atol=2e-5)


def test_pooled_blocks_with_a_budget_for_all_are_dense():
    shape = AttentionShape(2, 4, 2, 100, 100, causal=True)
    plan = PooledBlockSelector(100, 16).plan_prefill(context(shape))
    assert plan.density(shape) == 1
    few = PooledBlockSelector(2, 16).plan_prefill(context(shape))
    own = torch.arange(100) // 16
    mask = few.to_dense_mask(shape)
    assert mask[..., (own[:, None] == own) & shape.causal_mask()].all()
    assert int(few.row_ptr.diff().max()) == 2


def test_heads_follow_their_own_pattern():
    shape = AttentionShape(1, 4, 2, 300, 300, causal=True)
    layer = {
        0: HeadPattern("stream_llm", 8, 40),
        1: HeadPattern("vertical_and_slash", 10, 50),
        2: HeadPattern("block_sparse", 2, 0),
        3: HeadPattern("vertical_and_slash", 300, 300),
    }
    selector = MInferenceSelector(PatternConfig((layer,)), force_first=4, force_local=10)
    ctx = context(shape)
    plan = selector.plan_prefill(ctx)
    assert isinstance(plan, HeadMixPlan)
    mask = plan.to_dense_mask(shape)[0]
    alone = AShapeSelector(8, 40).plan_prefill(ctx).to_dense_mask(shape)[0, 0]
    assert torch.equal(mask[0], alone)
    assert mask[3].sum() == shape.pairs()
    q, k, v = make.tensors(shape)
    out = attend(q, k, v, plan=plan, causal=True)
    want = attend(q, k, v, plan=plan, causal=True, backend="reference")
    torch.testing.assert_close(out, want, rtol=2e-5, atol=2e-5)


def test_short_prompts_low_layers_and_steps_are_dense():
    selector = MInferenceSelector(starting_layer=1, dense_below=64)
    long = AttentionShape(1, 4, 2, 100, 100, causal=True)
    assert isinstance(selector.plan_prefill(context(long)), DensePlan)
    short = AttentionShape(1, 4, 2, 64, 64, causal=True)
    assert isinstance(selector.plan_prefill(context(short, layer=1)), DensePlan)
    one = AttentionShape(1, 4, 2, 1, 100, causal=True)
    assert isinstance(selector.plan_decode(context(one, layer=1)), DensePlan)
    assert isinstance(MInferenceSelector().plan_prefill(context(long)), DensePlan)


@pytest.mark.parametrize(("window", "dense"), [(190, True), (170, False)])
def test_a_window_that_keeps_85_percent_of_the_pairs_is_dense(window, dense):
    selector = MInferenceSelector(
        PatternConfig(({h: HeadPattern("stream_llm", 10, window) for h in range(4)},))
    )
    shape = AttentionShape(1, 4, 2, 300, 300, causal=True)
    plan = selector.plan_prefill(context(shape))
    assert isinstance(plan, DensePlan) == dense
    assert (
        AShapeSelector(10, window).plan_prefill(context(shape)).density(shape) >= 0.85 or not dense
    )


def test_configurations_survive_a_round_trip(tmp_path):
    config = PatternConfig(
        ({0: HeadPattern("stream_llm", 100, 800)}, {}, {3: HeadPattern("block_sparse", 9, 0)}),
        ({0: 0.25}, {}, {3: 1.5}),
    )
    save_patterns(config, tmp_path / "patterns.json")
    assert load_patterns(tmp_path / "patterns.json") == config
    assert MInferenceSelector(tmp_path / "patterns.json").config == config
    options = json.loads(json.dumps(MInferenceSelector(config).options()))
    assert MInferenceSelector(**options).config == config


def test_the_search_takes_the_candidate_of_least_error_within_the_budget():
    model = tiny("Llama")
    ids = prompts(1, 150)[0]
    cheap = HeadPattern("vertical_and_slash", 4, 8)
    good = HeadPattern("vertical_and_slash", 150, 150)
    options = {"force_first": 2, "force_local": 4, "block": 16, "last_q": 16}
    for metric in ("output_l2", "count", "recall"):
        found = search_patterns(model, ids, (cheap, good), metric=metric, **options)
        assert len(found.layers) == 2
        assert all(pattern == good for layer in found.layers for pattern in layer.values())
    found = search_patterns(model, ids, (good, cheap), budget=0.5, **options)
    assert all(pattern == cheap for layer in found.layers for pattern in layer.values())
    assert model.config._attn_implementation == "eager"


def test_a_model_runs_by_name_and_generates():
    model = tiny("Llama")
    ids, mask = prompts()
    options = {"max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4}
    want = model.generate(ids, attention_mask=mask, **options)
    model.set_attn_implementation("aerogel:minference")
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), want)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"0": ["columns", 1, 2, 0]}], "type of"),
        ([{"0": ["stream_llm", -1, 2, 0]}], "at least 0"),
        ([{"0": ["stream_llm", 1]}], "v, s"),
        ({"0": 1}, "list"),
    ],
)
def test_bad_configurations_are_named(rows, words):
    with pytest.raises(ValueError, match=words):
        PatternConfig.from_json(rows)


def test_what_does_not_fit_is_refused():
    config = PatternConfig(({9: HeadPattern()},))
    shape = AttentionShape(1, 4, 2, 100, 100, causal=True)
    with pytest.raises(ValueError, match="head 9 in layer 0, but 4 heads"):
        MInferenceSelector(config).plan_prefill(context(shape))
    with pytest.raises(ValueError, match="1 layers"):
        MInferenceSelector(config).plan_prefill(context(shape, layer=1))
    with pytest.raises(ValueError, match="causal"):
        MInferenceSelector().plan_prefill(context(AttentionShape(1, 4, 2, 100, 100)))
    with pytest.raises(ValueError, match="vertical"):
        VerticalSlashSelector(-1)
    with pytest.raises(ValueError, match="offset 0"):
        one = torch.ones(1, 1, 1, dtype=torch.int64)
        vertical_slash_plan(one, one, 10)


def test_a_configuration_of_another_model_is_refused():
    with pytest.raises(ValueError, match="3 layers, but the model has 2"):
        attach(tiny("Llama"), MInferenceSelector(PatternConfig(({}, {}, {}))))
