"""Distillation: the three terms as formulas, hooks that leave, teachers that stay."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aerogel.sparsity.distillation import (
    DistillationObjective,
    FeatureTap,
    class_scores,
    feature_loss,
    layer_factors,
    soft_loss,
)

LAYERS = ("0", "2")


def network(seed: int, widths: tuple[int, ...] = (6, 5, 4)) -> nn.Sequential:
    torch.manual_seed(seed)
    first, middle, last = widths
    return nn.Sequential(nn.Linear(first, middle), nn.Tanh(), nn.Linear(middle, last))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(8, 6, generator=generator), torch.randint(4, (8,), generator=generator)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters()]


def test_the_loss_is_the_formula_written_out():
    student, teacher, (x, y) = network(0), network(1).eval(), batch()
    with DistillationObjective(
        student, teacher, LAYERS, alpha=0.5, beta=2.0, gamma=3.0, temperature=4.0
    ) as objective:
        objective.factors = {"0": 1.5, "2": 0.5}
        found = objective(x, y).detach()
    z, t = student(x).detach(), teacher(x).detach()
    p = (t / 4).softmax(-1)
    soft = 16 * (p * (p.log() - (z / 4).log_softmax(-1))).sum(-1).mean()
    first = (student[0](x) - teacher[0](x)).detach().square().mean()
    last = (z - t).square().mean()
    expected = 0.5 * F.cross_entropy(z, y) + 2 * soft + 3 * (1.5 * first + 0.5 * last)
    torch.testing.assert_close(found, expected)
    assert objective.errors == pytest.approx({"0": first.item(), "2": last.item()})
    assert objective.terms["soft"] == pytest.approx(soft.item())


def test_an_attached_objective_gives_the_gradients_of_the_sum():
    (x, y), teacher = batch(), network(1).eval()
    found = []
    for attach in (True, False):
        student = network(0)
        with DistillationObjective(student, teacher, LAYERS, attach=attach) as objective:
            loss = F.cross_entropy(student(x), y) if attach else objective(x, y)
            loss.backward()
        found.append(gradients(student))
    torch.testing.assert_close(found[0], found[1])


def test_it_leaves_both_networks_as_they_were():
    student, teacher, (x, y) = network(0), network(1).eval(), batch()
    before = copy.deepcopy(teacher.state_dict())
    objective = DistillationObjective(student, teacher, LAYERS, attach=True)
    assert any(m._forward_hooks for m in student.modules())
    F.cross_entropy(student(x), y).backward()
    objective.close()
    for model in (student, teacher):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_without_the_feature_term_nothing_is_hooked():
    student, teacher = network(0), network(1).eval()
    objective = DistillationObjective(student, teacher, gamma=0.0)
    assert not any(m._forward_hooks for net in (student, teacher) for m in net.modules())
    assert objective.layers == []
    objective(*batch()).backward()


def test_without_a_task_loss_targets_are_never_touched():
    class Untouchable:
        def __getattribute__(self, name: str) -> object:
            raise AssertionError(f"read {name}")

    student, teacher = network(0), network(1).eval()
    with DistillationObjective(student, teacher, LAYERS, task_loss=None) as objective:
        objective(batch()[0], Untouchable()).backward()
    with DistillationObjective(student, teacher, LAYERS, alpha=0.0) as objective:
        assert not objective.needs_targets
        objective(batch()[0], Untouchable()).backward()


def test_evaluation_neither_costs_nor_keeps_anything_when_attached():
    student, teacher, (x, _) = network(0), network(1).eval(), batch()
    calls = []
    handle = teacher.register_forward_hook(lambda *a: calls.append(1))
    with DistillationObjective(student, teacher, LAYERS, attach=True) as objective:
        student.eval()(x)
        with torch.no_grad():
            student.train()(x)
        assert not calls
        assert not any(tap.features for tap in objective._taps)
    handle.remove()


def test_other_tasks_bring_their_own_loss_and_scores():
    student, teacher, (x, _) = network(0), network(1).eval(), batch()
    with DistillationObjective(
        student,
        teacher,
        beta=1.0,
        gamma=0.0,
        task_loss=lambda output, target: (output - target).square().mean(),
        scores=lambda output: output.reshape(8, 2, 2),
    ) as objective:
        found = objective(x, torch.ones(8, 4))
    z, t = student(x), teacher(x)
    expected = (z - 1).square().mean() + soft_loss(z.view(8, 2, 2), t.view(8, 2, 2), 3.0)
    torch.testing.assert_close(found, expected)


def test_scores_come_from_whatever_a_network_returns():
    class Output:
        logits = torch.ones(2, 3)

    assert class_scores(Output()) is Output.logits
    assert class_scores((Output.logits, None)) is Output.logits
    with pytest.raises(ValueError, match="no class scores"):
        class_scores("text")


def test_a_tap_gives_features_once():
    model = network(0)
    with FeatureTap(model, ["?"]) as tap:
        assert tap.names == ["0", "1", "2"]
        out = model(batch()[0])
        assert torch.equal(tap.take()["2"], out)
        with pytest.raises(RuntimeError, match="'0'"):
            tap.take()


@pytest.mark.parametrize("errors", [{"a": 1.0, "b": 3.0}, {"a": 0.0, "b": 1e-9, "c": 2.0}])
def test_factors_have_mean_one_and_follow_the_errors(errors):
    factors = layer_factors(errors)
    assert math.fsum(factors.values()) / len(factors) == pytest.approx(1.0)
    ratio = factors["b"] / errors["b"]
    assert all(factors[n] == pytest.approx(ratio * e) for n, e in errors.items())


def test_errors_that_say_nothing_give_no_factors():
    assert layer_factors({"a": 0.0, "b": 0.0}) is None
    for errors in ({}, {"a": -1.0}, {"a": math.nan}):
        with pytest.raises(ValueError, match="layer_errors"):
            layer_factors(errors)


def test_bad_networks_and_weights_are_named():
    student, teacher = network(0), network(1).eval()
    shared = network(1).eval()
    shared[0] = student[0]
    shared.eval()
    training = network(1).eval()
    training[1].train()
    for make, match in (
        (lambda: DistillationObjective(student, network(1)), "training mode"),
        (lambda: DistillationObjective(student, training), "module '1'"),
        (lambda: DistillationObjective(network(0), teacher, ["blocks.?"]), "no module matches"),
        (lambda: DistillationObjective(student, teacher, LAYERS, beta=-1.0), "beta"),
        (lambda: DistillationObjective(student, teacher, LAYERS, alpha=math.nan), "alpha"),
        (lambda: DistillationObjective(student, teacher, LAYERS, temperature=0.0), "temperature"),
        (lambda: feature_loss({}), "no features"),
    ):
        with pytest.raises(ValueError, match=match):
            make()
    with pytest.raises(ValueError, match=r"shares parameter '0\.weight'"):
        DistillationObjective(student.train(), shared.eval())
    other = network(1, (6, 7, 4)).eval()
    with (
        DistillationObjective(network(0), other, LAYERS) as objective,
        pytest.raises(ValueError, match=r"'0' have shape \(8, 5\).*\(8, 7\)"),
    ):
        objective(*batch())
