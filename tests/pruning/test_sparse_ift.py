"""Sparse iso-FLOP transformations, promise by promise."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from aerogel.nn import (
    SparseDopedConv2d,
    SparseDopedLinear,
    SparseFactorizedConv2d,
    SparseFactorizedLinear,
    SparseParallelConv2d,
    SparseParallelLinear,
)
from aerogel.nn.sparse_ift import doped_rank, factorized_rank, folded, parallel_branches
from aerogel.pruning import (
    SET,
    RigL,
    SparseWide,
    joint_decay_groups,
    joint_weight_decay,
    sparse_ift,
)
from aerogel.sparsity import inference_flops

CONVS = (SparseParallelConv2d, SparseFactorizedConv2d, SparseDopedConv2d)
LINEARS = (SparseParallelLinear, SparseFactorizedLinear, SparseDopedLinear)
KINDS = ("parallel", "factorized", "doped")
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    def __init__(self, inputs, width):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = nn.Conv2d(inputs, width, 1, 2, bias=False)

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.downsample(x))


def net(width_multiplier=1.0):
    torch.manual_seed(0)
    first, second = round(16 * width_multiplier), round(32 * width_multiplier)
    stem = nn.Conv2d(3, first, 3, padding=1)
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(second, 5)]
    return nn.Sequential(stem, nn.ReLU(), Block(first, second), *tail)


def transformed(kind, sparsity=0.75, **options):
    return sparse_ift(net if kind == "wide" else net(), kind, sparsity, example_input=X, **options)


@given(
    st.integers(8, 600), st.integers(8, 600), st.sampled_from([0.5, 0.6, 0.75, 0.9]), st.booleans()
)
@settings(deadline=None, max_examples=60)
def test_ranks_cost_what_the_dense_layer_does_but_for_one_rank(inputs, outputs, s, sparse_v):
    dense, v = inputs * outputs, 1 - s if sparse_v else 1.0
    per_rank = (1 - s) * inputs + v * outputs
    over = factorized_rank(inputs, outputs, s, sparse_v=sparse_v) * per_rank - dense
    assert -1e-6 * dense <= over < per_rank
    under = dense - ((1 - s) * dense + doped_rank(inputs, outputs, s) * (inputs + outputs))
    assert -1e-6 * dense <= under < inputs + outputs
    if sparse_v and dense > 100 * per_rank:
        assert over <= 0.01 * dense


@pytest.mark.parametrize(("sparsity", "branches"), [(0.0, 1), (0.5, 2), (0.75, 4), (0.9, 10)])
def test_branches_of_the_paper(sparsity, branches):
    assert parallel_branches(sparsity) == branches
    assert SparseWide.multiplier(sparsity) ** 2 == pytest.approx(branches)


@pytest.mark.parametrize("layer", CONVS)
def test_convolutions_give_the_shape_of_the_dense_one(layer):
    x = torch.randn(2, 6, 9, 9)
    dense = nn.Conv2d(6, 10, 3, 2, 1)
    assert layer(6, 10, 3, 2, 1, sparsity=0.75)(x).shape == dense(x).shape


@pytest.mark.parametrize("layer", LINEARS)
def test_linear_layers_take_leading_dimensions(layer):
    assert layer(12, 20, sparsity=0.75)(torch.randn(2, 5, 12)).shape == (2, 5, 20)


def test_parallel_is_the_sum_of_its_normalised_branches_without_activation():
    layer = SparseParallelConv2d(3, 7, 3, sparsity=0.75)
    out = layer(X)
    expected = sum(F.batch_norm(b[0](X), None, None, training=True) for b in layer.branches)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert float(out.detach().min()) < 0.0


def test_linear_factors_fold_into_one_convolution():
    layer = SparseFactorizedConv2d(3, 7, 3, 2, 1, bias=False, sparsity=0.5, uv="linear")
    u, v = layer.factors()
    expected = F.conv2d(X, folded(u, v), stride=2, padding=1)
    torch.testing.assert_close(layer(X), expected, rtol=1e-4, atol=1e-4)
    assert SparseFactorizedConv2d(3, 7, 3, sparsity=0.5).factors() is None


def test_doped_is_the_sparse_part_and_the_folded_low_rank_part():
    layer = SparseDopedConv2d(3, 16, 3, sparsity=0.75)
    weight = layer.base.weight + folded(*layer.factors())
    torch.testing.assert_close(layer(X), F.conv2d(X, weight, layer.base.bias), rtol=1e-4, atol=1e-4)
    assert layer.masked_weights() == ("base.weight",)


@pytest.mark.parametrize("kind", [*KINDS, "wide"])
@pytest.mark.parametrize("allocation", ["uniform", "erk"])
def test_networks_cost_what_the_dense_one_does(kind, allocation):
    model, report = transformed(kind, allocation=allocation)
    dense = inference_flops(net(), None, X).dense / len(X)
    assert report.flops_dense == dense
    assert report.flops_sparse == inference_flops(model, report.masks, X).sparse / len(X)
    assert report.flops_sparse == pytest.approx(dense, rel=1e-3)
    assert report.flops_executed > dense
    zeros = sum(int((~mask).sum()) for mask in report.masks.values())
    assert report.params == sum(p.numel() for p in model.parameters()) - zeros


@pytest.mark.parametrize("kind", ["parallel", "doped", "wide"])
def test_sparsity_zero_is_the_identity(kind):
    model, report = transformed(kind, 0.0)
    torch.testing.assert_close(model(X), net()(X), rtol=0, atol=0)
    assert report.mask_sparsity == 0.0
    assert report.masks.density() == 1.0


def test_norms_move_into_the_branches_and_the_given_model_stays():
    dense = net()
    model, report = sparse_ift(dense, "parallel", 0.75, example_input=X)
    block = model[2]
    assert isinstance(block.bn1, nn.Identity)
    norms = [branch[1] for branch in block.conv1.branches]
    assert all(isinstance(norm, nn.BatchNorm2d) for norm in norms)
    assert len(set(map(id, norms))) == 4
    assert report.widths == {"2.conv1": 4, "2.conv2": 4}
    assert isinstance(dense[2].bn1, nn.BatchNorm2d)


@pytest.mark.parametrize("kind", KINDS)
def test_stem_and_head_stay_dense_and_shortcuts_plain_but_masked(kind):
    model, report = transformed(kind)
    assert type(model[0]) is nn.Conv2d
    assert type(model[2].downsample) is nn.Conv2d
    assert "2.downsample.weight" in report.masks
    assert not {"0.weight", "5.weight"} & set(report.masks)


def test_low_rank_part_is_masked_only_when_asked():
    assert not any(".u." in name for name in transformed("doped")[1].masks)
    _, report = transformed("doped", mask_low_rank=True)
    assert "2.conv1.u.weight" in report.masks


@pytest.mark.parametrize("trainer", [RigL, SET])
@pytest.mark.parametrize("kind", [*KINDS, "wide"])
def test_kept_counts_stay_while_masks_move(kind, trainer):
    model, report = transformed(kind)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    stepper = trainer(
        model,
        optimizer,
        report.mask_sparsity,
        masks=report.masks,
        include=tuple(report.masks),
        total_steps=8,
        update_every=2,
    )
    for _ in range(8):
        optimizer.zero_grad()
        F.cross_entropy(model(X), torch.arange(4)).backward()
        stepper.step()
    before = {name: int(mask.sum()) for name, mask in report.masks.items()}
    assert {name: int(mask.sum()) for name, mask in stepper.masks.items()} == before
    assert stepper.itop() > report.masks.density()


def test_joint_decay_is_that_of_the_folded_weight_and_no_other_decay_reaches_the_factors():
    model = nn.Sequential(SparseDopedLinear(8, 8, sparsity=0.75), nn.Linear(8, 2))
    u, v = model[0].factors()
    expected = 0.5 * 0.1 * (v @ u).square().sum()
    torch.testing.assert_close(joint_weight_decay(model, 0.1), expected)
    decayed, free = joint_decay_groups(model, 0.1)
    assert {id(p) for p in free["params"]} == {id(u), id(v)}
    assert free["weight_decay"] == 0.0
    assert len(decayed["params"]) == 4
    assert float(joint_weight_decay(nn.Linear(2, 2), 0.1)) == 0.0


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, math.nan])
@pytest.mark.parametrize("kind", [*KINDS, "wide"])
def test_sparsity_out_of_range_is_refused(kind, sparsity):
    with pytest.raises(ValueError, match="sparsity must be in"):
        transformed(kind, sparsity)


def test_a_broken_number_of_branches_is_refused_with_the_nearest_sparsity():
    with pytest.raises(ValueError, match=r"3 of them need sparsity=0\.666667"):
        transformed("parallel", 0.7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "thin"}, "kind must be one of"),
        ({"kind": "factorized", "uv": "tanh"}, "uv must be one of"),
        ({"kind": "doped", "allocation": "flat"}, "allocation must be one of"),
        ({"kind": "doped", "init": "zeros"}, "init must be one of"),
        ({"kind": "doped", "skip": ("nowhere",)}, "unknown layer"),
        ({"kind": "doped", "skip": ("*",)}, "leaves no layer"),
    ],
)
def test_unknown_names_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        transformed(**options)


def test_networks_that_cannot_be_transformed_are_refused():
    with pytest.raises(ValueError, match="needs a function"):
        sparse_ift(net(), "wide", 0.5, example_input=X)
    with pytest.raises(ValueError, match="width_multiplier"):
        SparseWide.from_factory(lambda: net(), 0.5, example_input=X)
    grouped = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, groups=6))
    with pytest.raises(ValueError, match="groups must be 1, got 6"):
        sparse_ift(grouped, "doped", 0.5, example_input=X)
    shared = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    shared[1].weight = shared[0].weight
    with pytest.raises(ValueError, match="shared"):
        sparse_ift(shared, "doped", 0.5, example_input=torch.randn(2, 4), skip=())


@pytest.mark.parametrize("layer", CONVS)
def test_grouped_layers_are_refused(layer):
    with pytest.raises(ValueError, match="groups must be 1, got 2"):
        layer(4, 4, 3, groups=2, sparsity=0.5)


def test_factors_beyond_the_memory_limit_are_refused():
    with pytest.raises(ValueError, match="memory_limit"):
        SparseFactorizedLinear(64, 64, sparsity=0.99, memory_limit=1000)


def test_flops_that_cannot_be_met_are_refused():
    def swollen(width_multiplier):
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 400 if width_multiplier > 1 else 4))

    with pytest.raises(ValueError, match="no mask sparsity"):
        SparseWide.from_factory(swollen, 0.5, example_input=torch.randn(2, 4), skip=("1",))


def test_negative_decay_is_refused():
    with pytest.raises(ValueError, match="weight_decay must be in"):
        joint_weight_decay(net(), -1.0)


def test_a_second_mask_controller_is_refused():
    model, report = transformed("wide")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    options = {"masks": report.masks, "include": tuple(report.masks), "total_steps": 1000}
    first = RigL(model, optimizer, 0.75, **options)
    with pytest.raises(ValueError, match="already under another mask controller"):
        SET(model, optimizer, 0.75, **options)
    assert first.masks.density() == report.masks.density()
