"""What plans promise: their mask, their counts, their checks, their constructors."""

from __future__ import annotations

from dataclasses import replace

import plans as make
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tile_reference import stream_planes

from aerogel.attention import (
    AttentionShape,
    Bank,
    BankPlan,
    BlockPlan,
    DensePlan,
    GroupPlan,
    HeadMixPlan,
    KeyListPlan,
    SpanPlan,
    TokenPlan,
    share_over_group,
    stable_topk,
    topk_mass,
)
from aerogel.attention.lowering import lower, lower_pass

shapes = st.builds(
    lambda b, heads, lq, more, causal: AttentionShape(b, *heads, lq, lq + more, causal=causal),
    st.integers(1, 2),
    st.sampled_from([(1, 1), (4, 2), (4, 4)]),
    st.integers(1, 150),
    st.sampled_from([0, 1, 7, 64, 130]),
    st.booleans(),
)


@settings(max_examples=20, deadline=None)
@given(shapes, st.integers(0, 10**6), st.sampled_from([None, 1, 20, 100]), st.booleans())
def test_lowered_tiles_hold_exactly_the_pairs_of_the_mask(shape, seed, window, padded):
    padding = None
    if padded:
        draw = torch.Generator().manual_seed(seed)
        padding = make.coin(draw, 0.8, shape.batch, shape.k_len)
    for name, plan in make.masked_plans(shape, seed).items():
        plan.validate(shape)
        inner = plan.shaped(shape)
        union = torch.zeros(1, 1, shape.q_len, shape.k_len, dtype=torch.bool)
        for stream in lower(plan.passes(inner), inner, window):
            mask, _ = stream_planes(stream, inner, padding)
            assert not (union & mask).any(), f"{name}: a pair in two passes"
            union = union | mask
        expected = plan.to_dense_mask(shape)
        if window is not None:
            distance = shape.positions()[:, None] - torch.arange(shape.k_len)
            expected = expected & (distance < window)
        if padding is not None:
            expected = expected & padding[:, None, None]
        assert torch.equal(*torch.broadcast_tensors(union, expected)), name


@settings(max_examples=12, deadline=None)
@given(shapes, st.integers(0, 10**6))
def test_density_counts_the_pairs_of_the_mask(shape, seed):
    plans = make.masked_plans(shape, seed)
    draw = torch.Generator().manual_seed(seed)
    plans["groups"] = make.random_groups(shape, draw, shape.batch, shape.q_heads, "scatter")
    if shape.q_len == shape.k_len:
        plans["tokens"] = make.random_tokens(shape, draw, "both")
        plans["tokens per head"] = make.random_tokens(shape, draw, "keys", per_head=True)
    for name, plan in plans.items():
        inner, mask = plan.shaped(shape), plan.to_dense_mask(shape)
        assert torch.equal(plan.row_counts(shape), mask.sum(-1)), name
        pairs = inner.pairs() * mask.shape[0] * mask.shape[1]
        assert plan.density(inner) == pytest.approx(int(mask.sum()) / max(1, pairs)), name


def test_every_tile_has_at_most_64_keys_and_edges_only_where_they_cut():
    shape = AttentionShape(1, 1, 1, 256, 256, causal=True)
    stream = lower_pass(DensePlan().passes(shape)[0], shape)
    assert int(stream.length.max()) == 64
    assert stream.tile_ptr.diff().tolist() == [1, 2, 3, 4]
    assert (stream.kind & 1).tolist() == [1, 0, 1, 0, 0, 1, 0, 0, 0, 1]


