import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from aerogel.sparsity.dynamic import ITOP, SET, RigL
from aerogel.sparsity.masks import random_masks
from aerogel.sparsity.select import select_parameters


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 3)
    )


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 10, generator=generator), torch.randint(3, (16,), generator=generator)


def backward(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    x, y = batch(step)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def test_updates_fall_exactly_on_the_multiples_before_the_end():
    model = net()
    optimizer = sgd(model)
    trainer = RigL(model, optimizer, 0.8, total_steps=40, update_every=5, end=0.75)
    changed = []
    for t in range(40):
        before = trainer.masks.clone()
        backward(model, optimizer, t)
        trainer.step()
        if before != trainer.masks:
            changed.append(t)
    assert changed[0] == 5
    assert set(changed) <= {5, 10, 15, 20, 25}
    assert len(changed) >= 4
    schedule = trainer.controller.schedule
    assert schedule.value(0) == pytest.approx(0.3)
    assert schedule.value(30) == pytest.approx(0.0)


@settings(max_examples=12, deadline=None)
@given(
    sparsity=st.floats(0.2, 0.95),
    kind=st.sampled_from([RigL, SET]),
    allocation=st.sampled_from(["uniform", "erk"]),
    init=st.sampled_from(["random", "topk", "bernoulli"]),
)
def test_counts_never_change_and_pruned_weights_and_states_are_zero(
    sparsity, kind, allocation, init
):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trainer = kind(
        model, optimizer, sparsity, total_steps=20, update_every=3, allocation=allocation, init=init
    )
    counts, itop = None, trainer.itop()
    for t in range(12):
        backward(model, optimizer, t)
        trainer.step()
        now = {name: int(mask.sum()) for name, mask in trainer.masks.items()}
        if init == "bernoulli" and t < 3:
            continue  # the first update repairs the count
        counts = counts or now
        assert now == counts
        for name, mask in trainer.masks.items():
            weight = model.get_parameter(name)
            assert bool((weight[~mask] == 0).all())
            assert bool((optimizer.state[weight]["exp_avg"][~mask] == 0).all())
        assert itop <= trainer.itop() <= 1.0
        itop = trainer.itop()
    assert trainer.masks.sparsity() == pytest.approx(sparsity, abs=0.02)
    assert trainer.degree_of_constraint() <= trainer.masks.density() <= trainer.itop()


def test_rigl_drops_the_smallest_and_grows_the_largest_dense_gradients():
    model = net()
    optimizer = sgd(model)
    trainer = RigL(model, optimizer, 0.7, total_steps=100, update_every=4, drop_fraction=0.4)
    for t in range(4):
        backward(model, optimizer, t)
        trainer.step()
    # The oracle: an unmasked clone's gradients, the plain optimizer step, then drop and grow.
    clone = copy.deepcopy(model)
    other = sgd(clone)
    other.load_state_dict(optimizer.state_dict())
    before = trainer.masks.clone()
    backward(clone, other, 4)
    dense = {n: p.grad.clone() for n, p in clone.named_parameters()}
    for name, mask in before.items():
        clone.get_parameter(name).grad[~mask] = 0
    other.step()
    fraction = 0.5 * 0.4 * (1 + torch.cos(torch.tensor(torch.pi * 4 / 75)).item())
    backward(model, optimizer, 4)
    trainer.step()
    for name, mask in before.items():
        weight = clone.get_parameter(name).detach()
        n = int(fraction * int(mask.sum()))
        keep = weight.abs().masked_fill(~mask, -1).flatten().topk(int(mask.sum()) - n).indices
        survivors = torch.zeros(mask.numel(), dtype=torch.bool)
        survivors[keep] = True
        score = dense[name].abs().flatten().masked_fill(survivors, -1)
        wanted = survivors.clone()
        wanted[score.topk(n).indices] = True
        assert torch.equal(trainer.masks[name].flatten(), wanted), name
        new = trainer.masks[name] & ~mask
        trained = model.get_parameter(name)
        assert bool((trained[new] == 0).all())
        assert bool((optimizer.state[trained]["momentum_buffer"][new] == 0).all())


def test_rigl_explores_more_than_a_static_mask_and_set_draws_from_its_generator():
    masks = []
    for seed in (1, 1, 2):
        model = net()
        optimizer = sgd(model)
        start = random_masks(
            select_parameters(model), 0.2, generator=torch.Generator().manual_seed(9)
        )
        trainer = SET(
            model, optimizer, 0.8, total_steps=40, update_every=5, masks=start,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        for t in range(30):
            backward(model, optimizer, t)
            trainer.step()
        assert trainer.itop() > start.density() + 0.05
        masks.append(trainer.masks.clone())
    assert masks[0] == masks[1]
    assert masks[0] != masks[2]


@pytest.mark.parametrize("kind", [RigL, SET, ITOP])
def test_resuming_at_any_step_is_bit_identical(kind):
    def make():
        model = net()
        optimizer = sgd(model)
        return model, optimizer, kind(model, optimizer, 0.8, total_steps=30, update_every=4)

    model, optimizer, trainer = make()
    saved = None
    for t in range(20):
        if t == 10:
            saved = copy.deepcopy(
                (model.state_dict(), optimizer.state_dict(), trainer.state_dict())
            )
        backward(model, optimizer, t)
        trainer.step()
    other, other_optimizer, resumed = make()
    other.load_state_dict(saved[0])
    other_optimizer.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    for t in range(10, 20):
        backward(other, other_optimizer, t)
        resumed.step()
    assert resumed.masks == trainer.masks
    assert resumed.itop() == trainer.itop()
    assert resumed.degree_of_constraint() == trainer.degree_of_constraint()
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def test_original_rigl_replaces_the_step():
    model = net()
    optimizer = sgd(model)
    trainer = RigL(
        model, optimizer, 0.8, total_steps=40, update_every=5, update_replaces_step=True,
        drop_noise=1e-5,
    )  # fmt: skip
    for t in range(6):
        bias = model[0].bias.detach().clone()
        backward(model, optimizer, t)
        trainer.step()
        assert torch.equal(bias, model[0].bias) == (t == 5)


def test_itop_keeps_adam_moments_warm_and_explores_by_a_floored_cosine():
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    trainer = ITOP(model, optimizer, 0.8, total_steps=30, update_every=6)
    densities = trainer.masks.layer_density()
    assert len(set(densities.values())) > 1  # Erdos-Renyi-Kernel, not uniform
    for t in range(30):
        backward(model, optimizer, t)
        trainer.step()
    mask = trainer.masks["0.weight"]
    assert bool((optimizer.state[model[0].weight]["exp_avg_sq"][~mask] > 0).any())
    assert trainer.controller.schedule.value(30) == pytest.approx(0.005)
    assert trainer.itop() > 0.3


def test_a_trainer_that_owns_the_loop_can_drive_it():
    model = net()
    optimizer = sgd(model)
    trainer = SET(model, optimizer, 0.8, total_steps=40, update_every=5)
    trainer.follow_optimizer()
    for t in range(8):
        backward(model, optimizer, t)
        optimizer.step()
    assert trainer.controller.t == 8
    assert trainer.itop() > 0.2
    final = trainer.finalize()
    assert bool((model[0].weight[~final["0.weight"]] == 0).all())


def test_bad_arguments_are_refused():
    model = net()
    optimizer = sgd(model)
    good = {"total_steps": 100, "update_every": 10}
    for change, message in [
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": 0.0}, "sparsity"),
        ({"update_every": 0}, "update_every"),
        ({"update_every": 80}, "no mask update"),
        ({"end": 0.0}, "end"),
        ({"end": 1.5}, "end"),
        ({"drop_fraction": 1.0}, "drop_fraction"),
        ({"grad_accum": 10}, "grad_accum"),
        ({"init": "randm"}, "nearest: random"),
        ({"include": ["nothing"]}, "nothing"),
    ]:
        with pytest.raises(ValueError, match=message):
            RigL(model, optimizer, **{"sparsity": 0.8, **good, **change})
    RigL(model, optimizer, 0.8, **good)  # refused attempts leave no controller behind
    model2 = net()
    first = RigL(model2, sgd(model2), 0.8, **good)
    with pytest.raises(ValueError, match="already under"):
        SET(model2, sgd(model2), 0.8, **good)
    assert first.controller.t == 0
