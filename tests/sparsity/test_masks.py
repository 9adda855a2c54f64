"""Masks from scores, and the set of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from aerogel.sparsity import (
    NM,
    Block,
    Filter,
    MaskSet,
    build_masks,
    kept_count,
    random_masks,
    select_parameters,
)

QUICK = settings(max_examples=50, deadline=None)
shapes = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=4)
roundings = st.sampled_from(["round", "floor", "ceil", "round_kept"])


def scores_of(sizes, seed, levels=4):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"layer{i}": torch.randint(0, levels, size, generator=generator).float()
        for i, size in enumerate(sizes)
    }


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 10))


@QUICK
@given(shapes, st.floats(0.01, 1), roundings, st.integers(1, 4), st.integers(0, 99))
def test_every_layer_keeps_the_exact_count(sizes, density, rounding, levels, seed):
    scores = scores_of(sizes, seed, levels)  # levels=1: all zero
    masks = build_masks(scores, density, rounding=rounding)
    for name, score in scores.items():
        assert int(masks[name].sum()) == kept_count(score.numel(), density, rounding=rounding)
        if masks[name].any() and not masks[name].all():
            assert score[masks[name]].min() >= score[~masks[name]].max()


@QUICK
@given(shapes, st.floats(0.01, 1), st.integers(1, 4), st.integers(0, 99))
def test_global_scope_is_one_stable_top_k(sizes, density, levels, seed):
    scores = scores_of(sizes, seed, levels)
    masks = build_masks(scores, density, scope="global")
    flat = torch.cat([score.flatten() for score in scores.values()])
    keep = kept_count(flat.numel(), density)
    order = flat.sort(descending=True, stable=True).indices[:keep]
    expected = torch.zeros(flat.shape, dtype=torch.bool)
    expected[order] = True
    assert torch.equal(torch.cat([mask.flatten() for mask in masks.values()]), expected)


@QUICK
@given(shapes, st.floats(0.01, 1), st.integers(0, 99), st.sampled_from(["layer", "global", "row"]))
def test_within_never_revives(sizes, density, seed, scope):
    scores = scores_of(sizes, seed)
    scope = "layer" if scope == "row" and any(size[1] == 1 for size in sizes) else scope
    before = build_masks(scores_of(sizes, seed + 1), 0.5)
    after = build_masks(scores, density, scope=scope, within=before)
    for name in scores:
        assert not bool((after[name] & ~before[name]).any())
    if scope == "layer":
        for name, score in scores.items():
            expected = min(kept_count(score.numel(), density), int(before[name].sum()))
            assert int(after[name].sum()) == expected


@pytest.mark.parametrize("pattern", [NM(2, 4), Block(2, 2), Filter()])
def test_within_holds_for_structured_patterns(pattern):
    score = {"w": torch.rand(8, 8)}
    before = MaskSet({"w": torch.rand(8, 8) < 0.5})
    density = None if pattern.fixed_density else 0.75
    after = build_masks(score, density, pattern, within=before)
    assert not bool((after["w"] & ~before["w"]).any())


def test_row_scope_keeps_the_same_count_in_every_row():
    mask = build_masks({"w": torch.rand(7, 10)}, 0.4, scope="row", rounding="floor")["w"]
    assert (mask.sum(dim=1) == 4).all()
    blocks = build_masks({"w": torch.rand(8, 10)}, 0.5, Block(4, 1), "row")["w"]
    assert (blocks.sum(dim=1) == 5).all()


def test_exact_counts_can_be_given():
    masks = build_masks(scores_of([(4, 4), (3, 3)], 0), keep={"layer0": 5, "layer1": 0})
    assert [int(mask.sum()) for mask in masks.values()] == [5, 0]


def test_global_budget_counts_weights_when_units_differ_in_size():
    scores = {"small": torch.ones(10, 2), "large": torch.full((10, 8), 0.5)}
    masks = build_masks(scores, 0.5, Filter(), "global", pool="avg")
    assert masks["small"].all()
    assert masks.nnz == 20 + 24
    assert masks.nnz <= 50


@QUICK
@given(shapes, st.floats(0.01, 1), st.integers(0, 99))
def test_random_masks_have_exact_counts_and_follow_their_generator(sizes, density, seed):
    model = nn.ModuleList([nn.Linear(cols, rows) for rows, cols in sizes])
    selection = select_parameters(model)
    draws = [
        random_masks(selection, density, generator=torch.Generator().manual_seed(seed))
        for _ in range(2)
    ]
    assert draws[0] == draws[1]
    for name, mask in draws[0].items():
        assert int(mask.sum()) == kept_count(selection[name].parameter.numel(), density)


def test_bernoulli_masks_are_near_their_density():
    selection = select_parameters(nn.Linear(300, 300))
    masks = random_masks(selection, 0.3, exact=False, generator=torch.Generator().manual_seed(0))
    assert masks.density() == pytest.approx(0.3, abs=0.01)
    assert masks.nnz != 27_000


@QUICK
@given(st.lists(st.integers(0, 7), min_size=1, max_size=4), st.integers(0, 99))
def test_mask_survives_save_and_load(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    masks = MaskSet({"a.weight": torch.rand(shape, generator=generator) < 0.5})
    state = masks.state_dict()
    assert state["a.weight.bits"].dtype == torch.uint8
    assert state["a.weight.bits"].numel() == -(-masks["a.weight"].numel() // 8)
    assert MaskSet.from_state_dict(state) == masks


def test_damaged_mask_state_is_refused():
    state = MaskSet({"w": torch.ones(4, 4, dtype=torch.bool)}).state_dict()
    cases = [
        {**state, "w.bits": state["w.bits"][:1]},
        {**state, "w.shape": torch.tensor([4, 5])},
        {**state, "w.shape": torch.tensor([-4, -4])},
        {"w.bits": state["w.bits"]},
        {**state, "extra": torch.zeros(1)},
    ]
    for case in cases:
        with pytest.raises(ValueError, match="mask"):
            MaskSet.from_state_dict(case)


def test_masks_of_other_shapes_or_names_are_not_loaded():
    masks = MaskSet({"w": torch.ones(4, 4, dtype=torch.bool)})
    with pytest.raises(ValueError, match="'w'"):
        masks.load_state_dict(MaskSet({"w": torch.ones(2, 8, dtype=torch.bool)}).state_dict())
    with pytest.raises(ValueError, match="different weights"):
        masks.load_state_dict(MaskSet({"v": torch.ones(4, 4, dtype=torch.bool)}).state_dict())


def test_masks_combine_and_compare():
    a = MaskSet({"w": torch.tensor([[True, True, False]])})
    b = MaskSet({"w": torch.tensor([[True, False, False]])})
    assert (a & b) == b
    assert (a | b) == a
    assert a.hamming(b) == 1
    assert a.nnz == 2
    assert a.density() == pytest.approx(2 / 3)
    assert a.sparsity() == pytest.approx(1 / 3)
    assert a.layer_density() == {"w": pytest.approx(2 / 3)}


def test_applied_masks_can_be_read_back_from_the_weights():
    model = net()
    masks = random_masks(select_parameters(model), 0.5)
    masks.apply_(model)
    assert MaskSet.from_weights(model) == masks
    assert (model[0].weight[~masks["0.weight"]] == 0).all()


def test_masks_that_do_not_fit_the_model_are_refused():
    model = net()
    with pytest.raises(ValueError, match=r"2\.weigth.*nearest.*2\.weight"):
        MaskSet({"2.weigth": torch.ones(10, 32, dtype=torch.bool)}).apply_(model)
    with pytest.raises(ValueError, match=r"2\.weight.*shape"):
        MaskSet({"2.weight": torch.ones(32, 10, dtype=torch.bool)}).apply_(model)
    with pytest.raises(ValueError, match="bool"):
        MaskSet({"2.weight": torch.ones(10, 32)})


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1])
def test_density_out_of_range_names_the_tensor(density):
    with pytest.raises(ValueError, match="'w'"):
        build_masks({"w": torch.rand(4, 4)}, density)
    with pytest.raises(ValueError, match="weight"):
        random_masks(select_parameters(nn.Linear(4, 4)), density)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_nan_scores_name_the_tensor(scope):
    with pytest.raises(ValueError, match=r"fc\.weight.*nan"):
        build_masks({"fc.weight": torch.tensor([[1.0, torch.nan]])}, 0.5, scope=scope)


@pytest.mark.parametrize(
    "arguments",
    [
        {"densities": 0.5, "scope": "network"},
        {"densities": 0.5, "keep": {"w": 2}},
        {},
        {"densities": {"v": 0.5}},
        {"densities": {"w": 0.5, "v": 0.5}},
        {"densities": 0.3, "pattern": NM(2, 4)},
        {"pattern": NM(2, 4), "scope": "global"},
        {"keep": {"w": 17}},
        {"keep": {"w": 3}, "scope": "global"},
        {"densities": 0.5, "scope": "group"},
        {"densities": 0.5, "pattern": Filter(), "scope": "row"},
        {"densities": 0.5, "within": {}},
        {"densities": 0.5, "within": {"w": torch.ones(2, 8, dtype=torch.bool)}},
    ],
)
def test_contradictions_are_refused(arguments):
    with pytest.raises(ValueError, match=r"."):
        build_masks({"w": torch.rand(4, 4)}, **arguments)
