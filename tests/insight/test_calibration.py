"""Calibration, detection of other data and robustness, against their definitions."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from aerogel.insight import (
    expected_calibration_error,
    fgsm_accuracy,
    maximum_calibration_error,
    ood_auroc,
    worst_class_accuracy,
)


def softmax(seed, samples=200, classes=5, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(samples, classes, generator=generator)
    return logits.softmax(1), torch.randint(0, classes, (samples,), generator=generator)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 20))
def test_calibration_error_is_its_definition(seed, bins):
    probabilities, labels = softmax(seed, 60)
    confidence, predicted = probabilities.max(1)
    expected = 0.0
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if bool(inside.any()):
            accuracy = (predicted[inside] == labels[inside]).double().mean()
            gap = abs(accuracy - confidence[inside].double().mean())
            expected += float(gap) * int(inside.sum()) / 60
    found = expected_calibration_error(probabilities, labels, bins)
    assert math.isclose(found, expected, abs_tol=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 20))
def test_largest_calibration_error_is_the_worst_bins(seed, bins):
    probabilities, labels = softmax(seed, 60)
    confidence, predicted = probabilities.max(1)
    place = (confidence.double() * bins).ceil().long() - 1
    gaps = []
    for one in place.unique():
        inside = place == one
        accuracy = (predicted[inside] == labels[inside]).double().mean()
        gaps.append(abs(float(accuracy - confidence[inside].double().mean())))
    found = maximum_calibration_error(probabilities, labels, bins)
    assert math.isclose(found, max(gaps), abs_tol=1e-9)
    assert found >= expected_calibration_error(probabilities, labels, bins) - 1e-12


def test_worst_class_is_the_one_least_often_right():
    labels = torch.tensor([0, 0, 0, 2, 2, 4])  # classes 1 and 3 do not occur
    assert worst_class_accuracy(torch.tensor([0, 0, 1, 2, 2, 4]), labels) == 2 / 3
    assert worst_class_accuracy(torch.tensor([0, 0, 0, 2, 2, 3]), labels) == 0.0
    assert worst_class_accuracy(labels, labels) == 1.0


@pytest.mark.parametrize(
    ("predicted", "labels", "message"),
    [
        (torch.zeros(2).long(), torch.zeros(3).long(), r"\(2,\) and \(3,\)"),
        (torch.zeros(0).long(), torch.zeros(0).long(), "at least 1"),
        (torch.zeros(1).long(), torch.tensor([-1]), "negative"),
    ],
)
def test_what_is_no_list_of_classes_is_refused(predicted, labels, message):
    with pytest.raises(ValueError, match=message):
        worst_class_accuracy(predicted, labels)


def test_confidence_that_is_right_has_no_error_and_certainty_that_is_wrong_has_all():
    certain = F.one_hot(torch.arange(4), 4).float()
    assert expected_calibration_error(certain, torch.arange(4)) == 0.0
    assert expected_calibration_error(certain, (torch.arange(4) + 1) % 4) == 1.0
    half = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    assert expected_calibration_error(half, torch.tensor([0, 1])) == 0.0


@pytest.mark.parametrize(
    ("probabilities", "labels", "bins", "message"),
    [
        (torch.rand(3), torch.zeros(3).long(), 15, "samples, classes"),
        (torch.zeros(0, 3), torch.zeros(0).long(), 15, "samples, classes"),
        (torch.full((2, 2), 0.5), torch.zeros(3).long(), 15, "labels must be"),
        (torch.full((2, 2), 0.5), torch.tensor([0, 2]), 15, r"0\.\.1"),
        (torch.randn(2, 2), torch.tensor([0, 1]), 15, "rows of a softmax"),
        (torch.full((2, 2), torch.nan), torch.tensor([0, 1]), 15, "rows of a softmax"),
        (torch.full((2, 2), 0.5), torch.tensor([0, 1]), 0, "bins"),
    ],
)
def test_what_is_no_prediction_is_refused(probabilities, labels, bins, message):
    with pytest.raises(ValueError, match=message):
        expected_calibration_error(probabilities, labels, bins)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=20),
    st.lists(st.integers(0, 6), min_size=1, max_size=20),
)
def test_auroc_is_the_share_of_pairs_in_the_right_order(inside, outside):
    pairs = [(a > b) + 0.5 * (a == b) for a in inside for b in outside]
    found = ood_auroc(torch.tensor(inside).float(), torch.tensor(outside).float())
    assert math.isclose(found, sum(pairs) / len(pairs), abs_tol=1e-9)


@pytest.mark.parametrize("bad", [torch.zeros(0), torch.zeros(2, 2), torch.tensor([torch.nan])])
def test_scores_that_cannot_be_ranked_are_refused(bad):
    with pytest.raises(ValueError, match="outside"):
        ood_auroc(torch.ones(3), bad)


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 16), nn.BatchNorm1d(16), nn.Linear(16, 3))


def test_an_attack_of_size_0_is_the_plain_accuracy_and_larger_ones_hurt():
    model, x = classifier(), torch.randn(50, 1, 3, 3)
    labels = model.eval()(x).argmax(1)
    accuracies = [fgsm_accuracy(model, x, labels, e, batch_size=16) for e in (0.0, 0.1, 0.5, 3.0)]
    assert accuracies[0] == 1.0
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[-1] < 0.5


def test_an_attack_is_one_signed_step_within_the_bounds():
    seen = []

    class Watched(nn.Linear):
        def forward(self, x):
            seen.append(x.detach())
            return super().forward(x)

    model, x = Watched(4, 2), torch.rand(6, 4)
    fgsm_accuracy(model, x, torch.zeros(6).long(), 0.25, lower=0.0, upper=1.0)
    clean, attacked = seen
    assert torch.equal(clean, x)
    moved = attacked - clean
    inside = (attacked > 0) & (attacked < 1)
    torch.testing.assert_close(moved[inside].abs(), torch.full_like(moved[inside], 0.25))
    assert 0 <= float(attacked.min()) <= float(attacked.max()) <= 1


def test_an_attack_leaves_no_trace_in_the_model():
    model = classifier().train()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    fgsm_accuracy(model, torch.randn(8, 1, 3, 3), torch.zeros(8).long(), 0.1)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("count", "epsilon", "options", "message"),
    [
        (4, -0.1, {}, "epsilon"),
        (3, 0.1, {}, "as many"),
        (4, 0.1, {"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_attacks_are_named(count, epsilon, options, message):
    with pytest.raises(ValueError, match=message):
        fgsm_accuracy(
            classifier(), torch.randn(4, 1, 3, 3), torch.zeros(count).long(), epsilon, **options
        )
