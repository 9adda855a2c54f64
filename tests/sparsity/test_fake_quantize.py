"""Fake quantisation: exact levels, straight gradients, ranges that move in training only."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from aerogel.kernels import quantize_rows
from aerogel.models.vit import DotProductAttention
from aerogel.sparsity import select_parameters
from aerogel.sparsity.fake_quantize import (
    ActivationQuantiser,
    FakeQuantize,
    QuantisedAttention,
    attach_weight_quantiser,
    calibrate_activations,
    enable_quantisers,
    quantise_input,
    remove_activation_quantisers,
)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.integers(1, 6), st.integers(1, 9), st.integers(0, 99))
def test_weights_become_the_levels_that_are_packed_and_zeros_stay(bits, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.rand(rows, columns, generator=generator) < 0.5
    weight.requires_grad_(True)
    rounded = FakeQuantize(bits)(weight)
    levels, scales = quantize_rows(weight.detach(), bits)
    assert torch.equal(rounded, levels * scales[:, None])
    assert bool((rounded == 0)[weight == 0].all())
    gradient = torch.randn_like(weight)
    rounded.backward(gradient)
    assert torch.equal(weight.grad, gradient)


def test_activations_are_rounded_and_the_gradient_stops_where_they_are_clipped():
    quantiser = ActivationQuantiser(4, momentum=0.0)
    quantiser(torch.tensor([-1.0, 7.0]))  # a scale of 1
    quantiser.eval()
    x = torch.tensor([0.0, 0.4, 1.6, -3.4, 7.0, 7.2, -9.0], requires_grad=True)
    y = quantiser(x)
    assert torch.equal(y, torch.tensor([0.0, 0.0, 2.0, -3.0, 7.0, 7.0, -7.0]))
    y.sum().backward()
    assert x.grad.tolist() == [1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]


def test_ranges_are_moving_averages_and_stand_still_in_evaluation():
    quantiser = ActivationQuantiser(8)
    for largest in (2.0, 4.0, 1.0):
        quantiser(torch.tensor([-largest, 0.5]))
    assert float(quantiser.largest) == pytest.approx(0.9 * (0.9 * 2.0 + 0.1 * 4.0) + 0.1 * 1.0)
    before = quantiser.largest.clone()
    quantiser.eval()(torch.tensor([100.0]))
    assert torch.equal(quantiser.largest, before)
    again = ActivationQuantiser(8).eval()
    again.load_state_dict(quantiser.state_dict())
    x = torch.randn(20)
    assert torch.equal(again(x), quantiser(x))
    with pytest.raises(RuntimeError, match="no range yet"):
        ActivationQuantiser(8).eval()(x)


def test_a_percentile_leaves_outliers_out_of_the_range():
    x = torch.cat([torch.linspace(-1, 1, 9_999), torch.tensor([50.0])])
    quantiser = ActivationQuantiser(8, percentile=99.9)
    quantiser(x)
    assert float(quantiser.largest) == pytest.approx(1.0, abs=0.01)
    assert float(quantiser(torch.zeros(4)).abs().max()) == 0.0
    zeros = ActivationQuantiser(8)
    assert torch.equal(zeros(torch.zeros(3)), torch.zeros(3))
    assert zeros(torch.zeros(0, 3)).shape == (0, 3)


def test_eight_bit_attention_is_close_to_the_exact_one_and_disabled_it_is_that():
    q, k, v = (torch.randn(2, 3, 7, 8) for _ in range(3))
    core = DotProductAttention(8**-0.5)
    rounded = QuantisedAttention(core)
    torch.testing.assert_close(rounded(q, k, v), core(q, k, v), rtol=0, atol=0.1)
    assert not torch.equal(rounded(q, k, v), core(q, k, v))
    enable_quantisers(rounded, False)
    assert torch.equal(rounded(q, k, v), core(q, k, v))


def test_quantisers_come_off_without_a_trace():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    plain = copy.deepcopy(model)
    for index in (0, 2):
        quantise_input(model[index], 4)
    with pytest.raises(ValueError, match="quantised already"):
        quantise_input(model[0], 4)
    x = torch.randn(5, 8)
    calibrate_activations(model, [x])
    twin = copy.deepcopy(model).eval()
    assert torch.equal(twin(x), model.eval()(x))
    assert not torch.equal(model(x), plain(x))
    remove_activation_quantisers(model)
    assert torch.equal(model(x), plain(x))
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert not torch.equal(twin(x), plain(x))  # the copy keeps its own


def test_calibration_neither_trains_nor_leaves_training_mode():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    quantise_input(model[0], 8)
    before = model[1].running_mean.clone()
    calibrate_activations(model, [(torch.randn(6, 4), torch.zeros(6))])
    assert model.training
    assert model[0].training
    assert torch.equal(model[1].running_mean, before)
    assert not math.isnan(float(model[0].input_quantiser.largest))
    with pytest.raises(ValueError, match="batches is empty"):
        calibrate_activations(model, [])


def test_a_quantised_weight_trains_and_ties_stay_tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    (ref,) = select_parameters(model).values()
    attach_weight_quantiser(ref, 4)
    assert torch.equal(model[0].weight, model[1].weight)
    model(torch.randn(3, 4)).sum().backward()
    assert ref.parameter.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: FakeQuantize(1), "bits=1"),
        (lambda: FakeQuantize(9), "bits=9"),
        (lambda: ActivationQuantiser(8, percentile=0.0), "percentile"),
        (lambda: ActivationQuantiser(8, momentum=1.0), "momentum"),
        (lambda: FakeQuantize(8)(torch.full((2, 2), math.nan)), "infinite values or NaN"),
    ],
)
def test_bad_arguments_are_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()
