import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from aerogel.sparsity.average import (
    average_models,
    greedy_soup,
    recalibrate_batchnorm,
    soup_distance,
)


def masked_states(count: int, seed: int = 0) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(6, 8, generator=generator) < 0.4
    states = [
        {
            "w": torch.randn(6, 8, generator=generator) * mask,
            "b": torch.randn(6, generator=generator),
            "n": torch.tensor(7 + i),
        }
        for i in range(count)
    ]
    return states, mask


@settings(max_examples=25, deadline=None)
@given(count=st.integers(2, 5), seed=st.integers(0, 1000))
def test_soup_has_the_mask_of_its_ingredients_and_ignores_their_order(count, seed):
    states, mask = masked_states(count, seed)
    soup = average_models(states)
    assert torch.equal(soup["w"] != 0, mask)
    assert torch.allclose(soup["w"], sum(s["w"] for s in states) / count, atol=1e-6)
    again = average_models(states[::-1])
    assert torch.allclose(soup["w"], again["w"], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_identical_ingredients_give_a_bitwise_equal_soup(dtype):
    state = {"w": torch.randn(5, 5).to(dtype), "causal": torch.full((3, 3), -math.inf, dtype=dtype)}
    soup = average_models([state] * 7)
    assert all(torch.equal(soup[k], state[k]) and soup[k].dtype == dtype for k in state)


def test_weights_are_normalised_and_integers_copied_from_the_first():
    states, _ = masked_states(3)
    soup = average_models(iter(states), [2.0, 1.0, 1.0])
    expected = 0.5 * states[0]["b"] + 0.25 * states[1]["b"] + 0.25 * states[2]["b"]
    assert torch.allclose(soup["b"], expected, atol=1e-6)
    assert soup["n"].item() == 7


def test_different_masks_are_refused_naming_the_tensor():
    states, _ = masked_states(2)
    states[1]["w"][0] = 1.0
    with pytest.raises(ValueError, match=r"^w: the masks"):
        average_models(states)
    mask = states[0]["w"] != 0
    with pytest.raises(ValueError, match=r"^w: .* outside its mask"):
        average_models(states, masks={"w": mask})
    with pytest.raises(ValueError, match=r"^w: the masks"):
        average_models(states, masks=[{"w": mask}, {"w": states[1]["w"] != 0}])


def test_accidental_zeros_of_dense_weights_and_an_empty_mask_are_no_obstacle():
    a, b = {"w": torch.randn(40, 40)}, {"w": torch.randn(40, 40)}
    a["w"][3, 4] = 0.0
    average_models([a, b])
    average_models([{"w": torch.zeros(4, 4)}, {"w": torch.ones(4, 4)}], masks={})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("b"), "other keys"),
        (lambda s: s.update(b=torch.ones(7)), "^b: .*shape"),
        (lambda s: s.update(b=torch.ones(6, dtype=torch.float64)), "^b: .*float64"),
        (lambda s: s.update(q=torch.ones(2, 2, dtype=torch.int8)), "other keys"),
    ],
)
def test_ingredients_that_do_not_match_are_refused(change, message):
    states, _ = masked_states(2)
    change(states[1])
    with pytest.raises(ValueError, match=message):
        average_models(states)


def test_bad_weights_and_integer_weights_are_refused():
    states, _ = masked_states(2)
    for weights in ([1.0], [1.0, -1.0], [0.0, 0.0], [math.nan, 1.0], [1.0, 1.0, 1.0]):
        with pytest.raises(ValueError, match="weights"):
            average_models(states, weights)
    with pytest.raises(ValueError, match="empty"):
        average_models([])
    quantised = [{"q": torch.full((2, 2), i, dtype=torch.int8)} for i in (1, 2)]
    with pytest.raises(ValueError, match="dequantise"):
        average_models(quantised)


def test_greedy_soup_is_never_worse_than_its_best_candidate():
    target = torch.tensor([1.0, -1.0])

    def score(state):
        return -float((state["w"] - target).square().sum())

    points = [[3.0, -1.0], [-1.0, -1.0], [1.0, 5.0], [1.2, -1.0]]
    soup = greedy_soup([{"w": torch.tensor(p)} for p in points], score)
    assert soup.members[0] == 3
    assert soup.score >= max(soup.candidate_scores)
    assert soup.score == pytest.approx(score(soup.state))
    assert 2 not in soup.members


def test_greedy_soup_recalibrates_what_it_scores_and_returns():
    prepared = []

    def prepare(state):
        prepared.append(1)
        return {**state, "stat": torch.tensor(9.0)}

    candidates = [{"w": torch.ones(2), "stat": torch.tensor(float(i))} for i in range(2)]
    soup = greedy_soup(candidates, lambda s: float(s["stat"]), prepare=prepare)
    assert soup.state["stat"] == 9.0
    assert len(prepared) == 1
    with pytest.raises(ValueError, match="NaN"):
        greedy_soup(candidates, lambda s: math.nan)
    with pytest.raises(ValueError, match="empty"):
        greedy_soup([], lambda s: 0.0)


def test_batchnorm_recalibration_equals_a_manual_pass_and_leaves_weights_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten())
    batches = [(torch.randn(5, 3, 6, 6) + i, torch.zeros(5)) for i in range(4)]
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.train()
    used = recalibrate_batchnorm(model, batches, fraction=0.5)
    assert used == 2
    assert model.training
    assert model[1].momentum == 0.1
    outputs = [model[0](x).detach() for x, _ in batches[:2]]
    mean = torch.stack([o.mean((0, 2, 3)) for o in outputs]).mean(0)
    variance = torch.stack([o.var((0, 2, 3)) for o in outputs]).mean(0)
    assert torch.allclose(model[1].running_mean, mean, atol=1e-5)
    assert torch.allclose(model[1].running_var, variance, atol=1e-5)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_batchnorm_recalibration_refuses_what_it_cannot_do():
    model = nn.BatchNorm1d(3)
    with pytest.raises(ValueError, match="empty"):
        recalibrate_batchnorm(model, [], fraction=1.0)
    for fraction in (0.0, 1.5):
        with pytest.raises(ValueError, match="fraction"):
            recalibrate_batchnorm(model, [torch.ones(2, 3)], fraction=fraction)
    with pytest.raises(ValueError, match="length"):
        recalibrate_batchnorm(model, iter([torch.ones(2, 3)]), fraction=0.5)
    assert recalibrate_batchnorm(nn.Linear(2, 2), []) == 0


def test_soup_distance_knows_lengths_and_angles():
    a, b = {"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}
    distance = soup_distance(a, b)
    assert distance.l2 == pytest.approx(math.sqrt(2))
    assert distance.angle == pytest.approx(math.pi / 2)
    assert soup_distance(a, a).l2 == 0.0
    with pytest.raises(ValueError, match="keys"):
        soup_distance(a, {"v": torch.ones(2)})
