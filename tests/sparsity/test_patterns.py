"""What is zero together."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aerogel.sparsity import (
    NM,
    Block,
    Channel,
    Filter,
    KernelGroup,
    KernelPattern,
    NMPairs,
    TransposableNM,
    Unstructured,
    build_masks,
    parse_pattern,
)

QUICK = settings(max_examples=40, deadline=None)
nm = st.integers(1, 8).flatmap(lambda m: st.tuples(st.integers(1, m), st.just(m)))
kernels = st.sampled_from([(), (3,), (2, 3), (1, 1), (2, 1, 2)])


def scores_of(shape, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 5, shape, generator=generator).to(dtype)


@QUICK
@given(
    nm,
    st.sampled_from([0, 1]),
    kernels,
    st.tuples(st.integers(1, 19), st.integers(1, 19)),
    st.integers(0, 99),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_nm_holds_for_every_axis_layer_kind_and_type(pair, axis, kernel, channels, seed, dtype):
    pattern = NM(*pair, axis, pad=True)
    shape = (*channels, *kernel)
    mask = build_masks({"w": scores_of(shape, seed, dtype)}, None, pattern)["w"]
    assert mask.shape == shape
    rows = mask.movedim(axis, -1).reshape(-1, shape[axis])
    for group in rows.split(pattern.m, dim=1):
        assert (group.sum(dim=1) == min(pattern.n, group.shape[1])).all()
    assert pattern.is_satisfied(mask, exact=True)


@QUICK
@given(nm, kernels, st.integers(1, 3), st.integers(0, 99))
def test_nm_keeps_the_largest_of_each_group(pair, kernel, groups, seed):
    pattern = NM(*pair)
    score = scores_of((3, groups * pattern.m, *kernel), seed)
    mask = pattern.select(score)
    kept, dropped = pattern.groups(score.masked_fill(~mask, 99)), pattern.groups(score)
    for full, chosen in zip(dropped, kept != 99, strict=True):
        order = sorted(range(pattern.m), key=lambda i: (-float(full[i]), i))
        assert sorted(order[: pattern.n]) == chosen.nonzero().flatten().tolist()


def test_groups_never_straddle_rows():
    pattern = NM(1, 4, pad=True)
    score = torch.arange(12.0).view(2, 6)
    assert pattern.select(score).tolist() == [
        [False, False, False, True, False, True],
        [False, False, False, True, False, True],
    ]


@QUICK
@given(
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(1, 12),
    st.integers(1, 12),
    st.floats(0.05, 1),
    st.sampled_from(["l2", "avg", "max", "sum"]),
    st.integers(0, 99),
)
def test_block_masks_are_unions_of_tiles(bh, bw, out, inputs, density, pool, seed):
    pattern = Block(bh, bw)
    mask = build_masks({"w": scores_of((out, inputs), seed)}, density, pattern, pool=pool)["w"]
    for top in range(0, out, bh):
        for left in range(0, inputs, bw):
            tile = mask[top : top + bh, left : left + bw]
            assert bool(tile.all()) or not bool(tile.any())
    assert pattern.is_satisfied(mask)


def test_pooling_of_ragged_tiles_ignores_what_does_not_exist():
    score = torch.tensor([[1.0, 3.0, 5.0]])
    pattern = Block(2, 2)
    assert pattern.pooled(score, "avg").tolist() == [[2.0, 5.0]]
    assert pattern.pooled(score, "max").tolist() == [[3.0, 5.0]]
    assert pattern.pooled(-score, "max").tolist() == [[-1.0, -5.0]]
    assert pattern.pooled(score, "l2").flatten().tolist() == pytest.approx([10**0.5, 5.0])
    assert pattern.unit_sizes((1, 3)).tolist() == [[2, 1]]


@pytest.mark.parametrize(
    ("pattern", "units"),
    [
        (Unstructured(), (6, 45)),
        (Filter(), (6, 1)),
        (Channel(), (5, 1)),
        (KernelGroup(4), (2, 5)),
        (Block(4, 3, flatten=True), (2, 15)),
    ],
)
def test_units_of_a_convolution(pattern, units):
    shape = (6, 5, 3, 3)
    assert pattern.unit_grid(shape) == units
    assert int(pattern.unit_sizes(shape).sum()) == 6 * 5 * 9
    one = torch.zeros(units, dtype=torch.bool)
    one.view(-1)[-1] = True
    mask = pattern.expand(one, shape)
    assert int(mask.sum()) == int(pattern.unit_sizes(shape).view(-1)[-1])
    assert pattern.is_satisfied(mask)


def test_kernel_groups_live_and_die_together():
    mask = build_masks({"w": torch.randn(10, 4, 3, 3).abs()}, 0.5, KernelGroup(4))["w"]
    kernels = mask.flatten(2)
    assert (kernels.all(dim=2) == kernels.any(dim=2)).all()
    for rows in kernels.any(dim=2).split(4):
        assert (rows == rows[0]).all()


@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 4), (2, 4), (3, 4)])
def test_transposable_masks_are_the_best_of_all_valid_ones(n, m):
    from itertools import product

    score = torch.randn(m, m, generator=torch.Generator().manual_seed(m + n)).abs()
    mask = TransposableNM(n, m).select(score)
    valid = (
        torch.tensor(bits, dtype=torch.bool).view(m, m) for bits in product([0, 1], repeat=m * m)
    )
    best = max(
        float(score[t].sum()) for t in valid if (t.sum(0) == n).all() and (t.sum(1) == n).all()
    )
    assert float(score[mask].sum()) == pytest.approx(best)


@QUICK
@given(
    st.integers(5, 9).flatmap(lambda m: st.tuples(st.integers(1, m), st.just(m))),
    st.integers(0, 99),
)
def test_larger_transposable_masks_are_valid_along_both_axes(pair, seed):
    n, m = pair
    mask = TransposableNM(n, m).select(scores_of((2 * m, 3 * m), seed))
    assert NM(n, m, 0).is_satisfied(mask, exact=True)
    assert NM(n, m, 1).is_satisfied(mask, exact=True)


def test_transposable_convolutions_hold_at_every_kernel_position():
    mask = TransposableNM(2, 4).select(torch.randn(8, 4, 3, 3).abs())
    assert TransposableNM(2, 4).is_satisfied(mask, exact=True)


@QUICK
@given(st.integers(1, 4), st.integers(1, 23), kernels, st.integers(0, 99))
def test_pairs_are_kept_whole_by_their_sum(n, inputs, kernel, seed):
    pattern = NMPairs(n, 4, pad=True)
    mask = build_masks({"w": scores_of((3, inputs, *kernel), seed)}, None, pattern)["w"]
    assert pattern.is_satisfied(mask, exact=True)


def test_pairs_score_by_their_sum():
    mask = NMPairs(1, 2).select(torch.tensor([[3.0, 0.0, 2.0, 2.0]]))
    assert mask.tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("group", [1, 4])
def test_each_kernel_takes_the_pattern_that_keeps_most(group):
    pattern = KernelPattern(group=group)
    score = torch.randn(6, 2, 3, 3).abs()
    mask = build_masks({"w": score}, None, pattern)["w"]
    assert pattern.is_satisfied(mask, exact=True)
    assert float(mask.float().mean()) == pytest.approx(4 / 9)
    if group == 1:
        energy = pattern.groups(score).square() @ pattern.dictionary().float().t()
        kept = pattern.groups(score.square() * mask).sum(dim=1)
        assert torch.allclose(kept, energy.max(dim=1).values)
    else:
        assert (mask[:4] == mask[:1]).all()
        assert (mask[4:] == mask[4:5]).all()


@pytest.mark.parametrize(
    "text",
    [
        "unstructured",
        "filter",
        "channel",
        "2:4",
        "1:8:axis0",
        "2:4:pad",
        "2:4:axis0:pad",
        "2:4:transposable",
        "2:4:pairs",
        "block:4x1",
        "block:2x8:flatten",
        "kernel-group:4",
        "kernel-pattern",
        "kernel-pattern:4",
    ],
)
def test_pattern_strings_round_trip(text):
    pattern = parse_pattern(text)
    assert pattern.spec == text
    assert parse_pattern(pattern.spec) == pattern
    assert parse_pattern(pattern) is pattern


def test_4x1_is_four_outputs_by_one_input():
    pattern = parse_pattern("4x1")
    assert pattern == Block(4, 1)
    mask = build_masks({"w": torch.randn(8, 6, 1, 1).abs()}, 0.5, pattern)["w"].flatten(1)
    assert (mask[:4] == mask[0]).all()
    assert (mask[4:] == mask[4]).all()


@pytest.mark.parametrize("text", ["unstructred", "4:", "x", "2:4:pairs:axis0", "block"])
def test_unknown_patterns_say_what_there_is(text):
    with pytest.raises(ValueError, match="pattern"):
        parse_pattern(text)


@pytest.mark.parametrize(
    "make",
    [
        lambda: NM(0, 4),
        lambda: NM(5, 4),
        lambda: NM(1, 2, axis=2),
        lambda: Block(0, 1),
        lambda: KernelGroup(0),
        lambda: KernelPattern(((0, 9),)),
        lambda: parse_pattern("3:2"),
    ],
)
def test_impossible_patterns_are_refused(make):
    with pytest.raises(ValueError, match=r"."):
        make()


@pytest.mark.parametrize(
    ("pattern", "shape"),
    [
        (NM(2, 4), (8, 6)),
        (NM(2, 4, axis=0), (6, 8)),
        (NM(2, 4), (8,)),
        (NMPairs(2, 4), (4, 12)),
        (TransposableNM(2, 4), (8, 6)),
        (Block(4, 1), (8, 8, 3, 3)),
        (Block(4, 1), (8,)),
        (KernelGroup(9), (8, 8, 3, 3)),
        (KernelPattern(), (8, 8, 5, 5)),
        (Filter(), (8,)),
    ],
)
def test_patterns_that_do_not_fit_name_the_tensor(pattern, shape):
    with pytest.raises(ValueError, match=r"stem\.weight"):
        build_masks({"stem.weight": torch.rand(shape)}, pattern.fixed_density or 0.5, pattern)
