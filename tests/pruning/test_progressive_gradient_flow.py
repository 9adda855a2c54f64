"""Progressive gradient flow and the N:M baselines beside it, promise by promise."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from aerogel import runtime
from aerogel.nested import load_state, save_state
from aerogel.pruning import (
    SRSTE,
    STE,
    ProgressiveGradientFlow,
    gradient_noise,
    track_gradient_noise,
)
from aerogel.pruning.nm_training import NMTrainer
from aerogel.sparsity import NM, inference_flops
from aerogel.sparsity.parametrizations import soft

ALL = {"include": ("0", "2")}
TIMES = {"total_steps": 40, "dense_fraction": 0.1, "fine_tune_fraction": 0.25}  # 4, 26, 10 steps


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def adamw(model):
    return torch.optim.AdamW(model.parameters(), 0.01)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 16, generator=generator), torch.randint(0, 8, (8,), generator=generator)


def train(model, stepper, optimizer, steps, first=0):
    for step in range(first, first + steps):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        stepper.step()


def leaf(model, index=0):
    return model[index].parametrizations.weight.original


def made(model, optimizer=None, n=1, m=4, **options):
    options = {**TIMES, **ALL, **options}
    return ProgressiveGradientFlow(model, optimizer or adamw(model), n, m, **options)


def test_the_forward_weight_is_that_of_the_formula_at_every_step():
    model = net()
    optimizer = adamw(model)
    trainer = made(model, optimizer)
    for step in range(40):
        weight = leaf(model).detach()
        beta = trainer.beta
        if step < 4:
            assert beta == 1.0
            expected = weight
        else:
            assert beta == (math.exp(-8.0 / 26 * (step - 4)) if step < 30 else 0.0)
            kept = NM(1, 4).select(weight.abs()).float()
            expected = weight * (kept + beta * (1.0 - kept))
        torch.testing.assert_close(model[0].weight.detach(), expected, rtol=1e-6, atol=0)
        train(model, trainer, optimizer, 1, step)


@pytest.mark.parametrize("decay", ["exponential", "linear"])
def test_the_part_of_pruned_weights_falls_from_one_to_almost_nothing(decay):
    model = net()
    trainer = made(model, decay=decay)
    values = []
    for step in range(40):
        values.append(trainer.beta)
        train(model, trainer, trainer.optimizer, 1, step)
    assert values[:5] == [1.0] * 5
    assert values == sorted(values, reverse=True)
    assert values[29] <= (5e-4 if decay == "exponential" else 0.0)
    assert values[30:] == [0.0] * 10


def test_both_gradients_are_what_their_names_say():
    torch.manual_seed(0)
    weight = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    mask = NM(1, 4).select(weight.detach().abs())
    beta = torch.tensor(0.3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda w: soft(w, mask, beta, "chain"), weight)
    upstream = torch.randn(4, 8, dtype=torch.float64)
    (through,) = torch.autograd.grad(soft(weight, mask, beta, "ste"), weight, upstream)
    assert torch.equal(through, upstream)


def test_the_chain_rule_restricts_gradients_until_fine_tuning_lets_them_through():
    model = net()
    trainer = made(model, grad="chain")
    train(model, trainer, trainer.optimizer, 20)
    x, y = batch(20)
    trainer.optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    kept = trainer.masks["0.weight"]
    restricted = leaf(model).grad[~kept].abs().mean()
    assert 0 < restricted < 0.05 * leaf(model).grad[kept].abs().mean()
    trainer.step()
    train(model, trainer, trainer.optimizer, 9, 21)
    assert trainer.phase == "fine-tune"
    trainer.optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    assert leaf(model).grad[~trainer.masks["0.weight"]].abs().mean() > restricted


@pytest.mark.parametrize(
    ("ladder", "rungs"),
    [
        ("stepwise", [(7, 8), (4, 8), (2, 8), (1, 8)]),
        ("geometric", [(2, 16), (1, 8)]),  # 16 inputs: rungs of 64 and 32 do not divide them
        ("densify", [(1, 16), (1, 8)]),
        ({4: (6, 8), 12: (2, 8), 20: (1, 8)}, [(6, 8), (2, 8), (1, 8)]),
    ],
)
def test_the_pattern_tightens_rung_by_rung_and_survives_resuming(ladder, rungs, tmp_path):
    model = net()
    options = {"kind": "structure", "ladder": ladder, "n": 1, "m": 8, "include": ("0",)}
    trainer = made(model, **options)
    seen = []
    for step in range(40):
        pattern = trainer.pattern
        assert (pattern is None) == (step < 4)
        if pattern is not None:
            assert pattern.is_satisfied(trainer.masks["0.weight"], exact=True)
            seen.append((pattern.n, pattern.m))
        if step == 17:  # between two rungs
            save_state(trainer.state_dict(), tmp_path / "state.safetensors")
            weights = copy.deepcopy(model.state_dict())
            other = net()
            resumed = made(other, **options)
            other.load_state_dict(weights)
            resumed.load_state_dict(load_state(tmp_path / "state.safetensors"))
            assert resumed.pattern == pattern
            assert torch.equal(resumed.masks["0.weight"], trainer.masks["0.weight"])
        train(model, trainer, trainer.optimizer, 1, step)
    assert list(dict.fromkeys(seen)) == rungs


@pytest.mark.parametrize("options", [{}, {"kind": "structure"}, {"decay": "linear"}])
def test_the_final_model_is_strictly_n_m_in_every_group_and_plain(options):
    model = net()
    trainer = made(model, **options)
    train(model, trainer, trainer.optimizer, 40)
    strict = model(batch(0)[0]).detach()
    masks = trainer.finalize()
    for index in (0, 2):
        assert not parametrize.is_parametrized(model[index])
        assert NM(1, 4).is_satisfied(model[index].weight != 0, exact=True)
        assert torch.equal(model[index].weight != 0, masks[f"{index}.weight"])
    assert torch.allclose(model(batch(0)[0]), strict)
    assert model[0].bias is not None


def test_infinite_decay_is_straight_through_training():
    ours, theirs = net(), net()
    a, b = adamw(ours), adamw(theirs)
    flow = made(ours, a, k=math.inf, dense_fraction=0.0, fine_tune_fraction=0.0)
    train(ours, flow, a, 15)
    train(theirs, STE(theirs, b, 1, 4, **ALL), b, 15)
    assert torch.equal(leaf(ours), leaf(theirs))


def test_before_anything_is_pruned_training_is_dense_bit_for_bit():
    ours, theirs = net(), net()
    a, b = adamw(ours), adamw(theirs)
    train(ours, made(ours, a, dense_fraction=0.7), a, 28)
    train(theirs, b, b, 28)
    assert torch.equal(leaf(ours), theirs[0].weight)


@pytest.mark.parametrize("decoupled", [False, True])
def test_sr_ste_pulls_pruned_weights_and_nothing_else(decoupled):
    ours, theirs = net(), net()
    a, b = (torch.optim.SGD(m.parameters(), 0.1) for m in (ours, theirs))
    pulled = SRSTE(ours, a, 2, 4, lam=0.5, decoupled=decoupled, **ALL)
    straight = STE(theirs, b, 2, 4, **ALL)
    before, kept = leaf(ours).detach().clone(), pulled.masks["0.weight"].clone()
    train(ours, pulled, a, 1)
    train(theirs, straight, b, 1)
    pull = 0.1 * 0.5 * before * ~kept
    if decoupled:  # from the weight after the step, whose mask is the new one
        new = ~pulled.masks["0.weight"]
        pull = 0.1 * 0.5 * leaf(theirs) * new
    torch.testing.assert_close(leaf(ours), leaf(theirs) - pull)


def test_feed_forward_and_attention_patterns_are_independent():
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    model = BertModel(config)
    trainer = made(model, n=1, m=8, include=(), qkv=(2, 4))
    layer = "encoder.layer.0."
    assert set(trainer.masks) == {
        layer + name + ".weight"
        for name in (
            "intermediate.dense",
            "output.dense",
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
        )
    }
    for _ in range(5):
        trainer.optimizer.zero_grad()
        model(torch.randint(0, 99, (2, 5))).last_hidden_state.square().sum().backward()
        trainer.step()
    assert NM(1, 8).is_satisfied(trainer.masks[layer + "output.dense.weight"], exact=True)
    query = trainer.masks[layer + "attention.self.query.weight"]
    assert NM(2, 4).is_satisfied(query, exact=True)


def test_gradient_noise_is_the_mean_second_moment_of_the_masked_weights():
    model = net()
    optimizer = adamw(model)
    trainer = made(model, optimizer, include=("2",))
    train(model, trainer, optimizer, 3)
    expected = optimizer.state[leaf(model, 2)]["exp_avg_sq"].mean()
    assert gradient_noise(model, optimizer) == pytest.approx(float(expected))
    with pytest.raises(ValueError, match="track_gradient_noise, got SGD"):
        gradient_noise(model, torch.optim.SGD(model.parameters(), 0.1))


def test_gradient_noise_is_the_same_measure_under_sgd():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    trainer = made(model, optimizer)
    handle = track_gradient_noise(model, optimizer, decay=0.9)
    expected = torch.zeros(8, 32)
    for step in range(3):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        expected = 0.9 * expected + 0.1 * leaf(model, 2).grad ** 2
        trainer.step()
    handle.remove()
    train(model, trainer, optimizer, 1, 3)
    torch.testing.assert_close(optimizer.state[leaf(model, 2)]["exp_avg_sq"], expected)
    moments = [optimizer.state[leaf(model, i)]["exp_avg_sq"] for i in (0, 2)]
    mean = torch.cat([moment.flatten() for moment in moments]).mean()
    assert gradient_noise(model, optimizer) == pytest.approx(float(mean))
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1.0"):
        track_gradient_noise(model, optimizer, decay=1.0)


def test_under_a_trainer_that_owns_the_step_the_result_is_the_same():
    ours, theirs = net(), net()
    a, b = adamw(ours), adamw(theirs)
    train(ours, made(ours, a), a, 12)
    followed = made(theirs, b)
    followed.follow_optimizer()
    train(theirs, b, b, 12)
    assert torch.equal(leaf(ours), leaf(theirs))


def test_the_trained_network_compiles_to_the_same_outputs():
    model = net()
    trainer = made(model)
    train(model, trainer, trainer.optimizer, 40)
    trainer.finalize()
    model.eval()
    x = batch(3)[0]
    compiled = runtime.compile(model, (x,), threads=1)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("always")
def test_too_many_steps_warn_once_and_stay_strict():
    model = net()
    trainer = made(model)
    train(model, trainer, trainer.optimizer, 40)
    with pytest.warns(UserWarning, match="more than total_steps = 40") as warned:
        train(model, trainer, trainer.optimizer, 3)
    assert len(warned) == 1
    assert trainer.beta == 0.0


@pytest.mark.parametrize("options", [{}, {"kind": "structure"}])
def test_the_strict_network_can_be_evaluated_at_any_time_and_leaves_no_trace(options):
    ours, theirs = net(), net()
    trainer, other = made(ours, **options), made(theirs, **options)
    for step in range(40):
        weight = leaf(ours).detach()
        kept = NM(1, 4).select(weight.abs())
        masks = trainer.masks.clone()
        with trainer.strict():
            assert torch.equal(ours[0].weight.detach(), weight * kept)
        assert trainer.masks == masks
        train(ours, trainer, trainer.optimizer, 1, step)
        train(theirs, other, other.optimizer, 1, step)
    assert torch.equal(leaf(ours), leaf(theirs))


def test_training_flops_follow_the_rungs():
    model = net()
    report = {"masks": made(model, include=("0",)).masks, "input": torch.zeros(1, 16)}
    phases = {"dense_fraction": 0.0, "fine_tune_fraction": 0.0, "include": ("0",), "n": 1, "m": 8}
    sparse, other = 2 * 16 * 32, 2 * 32 * 8
    stepwise = made(net(), kind="structure", **phases)
    count = inference_flops(net(), **report)
    # The mean over 7:8, 4:8, 2:8 and 1:8 forward, dense products backward.
    assert stepwise.training_flops(count) == (0.4375 + 2.0) * sparse + 3.0 * other
    assert made(net(), **phases).training_flops(count) == 3.0 * (sparse + other)
    late = made(net(), **{**phases, "fine_tune_fraction": 0.25})
    assert late.training_flops(count) == pytest.approx((0.78125 + 2) * sparse + 3 * other)
    with pytest.raises(ValueError, match=r"no FLOPs of '2.weight'"):
        made(net()).training_flops(count)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 5}, "n"),
        ({"n": 0}, "n"),
        ({"m": 5}, "0.weight"),
        ({"kind": "structure", "n": 3, "m": 8}, "power of two"),
        ({"dense_fraction": 0.8, "fine_tune_fraction": 0.3}, "leave none of 40 steps"),
        ({"k": 0.0}, r"k must be in \(0, inf\], got 0.0"),
        ({"include": ()}, "match no weight of Sequential"),
        ({"locations": ("heads",)}, "got 'heads'"),
        ({"total_steps": 0}, "total_steps must be at least 1, got 0"),
        ({"grad": "none"}, "grad must be"),
        ({"kind": "both"}, "kind must be"),
        ({"decay": "cosine"}, "decay must be"),
        ({"kind": "structure", "ladder": {4: (3, 4), 20: (2, 4)}}, "must reach 1:4.*'0.weight'"),
        ({"kind": "structure", "ladder": {4: (3, 4), 31: (1, 4)}}, "by step 30"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        made(net(), **options)


def test_half_precision_and_early_ends_are_refused():
    model = net().to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"'0.weight' is torch.bfloat16"):
        made(model)
    model = net()
    trainer = made(model)
    train(model, trainer, trainer.optimizer, 10)
    with pytest.raises(RuntimeError, match="after 10 of 40 steps, in the middle phase"):
        trainer.finalize()
    assert isinstance(trainer, NMTrainer)