def test_span_keeps_sinks_windows_and_strides():
    shape = AttentionShape(1, 1, 1, 96, 96, causal=True)
    plan = SpanPlan.uniform(3, 10, stride=3, phase=1, block=8)
    mask = plan.to_dense_mask(shape)[0, 0]
    for p in range(96):
        for j in range(96):
            kept = j <= p and (j < 3 or p - j < 10 or (j // 8 + 1) % 3 == 0)
            assert bool(mask[p, j]) == kept
    blocks = replace(SpanPlan.uniform(1, 2, block=8), granularity="block")
    mask = blocks.to_dense_mask(shape)[0, 0]
    for p in range(96):
        for j in range(96):
            assert bool(mask[p, j]) == (j <= p and (j < 8 or p // 8 - j // 8 < 2))


def test_constructors_agree_on_the_same_choice():
    draw = torch.Generator().manual_seed(0)
    shape = AttentionShape(2, 2, 2, 100, 130)
    scores = torch.randn(2, 2, 2, 3, generator=draw)
    plan = BlockPlan.from_topk(scores, 2, causal=False, force_diagonal=False)
    best = scores.topk(2).indices
    named = BlockPlan.from_lists(torch.nn.functional.pad(best, (0, 1), value=-1))
    ranges = BlockPlan.from_ranges(best * 64, torch.full_like(best, 64))
    dense = plan.to_dense_mask(shape)
    assert torch.equal(dense, named.to_dense_mask(shape))
    assert torch.equal(dense, ranges.to_dense_mask(shape))
    floor = BlockPlan.from_threshold(scores, float(scores.min()), causal=False)
    assert floor.density(shape) == 1


def test_topk_blocks_force_the_diagonal_and_never_look_ahead():
    scores = torch.arange(5.0).expand(1, 1, 5, 5)
    plan = BlockPlan.from_topk(scores, 2)
    kept = plan.to_dense_mask(AttentionShape(1, 1, 1, 5 * 64, 5 * 64))[0, 0, ::64, ::64]
    assert kept.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1],
    ]


def test_regions_attend_to_regions():
    index = torch.tensor([[[0, 1], [1, 2], [2, 3], [3, 0], [4, 5], [5, 0]]])
    plan = BlockPlan.from_regions(2, index, 6, (4, 9))  # 2 x 3 regions of 2 x 3 tokens
    shape = AttentionShape(1, 1, 1, 36, 36)
    plan.validate(shape)
    region = (torch.arange(36) // 9 // 2) * 3 + torch.arange(36) % 9 // 3
    expected = (index[0][region][:, :, None] == region).any(1)
    assert torch.equal(plan.to_dense_mask(shape)[0, 0], expected)


def test_union_keeps_the_pairs_of_both():
    shape = AttentionShape(1, 2, 2, 130, 200, causal=False)
    draw = torch.Generator().manual_seed(1)
    for build in (make.random_offsets, make.random_list):
        a, b = build(shape, draw, 1, 2), build(shape, draw, 1, 2)
        both = a.union(b, shape.k_len)
        both.validate(shape)
        assert torch.equal(
            both.to_dense_mask(shape), a.to_dense_mask(shape) | b.to_dense_mask(shape)
        )


def test_intersect_causal_changes_nothing_under_the_causal_rule():
    shape = AttentionShape(1, 2, 2, 100, 140, causal=True)
    draw = torch.Generator().manual_seed(2)
    for build in (make.random_block, make.random_offsets, make.random_list):
        plan = build(shape, draw, 1, 2)
        cut = plan.intersect_causal(shape.q_offset)
        cut.validate(shape)
        assert torch.equal(cut.to_dense_mask(shape), plan.to_dense_mask(shape))
        assert cut.passes(shape)[0].ranges.length.sum() <= plan.passes(shape)[0].ranges.length.sum()


def test_key_list_from_index_drops_repeats_and_opens_prefix_rows():
    index = torch.tensor([[[[3, 1, 3], [-1, 2, -1], [0, 0, 0]]]])
    plan = KeyListPlan.from_index(index, dense_prefix_rows=1, k_len=5)
    shape = AttentionShape(1, 1, 1, 3, 5)
    plan.validate(shape)
    assert plan.to_dense_mask(shape)[0, 0].int().tolist() == [
        [1, 1, 1, 1, 1],
        [0, 0, 1, 0, 0],
        [1, 0, 0, 0, 0],
    ]


def test_stable_topk_takes_the_lowest_index_of_ties():
    assert stable_topk(torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0]), 2).tolist() == [1, 2]
    assert stable_topk(torch.zeros(2, 4), 3).tolist() == [[0, 1, 2]] * 2


def test_topk_mass_is_the_smallest_set_that_reaches_the_mass():
    x = torch.tensor([[0.5, 0.1, 0.3, 0.1]])
    assert topk_mass(x, 0.5).tolist() == [[True, False, False, False]]
    assert topk_mass(x, 0.75).tolist() == [[True, False, True, False]]
    assert topk_mass(x, 1.0).all()


def test_share_over_group_unites_neighbouring_heads():
    scores = torch.arange(8.0).view(1, 4, 2)
    assert share_over_group(scores, 2, "max").tolist() == [[[2, 3], [6, 7]]]
    assert share_over_group(scores, 2, "mean").tolist() == [[[1, 2], [5, 6]]]


def test_stats_and_device_moves():
    shape = AttentionShape(1, 2, 1, 128, 128, causal=True)
    plan = BlockPlan.from_mask(torch.eye(2, dtype=torch.bool)[None, None])
    stats = plan.stats(shape, head_dim=8)
    assert (stats.min_row, stats.max_row) == (1, 64)
    assert stats.kv_bytes == 2 * 4 * 8 * 128 * 2
    assert plan.to("cpu").col.equal(plan.col)


def test_stats_of_every_plan_count_what_its_rows_and_tiles_read():
    shape = AttentionShape(2, 4, 2, 150, 150, causal=True)
    draw = torch.Generator().manual_seed(0)
    groups = make.random_groups(shape, draw, 2, 4, "scatter")
    summary = KeyListPlan.from_bitmask(torch.ones(1, 1, 150, 3, dtype=torch.bool))
    bank = Bank(summary, *torch.zeros(2, 2, 2, 3, 8), causal_rule="none")
    blocks = BlockPlan.from_mask(torch.eye(3, dtype=torch.bool)[None, None])
    plans = {
        **make.masked_plans(shape, 0),
        "dense": DensePlan(),
        "groups": groups,
        "tokens": make.random_tokens(shape, draw, "both"),
        "banks": BankPlan((Bank(blocks), bank)),
        "mix": HeadMixPlan.of({(0, 2): blocks, (1, 3): SpanPlan.uniform(3, 20)}),
    }
    for name, plan in plans.items():
        stats, counts = plan.stats(shape, head_dim=8), plan.row_counts(shape)
        assert (stats.min_row, stats.max_row) == (int(counts.min()), int(counts.max())), name
        assert stats.density == pytest.approx(plan.density(shape)), name
        assert stats.kv_bytes >= int(counts.max()), name
    read = {name: plans[name].keys_read(shape) for name in ("dense", "groups", "banks", "mix")}
    assert read["dense"] == 64 + 128 + 150
    assert read["groups"] == int((groups.kv_idx >= 0).sum()) / (2 * 4)
    assert read["banks"] == 150 + 3 * 150
    assert read["mix"] == (150 + plans["mix"].parts[1][1].keys_read(shape)) / 2
    with pytest.raises(ValueError, match="banks have"):
        plans["banks"].to_dense_mask(shape)


def _key_list(keys, ptr=(0, 2)):
    return KeyListPlan(torch.tensor([[ptr]]), torch.tensor(keys, dtype=torch.int32))


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (BlockPlan.from_mask(torch.ones(2, 1, 1, 1, dtype=torch.bool)), "batch dimension 2"),
        (BlockPlan.from_mask(torch.ones(1, 3, 1, 1, dtype=torch.bool)), "3 heads"),
        (BlockPlan.from_mask(torch.ones(1, 1, 2, 1, dtype=torch.bool)), "row_ptr"),
        (BlockPlan.from_mask(torch.ones(1, 1, 1, 2, dtype=torch.bool)), "first keys"),
        (_key_list([1, 0]), "ascending"),
        (_key_list([1, 9]), "keys 1 to 9"),
        (_key_list([1, 2], (0, 1)), "row starts"),
        (GroupPlan(torch.zeros(1, 1, 1, 1).int(), torch.tensor([[[[0, 0]]]]).int()), "twice"),
        (TokenPlan(torch.tensor([[1, 0]]).int(), torch.tensor([2])), "ascending"),
        (TokenPlan(torch.tensor([[0, 1]]).int(), torch.tensor([3])), "at most 2"),
        (TokenPlan(torch.zeros(1, 3, 1).int(), torch.ones(1, 3).long()), "3 heads"),
        (HeadMixPlan.of({(0,): DensePlan()}), "heads"),
    ],
)
def test_plans_of_another_shape_are_refused(plan, words):
    with pytest.raises(ValueError, match=words):
        plan.validate(AttentionShape(1, 2, 2, 1, 5))


def test_overlapping_tiles_and_extra_keys_inside_tiles_are_refused():
    ptr, one = torch.tensor([[[0, 2]]]), torch.tensor([[[0, 1]]])
    shape = AttentionShape(1, 1, 1, 64, 200)
    overlap = BlockPlan(64, 64, ptr, torch.tensor([0, 50], dtype=torch.int32), True)
    with pytest.raises(ValueError, match="disjoint"):
        overlap.validate(shape)
    inside = BlockPlan(
        64, 64, ptr, torch.tensor([0, 100]).int(), True, None, one, torch.tensor([120]).int()
    )
    with pytest.raises(ValueError, match="extra_idx"):
        inside.validate(shape)
