"""Dynamic sparse learning, promise by promise, against brute-force oracles."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from aerogel.nested import load_state, save_state
from aerogel.pruning import DynamicSparseLearning
from aerogel.sparsity import MaskController

TIMES = {"total_steps": 40, "update_every": 5}


class Pairs(nn.Module):
    """A small recommender: two tables and an MLP with biases."""

    def __init__(self, padding=None, sparse=False):
        super().__init__()
        self.users = nn.Embedding(12, 8, padding_idx=padding, sparse=sparse)
        self.items = nn.Embedding(20, 8, sparse=sparse)
        self.mlp = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, users, items):
        return self.mlp(torch.cat((self.users(users), self.items(items)), -1)).squeeze(-1)


def net(**options):
    torch.manual_seed(0)
    return Pairs(**options)


def adam(model):
    return torch.optim.Adam(model.parameters(), 0.01)


def backward(model, optimizer, step):
    generator = torch.Generator().manual_seed(step)
    users = torch.randint(0, 12, (32,), generator=generator)
    items = torch.randint(0, 20, (32,), generator=generator)
    wanted = ((users + items) % 3 == 0).float()
    optimizer.zero_grad()
    F.binary_cross_entropy_with_logits(model(users, items), wanted).backward()


def train(model, trainer, optimizer, steps, first=0):
    for step in range(first, first + steps):
        backward(model, optimizer, step)
        trainer.step()


def made(model, optimizer=None, density=0.3, **options):
    return DynamicSparseLearning(model, optimizer or adam(model), density, **{**TIMES, **options})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"death": "set"},
        {"death": "taylor"},
        {"growth": "random"},
        {"growth": "random_unfired"},
        {"decay": "linear"},
        {"growth": "momentum"},
        {"reset_state": True},
        {"grad_accum": 3},
    ],
)
def test_every_tensor_keeps_its_exact_budget_from_the_first_step_to_the_last(options):
    model = net()
    optimizer = adam(model)
    trainer = made(model, optimizer, **options)
    parameters = dict(model.named_parameters())
    assert set(trainer.masks) == set(parameters)
    budget = {n: p.numel() - round(0.7 * p.numel()) for n, p in parameters.items()}
    budget["mlp.2.bias"] = 1  # never none
    for step in range(40):
        assert {n: int(m.sum()) for n, m in trainer.masks.items()} == budget
        train(model, trainer, optimizer, 1, step)
        for name, parameter in parameters.items():
            assert not parameter[~trainer.masks[name]].any()
    assert 0.3 <= trainer.fired_rate() <= 1.0


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 7), st.floats(0.05, 0.9), st.sampled_from([0.1, 0.5, 0.9]))
def test_an_update_drops_the_smallest_and_grows_the_largest_gradients(updates, density, z0):
    model = net()
    optimizer = adam(model)
    trainer = made(model, optimizer, density, z0=z0)
    train(model, trainer, optimizer, 5 * updates + 4)
    old = {n: m.clone() for n, m in trainer.masks.items()}
    backward(model, optimizer, 5 * updates + 4)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    # What the optimizer alone makes of the weights, which the drop looks at.
    twin = copy.deepcopy(model)
    other = adam(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for name, parameter in twin.named_parameters():
        parameter.grad = gradients[name].clone()
    other.step()
    trainer.step()
    t = 5 * (updates + 1)
    share = 0.005 + 0.5 * (z0 - 0.005) * (1 + math.cos(math.pi * t / 40))
    for name, stepped in twin.named_parameters():
        was, stepped = old[name].flatten(), stepped.detach().flatten()
        count = math.ceil(share * int(was.sum()) - 1e-9)
        kept = sorted(was.nonzero().flatten().tolist(), key=lambda i: (stepped[i].abs(), -i))
        survivors = set(kept[count:])
        free = [i for i in range(len(was)) if i not in survivors]
        score = gradients[name].flatten().abs()
        grown = set(sorted(free, key=lambda i: (-score[i], i))[:count])
        assert set(trainer.masks[name].flatten().nonzero().flatten().tolist()) == survivors | grown
        now = dict(model.named_parameters())[name].detach().flatten()
        for i in grown:  # new ones start at 0; one grown back at once keeps its value
            assert now[i] == (stepped[i] if was[i] else 0.0)


def test_grown_weights_keep_warm_adam_moments_unless_reset():
    for reset, warm in ((False, True), (True, False)):
        model = net()
        optimizer = adam(model)
        trainer = made(model, optimizer, reset_state=reset)
        train(model, trainer, optimizer, 4)
        old = trainer.masks["items.weight"].clone()
        train(model, trainer, optimizer, 1, 4)
        new = trainer.masks["items.weight"] & ~old
        moments = optimizer.state[model.items.weight]["exp_avg_sq"]
        assert new.any()
        assert bool((moments[new] > 0).any()) == warm  # some gradients were exactly zero


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_the_swapped_share_falls_from_z0_to_the_floor(decay):
    schedule = made(net(), decay=decay).schedule
    # The controller counts steps before this one: after t steps the share is value(t - 1).
    values = [schedule.value(t - 1) for t in range(41)]
    assert values[0] == pytest.approx(0.5)
    assert values[-1] == pytest.approx(0.005)
    assert values == sorted(values, reverse=True)
    assert [t for t in range(1, 41) if schedule.due(t - 1)] == list(range(5, 41, 5))


def test_before_an_update_it_is_static_sparse_training_bit_for_bit():
    ours, theirs = net(), net()
    a, b = adam(ours), adam(theirs)
    trainer = made(ours, a, update_every=40)
    static = MaskController(
        theirs, b, trainer.controller.selection.__class__(_refs(theirs)), "hard_dense_grad",
        masks=trainer.masks.clone(),
    )  # fmt: skip
    train(ours, trainer, a, 39)
    train(theirs, static, b, 39)
    assert _equal(ours, theirs)
    before = trainer.masks.clone()
    train(ours, trainer, a, 1, 39)  # an interval as long as the training still fires once
    assert any(not torch.equal(before[n], m) for n, m in trainer.masks.items())


def _refs(model):
    from aerogel.sparsity import select_parameters

    return list(select_parameters(model, include=("*",), biases=True).values())


def _equal(ours, theirs):
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


def test_at_density_one_it_is_dense_training_bit_for_bit():
    ours, theirs = net(), net()
    a, b = adam(ours), adam(theirs)
    train(ours, made(ours, a, 1.0), a, 40)
    train(theirs, b, b, 40)
    assert _equal(ours, theirs)


def test_the_share_ever_active_never_falls():
    model = net()
    optimizer = adam(model)
    trainer = made(model, optimizer)
    rates = []
    for step in range(40):
        rates.append(trainer.fired_rate())
        train(model, trainer, optimizer, 1, step)
    assert rates == sorted(rates)
    assert 0.29 < rates[0] < rates[-1] <= 1.0


@pytest.mark.parametrize("growth", ["gradient", "random"])
def test_a_padding_row_is_never_grown(growth):
    model = net(padding=3)
    optimizer = adam(model)
    trainer = made(model, optimizer, 0.9, growth=growth)
    budget = int(trainer.masks["users.weight"].sum())
    assert budget == 88 - round(0.1 * 88)
    for step in range(40):
        train(model, trainer, optimizer, 1, step)
        assert not trainer.masks["users.weight"][3].any()
    assert int(trainer.masks["users.weight"].sum()) == budget


def test_budgets_of_rows_are_counted_and_empty_ones_reported():
    trainer = made(net(), density=0.05)
    budget = trainer.row_budget("items.weight")
    assert torch.equal(budget, trainer.masks["items.weight"].sum(1))
    assert trainer.empty_rows()["items.weight"] == int((budget == 0).sum()) > 0
    assert "mlp.0.bias" not in trainer.empty_rows()
    with pytest.raises(ValueError, match="got 'nothing'"):
        trainer.row_budget("nothing")


def test_a_global_start_keeps_the_largest_weights_of_all_tensors():
    model = net()
    weights = torch.cat([p.detach().abs().flatten() for p in model.parameters()])
    trainer = made(model, init="global_magnitude")
    kept = torch.cat([trainer.masks[n].flatten() for n, _ in model.named_parameters()])
    assert weights[kept].min() >= weights[~kept].sort().values[-len(trainer.masks)]
    budget = {n: int(m.sum()) for n, m in trainer.masks.items()}
    train(model, trainer, trainer.controller.optimizer, 40)
    assert {n: int(m.sum()) for n, m in trainer.masks.items()} == budget


def test_a_start_drawn_entry_by_entry_keeps_the_count_that_was_drawn():
    model = net()
    trainer = made(model, exact=False)
    budget = {n: int(m.sum()) for n, m in trainer.masks.items()}
    assert sum(budget.values()) == pytest.approx(0.3 * 401, abs=40)
    train(model, trainer, trainer.controller.optimizer, 40)
    assert {n: int(m.sum()) for n, m in trainer.masks.items()} == budget


def test_biases_stay_dense_on_request():
    trainer = made(net(), include_biases=False)
    assert set(trainer.masks) == {"users.weight", "items.weight", "mlp.0.weight", "mlp.2.weight"}


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    ours = net()
    a = adam(ours)
    trainer = made(ours, a, growth="random_unfired")
    train(ours, trainer, a, 17)
    save_state(trainer.state_dict(), tmp_path / "state.safetensors")
    theirs = net()
    b = adam(theirs)
    resumed = made(theirs, b, growth="random_unfired", generator=torch.Generator().manual_seed(9))
    theirs.load_state_dict(ours.state_dict())
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    resumed.load_state_dict(load_state(tmp_path / "state.safetensors"))
    train(ours, trainer, a, 23, 17)
    train(theirs, resumed, b, 23, 17)
    assert _equal(ours, theirs)
    assert resumed.fired_rate() == trainer.fired_rate()


def test_under_a_trainer_that_owns_the_step_the_result_is_the_same():
    ours, theirs = net(), net()
    a, b = adam(ours), adam(theirs)
    train(ours, made(ours, a), a, 12)
    made(theirs, b).follow_optimizer()
    train(theirs, b, b, 12)
    assert _equal(ours, theirs)


class Tables(nn.Module):
    def __init__(self):
        super().__init__()
        self.items = nn.Embedding(20, 8, sparse=True)


def test_sparse_gradients_need_accumulation_and_then_grow_in_rows_any_step_touched():
    with pytest.raises(ValueError, match=r"'items' has sparse=True"):
        made(Tables(), torch.optim.SGD(Tables().parameters(), 0.1))
    torch.manual_seed(0)
    model = Tables()
    optimizer = torch.optim.SparseAdam(list(model.parameters()), 0.01)
    trainer = made(model, optimizer, 0.2, grad_accum=5)
    first = trainer.masks["items.weight"].clone()
    for step in range(5):
        optimizer.zero_grad()
        model.items(torch.tensor([step])).sum().backward()
        trainer.step()
    grown = trainer.masks["items.weight"] & ~first
    assert int(trainer.masks["items.weight"].sum()) == 32
    assert grown[:4].any()
    assert not grown[5:].any()


def test_gradients_that_are_not_finite_are_named_and_change_nothing():
    model = net()
    optimizer = adam(model)
    trainer = made(model, optimizer)
    train(model, trainer, optimizer, 4)
    backward(model, optimizer, 4)
    model.items.weight.grad[0, 0] = float("nan")
    before = model.items.weight.detach().clone()
    with pytest.raises(ValueError, match=r"gradient of 'items.weight' has nan .* at step 4"):
        trainer.step()
    assert torch.equal(before, model.items.weight)
    train(model, trainer, optimizer, 1, 4)
    assert trainer.controller.t == 5


def test_steps_beyond_the_training_warn():
    model = net()
    optimizer = adam(model)
    trainer = made(model, optimizer)
    train(model, trainer, optimizer, 40)
    with pytest.warns(UserWarning, match="more than total_steps = 40"):
        train(model, trainer, optimizer, 1, 40)


def test_the_finished_model_is_plain_and_sparse():
    model = net()
    optimizer = adam(model)
    trainer = made(model, optimizer)
    train(model, trainer, optimizer, 40)
    masks = trainer.finalize()
    for name, parameter in model.named_parameters():
        assert not parameter[~masks[name]].any()
    with pytest.raises(RuntimeError, match="finalized"):
        trainer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, r"density must be in \(0, 1\], got 0.0"),
        ({"density": 1.1}, "got 1.1"),
        ({"density": float("nan")}, "density"),
        ({"update_every": 0}, "update_every must be at least 1, got 0"),
        ({"update_every": 41}, "got 41"),
        ({"total_steps": 0}, "total_steps must be at least 1"),
        ({"z0": 0.0}, "z0 must be in"),
        ({"z0": 1.0}, "got 1.0"),
        ({"z_min": 0.6}, "z_min must be in"),
        ({"decay": "step"}, "decay must be"),
        ({"init": "zeros"}, "init must be"),
        ({"growth": "best"}, "growth"),
        ({"death": "best"}, "death"),
        ({"grad_accum": 0}, "grad_accum must be at least 1, got 0"),
        ({"grad_accum": 6}, "got 6"),
        ({"include": ("nothing",)}, "no parameter matches"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        made(net(), **options)
