"""Iterative soft shrinkage, promise by promise."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from aerogel import runtime
from aerogel.models import SwinIR
from aerogel.nested import load_state, save_state
from aerogel.pruning import METHODS, Goal, IterativeSoftShrinkage
from aerogel.sparsity import NM


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten())


def adam(model, lr=1e-3):
    return torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.99))


def gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(4, 1, 8, 8, generator=generator)
    model.zero_grad()
    F.l1_loss(model(x), torch.randn(4, 96, generator=generator)).backward()


def train(model, stepper, steps, first=0):
    for step in range(first, first + steps):
        gradients(model, step)
        stepper.step()


def weights(model):
    return {index: model[index].weight.detach().clone() for index in (0, 2)}


def same(model, other):
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def count(numel, sparsity):
    return min(math.ceil(round(sparsity * numel, 9)), math.floor(round(0.995 * numel, 9)))


quiet = pytest.mark.filterwarnings("ignore:lr / ")


@quiet
@pytest.mark.parametrize("alpha", [0.95, 0.5])
def test_a_step_of_the_first_stage_is_that_of_a_loop_written_by_hand(alpha):
    ours, theirs = net(), net()
    a, b = adam(ours), adam(theirs)
    trainer = IterativeSoftShrinkage(ours, a, 0.9, alpha=alpha, prune_steps=50)
    for step in range(8):
        train(ours, trainer, 1, step)
        gradients(theirs, step)
        b.step()
        for index in (0, 2):
            weight = theirs[index].weight.data.view(-1)
            order = weight.abs().argsort(stable=True)
            small = order[: count(len(weight), 0.9)]
            kept = ours[index].weight.data.view(-1)
            large = order[len(small) :]
            assert torch.equal(kept[large], weight[large])  # not touched, to the last bit
            weight[small] *= alpha
            assert torch.equal(kept, weight)
    assert trainer.stage == "shrink"
    assert trainer.masks is None


@given(
    st.integers(1, 60),
    st.floats(0.01, 0.995),
    st.sampled_from(["equal", "zeros", "ties", "normal"]),
)
@settings(max_examples=40, deadline=None)
def test_exactly_as_many_are_shrunk_as_the_sparsity_says(inputs, sparsity, values):
    layer = nn.Linear(inputs, 7, bias=False)
    start = {
        "equal": torch.ones(7, inputs),
        "zeros": torch.zeros(7, inputs),
        "ties": torch.randint(-2, 3, (7, inputs)).float(),
        "normal": torch.randn(7, inputs),
    }[values]
    layer.weight.data.copy_(start)
    optimizer = torch.optim.SGD(layer.parameters(), 0.0)
    trainer = IterativeSoftShrinkage(layer, optimizer, sparsity, alpha=0.5, prune_steps=2)
    layer.weight.grad = torch.zeros_like(layer.weight)
    trainer.step()
    important = trainer.controller.masks["weight"]
    assert int((~important).sum()) == min(count(7 * inputs, sparsity), 7 * inputs - 1)
    assert torch.equal(layer.weight, torch.where(important, start, start / 2))
    trainer.step()
    assert torch.equal(layer.weight != 0, trainer.masks["weight"] & (start != 0))


@quiet
def test_alpha_one_is_dense_training_until_the_cut():
    ours, theirs = net(), net()
    a, b = adam(ours), adam(theirs)
    train(ours, IterativeSoftShrinkage(ours, a, 0.9, alpha=1.0, prune_steps=50), 12)
    train(theirs, b, 12)
    assert same(ours, theirs)


def test_alpha_zero_is_iterative_hard_thresholding():
    ours, theirs = net(), net()
    kinds = ({"alpha": 0.0}, {"variant": "iht"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model, kind in zip((ours, theirs), kinds, strict=True):
            train(model, IterativeSoftShrinkage(model, adam(model), 0.9, prune_steps=50, **kind), 6)
    assert same(ours, theirs)
    assert int((ours[2].weight == 0).sum()) == count(432, 0.9)


def test_a_weight_leaves_the_unimportant_set_and_enters_it_again():
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data.copy_(torch.tensor([[0.1, 1.0, 2.0, 3.0]]))
    optimizer = torch.optim.SGD(layer.parameters(), 1.0)
    trainer = IterativeSoftShrinkage(layer, optimizer, 0.25, alpha=0.5, prune_steps=9)
    seen, flips = [], []
    for gradient in (0.0, -1.5, 0.0, 1.5, 0.0):  # of the first weight
        layer.weight.grad = torch.tensor([[gradient, 0.0, 0.0, 0.0]])
        trainer.step()
        seen.append(bool(trainer.controller.masks["weight"][0, 0]))
        flips.append(trainer.mask_flips())
    assert seen == [False, True, True, False, False]
    assert flips == [0, 2, 0, 2, 0]


@quiet
@pytest.mark.parametrize("variant", ["iss_p", "iss_r", "iht"])
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99])
def test_after_the_cut_the_zeros_are_exact_and_stay(variant, sparsity):
    model = net()
    optimizer = adam(model)
    trainer = IterativeSoftShrinkage(model, optimizer, sparsity, prune_steps=6, variant=variant)
    train(model, trainer, 6)
    assert trainer.stage == "frozen"
    masks = trainer.masks.clone()
    for step in range(6, 20):
        for index in (0, 2):
            zeros = int((model[index].weight == 0).sum())
            assert zeros == count(model[index].weight.numel(), sparsity)
        train(model, trainer, 1, step)
        assert trainer.masks == masks
        assert trainer.mask_flips() == 0
    for index in (0, 2):  # nothing of the past is left where weights are zero
        moment = optimizer.state[model[index].weight]["exp_avg"]
        assert not moment[~masks[f"{index}.weight"]].any()
    assert trainer.finalize() == masks
    assert [p.dim() for p in model.parameters()] == [4, 1, 4, 1]


@quiet
@pytest.mark.parametrize("fast", [False, True])
def test_n_m_patterns_shrink_and_end_strict_in_every_group(fast):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 8))
    optimizer = adam(model)
    options = {"pattern": "1:20", "include": ("0",), "fast": fast, "sample": 50}
    trainer = IterativeSoftShrinkage(model, optimizer, None, prune_steps=4, **options)
    assert trainer.sparsity == pytest.approx(0.95)
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.randn(5, 40)).square().sum().backward()
        trainer.step()
        assert NM(1, 20).is_satisfied(trainer.controller.masks["0.weight"], exact=True)
    assert NM(1, 20).is_satisfied(model[0].weight != 0, exact=True)


@quiet
def test_a_growing_penalty_pulls_unimportant_weights_alone():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    trainer = IterativeSoftShrinkage(model, optimizer, 0.5, prune_steps=40, variant="iss_r")
    for step in range(39):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        before = weights(model)
        important = trainer.controller.masks.clone()
        trainer.step()
        pull = 0.25 if step >= 20 else 0.0  # half of the limit, after half of the steps
        for index, weight in before.items():
            kept = important[f"{index}.weight"]
            expected = torch.where(kept, weight, weight - pull * weight)
            torch.testing.assert_close(model[index].weight.detach(), expected, rtol=1e-6, atol=0)


@quiet
@pytest.mark.parametrize("stop", [5, 15])
@pytest.mark.parametrize("options", [{}, {"variant": "iss_r"}, {"fast": True, "sample": 100}])
def test_resuming_in_either_stage_is_bit_identical(stop, options, tmp_path):
    options = {"prune_steps": 10, **options}
    whole = net()
    trainer = IterativeSoftShrinkage(whole, adam(whole), 0.9, **options)
    train(whole, trainer, stop)
    save_state(trainer.state_dict(), tmp_path / "state.safetensors")
    model_state = copy.deepcopy(whole.state_dict())
    optimizer_state = copy.deepcopy(trainer.optimizer.state_dict())
    train(whole, trainer, 20 - stop, stop)

    resumed = net(seed=1)
    again = IterativeSoftShrinkage(resumed, adam(resumed), 0.9, **options)
    resumed.load_state_dict(model_state)
    again.optimizer.load_state_dict(optimizer_state)
    again.load_state_dict(load_state(tmp_path / "state.safetensors"))
    assert again.stage == ("shrink" if stop < 10 else "frozen")
    train(resumed, again, 20 - stop, stop)
    assert same(whole, resumed)
    assert again.masks == trainer.masks


def test_a_sampled_threshold_is_near_the_exact_count_and_the_cut_is_exact():
    torch.manual_seed(0)
    layer = nn.Linear(500, 400, bias=False)
    nn.init.normal_(layer.weight)
    optimizer = torch.optim.SGD(layer.parameters(), 0.0)
    trainer = IterativeSoftShrinkage(layer, optimizer, 0.9, prune_steps=2, fast=True)
    layer.weight.grad = torch.zeros_like(layer.weight)
    trainer.step()
    shrunk = int((~trainer.controller.masks["weight"]).sum())
    assert shrunk != 180_000
    assert abs(shrunk - 180_000) < 1_800
    trainer.step()
    assert int((layer.weight == 0).sum()) == 180_000


def test_weights_on_their_way_to_denormals_become_zero_and_may_return():
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data.copy_(torch.tensor([[1e-20, 1.0, 2.0, 3.0]]))
    optimizer = torch.optim.SGD(layer.parameters(), 1.0)
    trainer = IterativeSoftShrinkage(layer, optimizer, 0.25, alpha=0.5, prune_steps=9)
    layer.weight.grad = torch.zeros_like(layer.weight)
    trainer.step()
    assert layer.weight[0, 0] == 0.0
    layer.weight.grad = torch.tensor([[-9.0, 0.0, 0.0, 0.0]])
    trainer.step()
    assert layer.weight[0, 0] == 9.0


@quiet
def test_colour_means_and_tails_stay_dense_where_there_are_some():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.sub_mean, self.body = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 8, 3)
            self.tail = nn.Conv2d(8, 3, 3)

    model = Named()
    trainer = IterativeSoftShrinkage(model, adam(model), 0.9, prune_steps=1)
    assert list(trainer.controller.masks) == ["body.weight"]
    model = Named()
    trainer = IterativeSoftShrinkage(model, adam(model), 0.9, prune_steps=1, exclude=("body",))
    assert list(trainer.controller.masks) == ["sub_mean.weight", "tail.weight"]


@quiet
def test_of_a_transformer_matrices_and_kernels_are_shrunk_and_nothing_else():
    model = SwinIR(2, 12, (2,), (3,), 4)
    trainer = IterativeSoftShrinkage(model, adam(model), 0.9, prune_steps=1)
    kinds = {name.rpartition(".")[2] for name in trainer.controller.masks}
    assert kinds == {"weight"}
    others = {name for name, _ in model.named_parameters()} - set(trainer.controller.masks)
    assert all("bias" in name or "norm" in name for name in others)


@quiet
def test_under_a_trainer_that_owns_the_step_the_result_is_the_same():
    ours, theirs = net(), net()
    a, b = adam(ours), adam(theirs)
    train(ours, IterativeSoftShrinkage(ours, a, 0.9, prune_steps=5), 9)
    followed = IterativeSoftShrinkage(theirs, b, 0.9, prune_steps=5)
    followed.follow_optimizer()
    train(theirs, b, 9)
    assert same(ours, theirs)


def test_a_learning_rate_that_holds_weights_up_is_warned_of_once():
    model = net()
    trainer = IterativeSoftShrinkage(model, adam(model, 5e-3), 0.9, prune_steps=10)
    assert trainer.rate_ratio() == 0.0
    with pytest.warns(UserWarning, match=r"above 0\.25.* alpha = 0\.95") as seen:
        train(model, trainer, 10)
    assert len(seen) == 1
    hover = 5e-3 / 0.05
    held = weights(model)
    kept = [float(held[int(n[0])][m].abs().median()) for n, m in trainer.masks.items()]
    assert trainer.rate_ratio() == pytest.approx(hover / min(kept), rel=1e-5)
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = IterativeSoftShrinkage(model, adam(model, 1e-4), 0.9, alpha=0.9, prune_steps=10)
        train(model, trainer, 10)
        assert trainer.rate_ratio() < 0.25


@quiet
def test_the_method_of_recipes_reaches_its_goal():
    model = net()
    goal = Goal(("2.weight",), 0.8, "unstructured", 20, 0.1, 0.5, 0.0, 5, 3.0)
    trainer = METHODS["iss-p"].build(model, adam(model), goal)
    train(model, trainer, 20)
    assert int((model[2].weight == 0).sum()) == count(432, 0.8)
    assert METHODS["iss-p"].from_scratch


@quiet
def test_the_trained_network_compiles_to_the_same_outputs():
    model = net()
    trainer = IterativeSoftShrinkage(model, adam(model), 0.9, prune_steps=3)
    train(model, trainer, 4)
    trainer.finalize()
    x = torch.randn(1, 1, 8, 8)
    compiled = runtime.compile(model.eval(), (x,), threads=1, cache=False)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
        ({"alpha": -0.1, "variant": "iht"}, "alpha"),
        ({"sparsity": 0.0}, r"sparsity must be in \(0, 1\), got 0.0"),
        ({"sparsity": 1.0}, "got 1.0"),
        ({"sparsity": None}, "sparsity must be given"),
        ({"prune_steps": 0}, "prune_steps must be at least 1, got 0"),
        ({"sample": 0}, "sample must be at least 1, got 0"),
        ({"variant": "soft"}, "got 'soft'"),
        ({"exclude": ("nothing",)}, "exclude: no parameter matches"),
        ({"exclude": ("*",)}, "no parameter selected"),
        ({"include": ("0",), "pattern": "1:5", "sparsity": 0.8}, "0.weight"),
        ({"include": ("2",), "pattern": "1:4"}, r"has sparsity 0.75, got sparsity=0.9"),
    ],
)
def test_bad_arguments_are_named(options, message):
    model = net()
    options = {"sparsity": 0.9, "prune_steps": 5, **options}
    with pytest.raises(ValueError, match=message):
        IterativeSoftShrinkage(model, adam(model), options.pop("sparsity"), **options)


def test_a_first_stage_without_a_second_and_an_early_end_are_told():
    model = net()
    with pytest.warns(UserWarning, match="prune_steps = 5 leaves none of total_steps = 5"):
        trainer = IterativeSoftShrinkage(model, adam(model), 0.9, prune_steps=5, total_steps=5)
    train(model, trainer, 1)
    with pytest.raises(RuntimeError, match="after 1 of 5 steps of the first stage"):
        trainer.finalize()
