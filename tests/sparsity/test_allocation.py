"""One density shared out over layers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from aerogel.sparsity import NM, allocate, compute_scores, select_parameters

QUICK = settings(max_examples=80, deadline=None)


class Layers(nn.Module):
    def __init__(self, shapes):
        super().__init__()
        layers = []
        for shape in shapes:
            layer = nn.Linear(1, 1) if len(shape) == 2 else nn.Conv2d(1, 1, 1)
            layer.weight = nn.Parameter(torch.empty(shape))
            layers.append(layer)
        self.layers = nn.ModuleList(layers)


side = st.integers(1, 300)
shapes = st.lists(
    st.one_of(st.tuples(side, side), st.tuples(side, side, st.integers(1, 5), st.integers(1, 5))),
    min_size=1,
    max_size=8,
)


def spent(selection, densities):
    return sum(densities[name] * ref.parameter.numel() for name, ref in selection.items())


@QUICK
@given(shapes, st.floats(0.001, 0.999), st.sampled_from(["uniform", "er", "erk"]))
def test_budget_is_met_for_any_shapes(sizes, density, kind):
    selection = select_parameters(Layers(sizes))
    densities = allocate(selection, density, kind)
    assert abs(spent(selection, densities) - density * selection.numel) <= len(selection)
    assert all(0 < value <= 1 for value in densities.values())


@QUICK
@given(shapes, st.floats(0.001, 0.999))
def test_erk_is_proportional_except_where_it_is_dense(sizes, density):
    selection = select_parameters(Layers(sizes))
    densities = allocate(selection, density, "erk")
    ratios = [
        densities[name] * torch.Size(ref.shape).numel() / sum(ref.shape)
        for name, ref in selection.items()
        if densities[name] < 1
    ]
    assert not ratios or max(ratios) == pytest.approx(min(ratios))


@QUICK
@given(shapes, st.floats(0.05, 0.9), st.floats(0.05, 1.0))
def test_plus_kinds_fix_the_last_layer_and_meet_the_budget(sizes, density, last):
    selection = select_parameters(Layers([*sizes, (4, 4)]))
    if density * selection.numel <= last * 16:
        with pytest.raises(ValueError, match="too small"):
            allocate(selection, density, "erk_plus", last_density=last)
        return
    densities = allocate(selection, density, "erk_plus", last_density=last)
    assert list(densities.values())[-1] == last
    total = spent(selection, densities)
    full = density * selection.numel > selection.numel - 16 + last * 16
    assert full or abs(total - density * selection.numel) <= len(selection)


def test_uniform_plus_matches_hand_computation():
    selection = select_parameters(Layers([(10, 10), (100, 10), (10, 20)]))
    densities = list(allocate(selection, 0.15, "uniform_plus").values())
    rest = (0.15 * 1300 - 100 - 0.2 * 200) / 1000
    assert densities == pytest.approx([1.0, rest, 0.2])


def test_uniform_plus_refuses_a_budget_its_ends_exceed():
    selection = select_parameters(Layers([(100, 10), (10, 10), (100, 10)]))
    with pytest.raises(ValueError, match="too small"):
        allocate(selection, 0.1, "uniform_plus")
    with pytest.raises(ValueError, match="at least 3"):
        allocate(select_parameters(Layers([(2, 2)])), 0.5, "uniform_plus")


def test_ratios_of_a_global_selection():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    nn.init.constant_(model[0].weight, 2.0)
    nn.init.constant_(model[1].weight, 1.0)
    selection = select_parameters(model)
    scores = compute_scores(selection)
    densities = allocate(selection, 0.5, "from_scores", scores=scores)
    # The second layer lost everything and keeps one weight.
    assert densities == {"0.weight": 1.0, "1.weight": 0.01}
    assert allocate(selection, 0.75, "global", scores=scores)["1.weight"] == 0.5


def test_nm_and_fixed_allocations():
    selection = select_parameters(Layers([(8, 8), (8, 8)]))
    assert set(allocate(selection, 0.5, "nm", pattern=NM(1, 4)).values()) == {0.25}
    given_ = {"layers.0.weight": 0.5, "layers.1.weight": 0.1}
    assert allocate(selection, 0.5, "fixed", densities=given_) == given_


@pytest.mark.parametrize(
    "arguments",
    [
        {"density": 0.0},
        {"density": 1.5},
        {"density": 0.5, "kind": "ekr"},
        {"density": 0.5, "kind": "fixed"},
        {"density": 0.5, "kind": "fixed", "densities": {"layers.0.weight": 0.0}},
        {"density": 0.5, "kind": "fixed", "densities": {"layer.0.weight": 0.5}},
        {"density": 0.5, "kind": "fixed", "densities": {}},
        {"density": 0.5, "kind": "nm"},
        {"density": 0.5, "kind": "global"},
        {"density": 0.5, "kind": "erk_plus", "last_density": 0.0},
        {"density": 0.5, "kind": "erk_plus"},
    ],
)
def test_bad_allocations_are_refused(arguments):
    with pytest.raises(ValueError, match=r"."):
        allocate(select_parameters(Layers([(4, 4)])), **arguments)
