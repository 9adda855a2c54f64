"""The loop on one process: it learns, it distils, and it says what is wrong."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from train_toys import toy_dataset, toy_model

from aerogel.train import (
    Callback,
    FeatureMatch,
    TrainConfig,
    evaluate,
    fit,
    make_optimizer,
    zero_fraction,
)
from aerogel.train.batches import epoch_order, shares

QUICK = TrainConfig(steps=6, batch_size=16, lr=0.05)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_training_learns_and_keeps_curves():
    model, dataset = toy_model(), toy_dataset()
    seen = []
    config = TrainConfig(epochs=6, batch_size=16, lr=0.1, schedule="onecycle")
    history = fit(model, dataset, config, on_progress=seen.append)
    scores = evaluate(model, dataset)
    assert scores["accuracy"] > 0.9
    assert history.epochs[-1]["accuracy"] == scores["accuracy"]
    assert len(history.epochs) == 6
    assert history.steps[-1]["step"] == 36
    assert history.steps[-1]["loss"] < history.steps[0]["loss"]
    assert history.seconds > 0
    json.dumps(history.to_dict())
    assert seen[-1].step == seen[-1].total == 36
    assert seen[-1].seconds_left == 0
    assert seen[-1].samples_per_second > 0


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    results = []
    for seed in (0, 0, 1):
        model = toy_model(drop_rate=0.2)
        fit(model, toy_dataset(), dataclasses.replace(QUICK, seed=seed, augment="strong"))
        results.append(weights(model))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_the_callers_random_numbers_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model = toy_model()
    torch.manual_seed(5)
    fit(model, toy_dataset(), QUICK)
    assert torch.equal(torch.rand(3), expected)


def test_channels_last_is_undone_afterwards():
    model = toy_model()
    fit(model, toy_dataset(), QUICK)
    assert all(p.is_contiguous() for p in model.parameters())


def test_accumulated_micro_batches_equal_one_batch():
    """Without batch norm, which sees one micro-batch at a time."""
    results = []
    for parts in (1, 4):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        fit(model, toy_dataset(), dataclasses.replace(QUICK, grad_accumulation=parts))
        results.append(weights(model))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_plain_torch_datasets_train_too():
    pairs = [(torch.full((4,), float(i % 2)), i % 2) for i in range(32)]
    dataset = SimpleNamespace(task="classification", train=pairs, test=pairs[:8])
    model = nn.Linear(4, 2)
    fit(model, dataset, TrainConfig(epochs=10, batch_size=8, lr=0.5))
    assert evaluate(model, dataset)["accuracy"] == 1.0


def test_a_student_approaches_its_teacher():
    dataset = toy_dataset()
    teacher = toy_model()
    fit(teacher, dataset, TrainConfig(epochs=4, batch_size=16, lr=0.1))
    frozen = weights(teacher).clone()
    torch.manual_seed(3)
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    x = dataset.test.normalized(dataset.test.images)

    def distance() -> float:
        teacher.eval()
        with torch.no_grad():
            return float((student(x).softmax(1) - teacher(x).softmax(1)).abs().mean())

    before = distance()
    config = TrainConfig(epochs=6, batch_size=16, lr=0.05, distill_alpha=1.0)
    fit(student, dataset, config, teacher=teacher)
    assert distance() < 0.6 * before
    assert torch.equal(weights(teacher), frozen)


class Texts:
    """Encoder inputs without targets."""

    def __init__(self, count: int) -> None:
        self.x = torch.randn(count, 6, generator=torch.Generator().manual_seed(count))

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices, **kwargs):
        return (self.x[indices],), None


class Retrieval(Texts):
    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.documents = self.queries = Texts(count)
        self.relevant = torch.arange(count)


def test_a_student_approaches_its_teachers_features():
    dataset, teacher = toy_dataset(), toy_model().eval()
    errors = {}
    for weight in (0.0, 1.0):
        student = toy_model()
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        config = TrainConfig(
            epochs=4,
            batch_size=16,
            optimizer="adamw",
            lr=0.01,
            eval_samples=0,
            distill_alpha=1.0,
            distill_features=("features.?",),
            feature_weight=weight,
        )
        fit(student, dataset, config, teacher=teacher)
        match = FeatureMatch(student.eval(), teacher, ["features.?"])
        images = dataset.train.batch(torch.arange(48)).inputs
        with torch.no_grad():
            student(*images), teacher(*images)
        errors[weight] = float(match.loss())
        match.remove()
        assert not any(module._forward_hooks for module in student.modules())
    assert errors[1.0] < 0.7 * errors[0.0]


def test_features_that_do_not_exist_are_named():
    config = TrainConfig(epochs=1, batch_size=16, distill_features=("feature.?",))
    with pytest.raises(ValueError, match=r"'feature\.\?'; nearest: .*features"):
        fit(toy_model(), toy_dataset(), config, teacher=toy_model())
    with pytest.raises(ValueError, match="expected a teacher"):
        fit(toy_model(), toy_dataset(), config)


def test_an_encoder_learns_from_embeddings_alone():
    dataset = SimpleNamespace(task="distillation", train=Texts(64), test=Retrieval(20))
    teacher, student = nn.Linear(6, 4), nn.Linear(6, 4)
    with pytest.raises(ValueError, match="teacher"):
        fit(student, dataset, QUICK)
    config = TrainConfig(epochs=30, batch_size=16, lr=0.5)
    history = fit(student, dataset, config, teacher=teacher)
    assert history.steps[-1]["loss"] < 0.05
    scores = evaluate(student, dataset)
    assert scores["recall@1"] == scores["mrr"] == 1.0


def test_a_constant_encoder_finds_nothing():
    dataset = SimpleNamespace(task="distillation", test=Retrieval(20))
    constant = nn.Linear(6, 4)
    nn.init.zeros_(constant.weight)
    scores = evaluate(constant, dataset)
    assert scores == {"recall@1": 0.0, "recall@10": 0.0, "mrr": 1 / 20}


def test_evaluation_leaves_the_mode_and_counts_every_sample():
    model, dataset = toy_model().train(), toy_dataset()
    whole = evaluate(model, dataset)
    assert model.training
    parts = evaluate(model, dataset, batch_size=7)
    assert parts["accuracy"] == whole["accuracy"]
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    with pytest.raises(ValueError, match="segmentation"):
        evaluate(model, SimpleNamespace(task="segmentation", test=dataset.test))


def test_callbacks_see_the_run():
    calls: list[tuple[str, int]] = []

    class Seen(Callback):
        def on_train_begin(self, run):
            calls.append(("begin", run.step))

        def on_optimizer_step(self, run):
            calls.append(("step", run.step))

        def on_epoch_end(self, run):
            calls.append(("epoch", run.epoch))

        def on_train_end(self, run):
            calls.append(("end", run.step))

    fit(toy_model(), toy_dataset(), dataclasses.replace(QUICK, steps=8), callbacks=[Seen()])
    assert calls[0] == ("begin", 0)
    assert [c for c in calls if c[0] == "step"] == [("step", n) for n in range(1, 9)]
    assert [c for c in calls if c[0] == "epoch"] == [("epoch", 0), ("epoch", 1)]
    assert calls[-1] == ("end", 8)


def test_a_state_of_another_run_is_refused(tmp_path: Path):
    fit(toy_model(), toy_dataset(), QUICK, resume_dir=tmp_path)
    other = dataclasses.replace(QUICK, lr=0.01)
    with pytest.raises(ValueError, match=r"lr is 0\.01, was 0\.05"):
        fit(toy_model(), toy_dataset(), other, resume_dir=tmp_path)


def test_a_finished_run_returns_its_curves_again(tmp_path: Path):
    first = fit(toy_model(), toy_dataset(), QUICK, resume_dir=tmp_path)
    model = toy_model()
    again = fit(model, toy_dataset(), QUICK, resume_dir=tmp_path)
    assert again.to_dict() == first.to_dict()


def test_a_loss_that_explodes_is_an_error():
    with pytest.raises(FloatingPointError, match="gradient_clip"):
        fit(toy_model(), toy_dataset(), TrainConfig(steps=30, batch_size=16, lr=1e5, warmup=0.0))


def test_a_batch_larger_than_the_data_is_an_error():
    with pytest.raises(ValueError, match="96 training samples"):
        fit(toy_model(), toy_dataset(), TrainConfig(batch_size=100))


def test_biases_and_norms_are_not_decayed():
    model = toy_model()
    decayed, plain = make_optimizer(model, QUICK).param_groups
    assert plain["weight_decay"] == 0
    assert all(p.dim() > 1 for p in decayed["params"])
    assert all(p.dim() == 1 for p in plain["params"])


def test_sparsity_counts_what_pruning_may_touch():
    model = toy_model()
    names = [name for name, _ in model.prune_targets()]
    with torch.no_grad():
        model.get_submodule(names[0]).weight.zero_()
    sizes = [model.get_submodule(name).weight.numel() for name in names]
    assert zero_fraction(model) == pytest.approx(sizes[0] / sum(sizes))


def test_texts_of_like_length_share_a_batch():
    lengths = torch.randint(1, 50, (1037,), generator=torch.Generator().manual_seed(0))
    order = epoch_order(1037, 0, 0, 16, lengths)
    assert sorted(order.tolist()) == list(range(1037))
    batches = lengths[order[:1024]].view(-1, 16)
    spread = (batches.max(1).values - batches.min(1).values).float()
    assert spread.median() <= 3
    means = batches.float().mean(1)
    assert (means[:20] - means[20:40]).abs().mean() > 1  # batches are not in order of length
    assert not torch.equal(order, epoch_order(1037, 0, 1, 16, lengths))


@pytest.mark.parametrize("parts", [1, 2])
def test_global_batches_do_not_depend_on_the_number_of_processes(parts: int):
    order = epoch_order(64, seed=1, epoch=2)
    for step in range(4):
        whole = torch.cat(shares(order, step, 16, 0, 1, parts))
        for world in (2, 4):
            ranks = [shares(order, step, 16, rank, world, parts) for rank in range(world)]
            pieces = [torch.cat(micro) for micro in zip(*ranks, strict=True)]
            assert torch.equal(torch.cat(pieces), whole)
    assert sorted(order.tolist()) == list(range(64))


def test_the_learning_rate_rises_and_falls():
    config = TrainConfig(lr=0.2, warmup=0.25)
    rates = [config.lr_at(step, 100) for step in range(100)]
    assert max(rates) == pytest.approx(0.2, rel=0.01)
    assert rates.index(max(rates)) in (24, 25)
    assert rates == rates[:25] + sorted(rates[25:], reverse=True)
    assert rates[-1] < 0.001
    cycle = dataclasses.replace(config, schedule="onecycle")
    assert cycle.momentum_at(25, 100) == pytest.approx(0.85, abs=1e-3)
    assert cycle.momentum_at(99, 100) == pytest.approx(0.95, abs=1e-3)
    flat = dataclasses.replace(config, schedule="constant", warmup=0.0)
    assert {flat.lr_at(step, 100) for step in range(100)} == {0.2}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("optimizer", "sdg"),
        ("schedule", "linear"),
        ("lr", 0.0),
        ("lr", math.nan),
        ("label_smoothing", 1.5),
        ("distill_alpha", -0.1),
        ("temperature", 0.0),
        ("gradient_clip", 0.0),
        ("grad_accumulation", 3),
    ],
)
def test_bad_settings_are_named(field: str, value: object):
    with pytest.raises(ValueError, match=field):
        TrainConfig(**{field: value})
