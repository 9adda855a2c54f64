"""Soups of copies retrained from one pruned network against the copies themselves.

Fashion-MNIST, 5,000 training images pooled to 14x14, the first 3,000 test images; a convolutional
network with batch norm (16, 32 with stride 2, 32 channels, mean pooling). SGD, Nesterov momentum
0.9, weight decay 1e-4, batch 100: 300 steps from 0.2 down to 0, then two cycles of global magnitude
pruning to 90 %, in each three copies of 120 steps (LLR, peak 0.2) that differ in the order of their
batches. Batch norm is re-estimated on a fifth of the training images for copies and soups alike.

Beside them: pruning and retraining without averaging ("IMP"), once for every copy ("repeated") and
once with as many steps in each cycle as all copies together ("longer"); the mean of the copies'
predicted probabilities ("ensemble"); and accuracy under 14 common corruptions of the first 1,000
test images, at 28x28 pixels before they are pooled, mean over five severities.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import small_fashion
from aerogel import data
from aerogel.insight import (
    corruption_accuracy,
    expected_calibration_error,
    maximum_calibration_error,
    worst_class_accuracy,
)
from aerogel.pruning import SparseModelSoups
from aerogel.pruning.sparse_model_soups import CycleResult, Variation
from aerogel.report.evidence import Claim, Result, mean
from aerogel.sparsity import (
    MaskController,
    MaskSet,
    RetrainingLR,
    average_models,
    magnitude_,
    recalibrate_batchnorm,
    retraining_curve,
    select_parameters,
    soup_distance,
)

SLUG = "sparse-model-soups"
SEEDS = (0, 1, 2)

TRAIN_IMAGES, TEST_IMAGES, CORRUPTED_IMAGES = 5_000, 3_000, 1_000
PEAK, DENSE_STEPS, STEPS = 0.2, 300, 120
SPARSITY, CYCLES, COPIES = 0.9, 2, 3
# Batch norm is re-estimated on this share of the training images, as in the paper.
BATCH, BN_FRACTION = 100, 0.2
ORIGINAL = [PEAK * (1 - step / DENSE_STEPS) for step in range(DENSE_STEPS)]


def run(seed: int) -> Result:
    """Train, cook two soups of three copies, and compare with what else the steps could buy."""
    started = time.perf_counter()
    images = small_fashion.load(TRAIN_IMAGES, TEST_IMAGES, flat=False)
    dense = _dense(images, seed)
    metrics = {"dense: accuracy": _score(dense, images)[0]}

    def retrain(model: nn.Module, masks: MaskSet, variation: Variation) -> nn.Module:
        return _retrained(model, masks, images, variation.seed)

    soups = SparseModelSoups(
        dense,
        retrain,
        sparsity=SPARSITY,
        cycles=CYCLES,
        copies=COPIES,
        batches=_batches(images),
        bn_fraction=BN_FRACTION,
        seed=100 * seed,
    )
    cycles = soups.run().cycles
    for number, cycle in enumerate(cycles, start=1):
        metrics |= _cycle_metrics(f"cycle {number}", cycle, dense, images)
    last = cycles[-1]
    copies = [_loaded(dense, state) for state in last.ingredients]
    rivals = {
        # After the first cycle copies and repetitions are the same networks.
        f"repeated IMP {index}": _imp(_loaded(dense, state), images, 1000 + 100 * seed + index, 1)
        for index, state in enumerate(cycles[0].ingredients)
    }
    rivals["longer IMP"] = _imp(dense, images, 2000 + seed, CYCLES, COPIES)
    metrics |= {f"{name}: accuracy": _score(each, images)[0] for name, each in rivals.items()}
    metrics["ensemble: accuracy"] = _ensemble(copies, images)
    named = {"soup": _loaded(dense, last.soup), "dense": dense, **rivals}
    named |= {f"copy {index}": each for index, each in enumerate(copies)}
    metrics |= _corrupted(named)
    metrics["pruned separately: soup accuracy"] = _separate(dense, images, seed)
    return Result(SLUG, seed, metrics, time.perf_counter() - started, _notes(metrics))


def claims(results: Sequence[Result]) -> list[Claim]:
    """The thresholds: of every cycle and repetition, and on their means."""
    cycles = [f"cycle {number}" for number in range(1, CYCLES + 1)]
    losses = [
        (r.metrics[f"{cycle}: soup loss"], r.metrics[f"{cycle}: copies' loss"])
        for r in results
        for cycle in cycles
    ]
    worst = max(losses, key=lambda pair: pair[0] - pair[1])
    paper = "soups beat the best single model; about a point at 90 to 98 %"
    return [
        Claim(
            text="soup's test loss against its copies' mean, the worst cycle and seed",
            ours=worst[0],
            baseline=worst[1],
            threshold=1e-9,
            unit="cross-entropy",
            higher_is_better=False,
        ),
        Claim(
            text="soup's test loss against its copies' mean",
            ours=statistics.mean(ours for ours, _ in losses),
            baseline=statistics.mean(theirs for _, theirs in losses),
            threshold=0.003,
            unit="cross-entropy",
            higher_is_better=False,
        ),
        Claim(
            text="soup's accuracy against its copies' mean",
            ours=statistics.mean(mean(results, f"{c}: soup accuracy") for c in cycles),
            baseline=statistics.mean(mean(results, f"{c}: copies' accuracy") for c in cycles),
            threshold=0.0,
            unit="% test accuracy",
            paper=paper,
        ),
        Claim(
            text="soup's accuracy under common corruptions against its copies' mean",
            ours=mean(results, "corrupted: soup"),
            baseline=mean(results, "corrupted: copies"),
            threshold=0.0,
            unit="% accuracy, mean over 14 corruptions at 5 severities",
            paper="soups gain on CIFAR-C too",
        ),
        Claim(
            text="soup of one mask against a soup of networks pruned separately",
            ours=mean(results, f"cycle {CYCLES}: soup accuracy"),
            baseline=mean(results, "pruned separately: soup accuracy"),
            threshold=5.0,
            unit="% test accuracy",
        ),
    ]


def _notes(metrics: dict[str, float]) -> tuple[str, ...]:
    gains = [
        metrics[f"cycle {n}: soup accuracy"] - metrics[f"cycle {n}: copies' accuracy"]
        for n in range(1, CYCLES + 1)
    ]
    soup = metrics[f"cycle {CYCLES}: soup accuracy"]
    repeated = [metrics[f"repeated IMP {index}: accuracy"] for index in range(COPIES)]
    longer = metrics["longer IMP: accuracy"]
    return (
        f"Accuracy gained by cycle: {', '.join(f'{gain:+.2f}' for gain in gains)} points.",
        f"The last soup against repeated IMP: {soup - statistics.mean(repeated):+.2f} points on "
        f"its mean, {soup - max(repeated):+.2f} on its best; against one network retrained as "
        f"long as all copies together: {soup - longer:+.2f}.",
    )


def _cycle_metrics(
    label: str, cycle: CycleResult, like: nn.Module, images: small_fashion.Images
) -> dict[str, float]:
    """The soup, the mean and the best of its copies, and how far the copies lie apart."""
    copies = [_judged(_loaded(like, state), images) for state in cycle.ingredients]
    pairs = [soup_distance(a, b) for a, b in combinations(cycle.ingredients, 2)]
    metrics = {
        f"{label}: soup {name}": value
        for name, value in _judged(_loaded(like, cycle.soup), images).items()
    }
    metrics |= {
        f"{label}: copies' {name}": statistics.mean(each[name] for each in copies)
        for name in copies[0]
    }
    metrics[f"{label}: best copy's accuracy"] = max(each["accuracy"] for each in copies)
    metrics[f"{label}: distance of copies"] = statistics.mean(p.l2 for p in pairs)
    metrics[f"{label}: angle of copies"] = statistics.mean(math.degrees(p.angle) for p in pairs)
    return metrics


def _loaded(like: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    model = copy.deepcopy(like)
    model.load_state_dict(state)
    return model.eval()


@torch.no_grad()
def _judged(model: nn.Module, images: small_fashion.Images) -> dict[str, float]:
    accuracy, loss = _score(model, images)
    probabilities = model(images.test).softmax(1)
    labels = images.test_labels
    return {
        "accuracy": accuracy,
        "loss": loss,
        "worst class": 100.0 * worst_class_accuracy(probabilities.argmax(1), labels),
        "calibration error": 100.0 * expected_calibration_error(probabilities, labels),
        "largest calibration error": 100.0 * maximum_calibration_error(probabilities, labels),
    }


@torch.no_grad()
def _ensemble(models: Sequence[nn.Module], images: small_fashion.Images) -> float:
    mixed = torch.stack([model(images.test).softmax(1) for model in models]).mean(0)
    return 100.0 * float((mixed.argmax(1) == images.test_labels).float().mean())


def _imp(
    start: nn.Module, images: small_fashion.Images, seed: int, cycles: int, times: int = 1
) -> nn.Module:
    """The last cycles of pruning and retraining one network, `times` as long as a copy."""
    model = copy.deepcopy(start)
    share = (1.0 - SPARSITY) ** (1.0 / CYCLES)
    for cycle in range(CYCLES - cycles + 1, CYCLES + 1):
        masks = magnitude_(model, 1.0 - share**cycle, scope="global")
        _retrained(model, masks, images, seed + 10 * cycle, times * STEPS)
        recalibrate_batchnorm(model, _batches(images), BN_FRACTION)
    return model.eval()


def _corrupted(models: Mapping[str, nn.Module]) -> dict[str, float]:
    """Accuracy on corrupted test images, in per cent; of the soup and its copies by corruption."""
    split = data.load("fashion-mnist").test
    found = corruption_accuracy(
        {
            name: lambda bad, model=model: model(small_fashion.pooled(bad, split))
            for name, model in models.items()
        },
        split.images[:CORRUPTED_IMAGES],
        split.labels[:CORRUPTED_IMAGES],
    )
    means = {
        name: {corruption: 100.0 * statistics.mean(each) for corruption, each in by.items()}
        for name, by in found.items()
    }
    copies = [means.pop(f"copy {index}") for index in range(COPIES)]
    means["copies"] = {c: statistics.mean(each[c] for each in copies) for c in copies[0]}
    metrics = {f"corrupted: {name}": statistics.mean(by.values()) for name, by in means.items()}
    metrics["corrupted: best copy"] = max(statistics.mean(by.values()) for by in copies)
    for name in ("soup", "copies"):
        metrics |= {f"{each}: {name}": value for each, value in means[name].items()}
    return metrics


class _Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__()
        channels = 1
        for index, (width, stride) in enumerate(((16, 1), (32, 2), (32, 1))):
            self.add_module(f"conv{index}", nn.Conv2d(channels, width, 3, stride, 1, bias=False))
            self.add_module(f"norm{index}", nn.BatchNorm2d(width))
            self.add_module(f"relu{index}", nn.ReLU())
            channels = width
        self.add_module("pool", nn.AdaptiveAvgPool2d(1))
        self.add_module("flat", nn.Flatten())
        self.add_module("head", nn.Linear(channels, 10))


def _optimizer(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), PEAK, 0.9, weight_decay=1e-4, nesterov=True)


def _dense(images: small_fashion.Images, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = _Net()
    optimizer = _optimizer(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / DENSE_STEPS)
    small_fashion.train(
        model,
        images,
        optimizer,
        DENSE_STEPS,
        seed=seed,
        cosine=False,
        on_step=lambda _: schedule.step(),
    )
    return model


def _retrained(
    model: nn.Module,
    masks: MaskSet | None,
    images: small_fashion.Images,
    seed: int,
    steps: int = STEPS,
) -> nn.Module:
    optimizer = _optimizer(model)
    rate = RetrainingLR(optimizer, retraining_curve("LLR", ORIGINAL, steps))

    def hold(model: nn.Module, optimizer: torch.optim.Optimizer) -> MaskController:
        return MaskController(model, optimizer, select_parameters(model), "hard", masks=masks)

    controller = small_fashion.train(
        model,
        images,
        optimizer,
        steps,
        seed=seed,
        wrapper=None if masks is None else hold,
        cosine=False,
        on_step=lambda _: rate.step(),
    )
    if controller is not None:
        controller.finalize()
    return model


def _separate(dense: nn.Module, images: small_fashion.Images, seed: int) -> float:
    """Two copies trained on densely, pruned each by itself, retrained, averaged, pruned again."""
    states = []
    for index in range(2):
        model = _retrained(copy.deepcopy(dense), None, images, 100 * seed + 50 + index)
        masks = magnitude_(model, SPARSITY, scope="global")
        states.append(_retrained(model, masks, images, 100 * seed + 60 + index).state_dict())
    everything = MaskSet.ones(select_parameters(dense))
    model = copy.deepcopy(dense)
    model.load_state_dict(average_models(states, masks=everything))
    magnitude_(model, SPARSITY, scope="global")
    recalibrate_batchnorm(model, _batches(images), BN_FRACTION)
    return _score(model, images)[0]


def _batches(images: small_fashion.Images) -> list[torch.Tensor]:
    return list(images.train.split(BATCH))


@torch.no_grad()
def _score(model: nn.Module, images: small_fashion.Images) -> tuple[float, float]:
    """Test accuracy in per cent, and cross-entropy."""
    model.eval()
    logits = model(images.test)
    loss = float(F.cross_entropy(logits, images.test_labels))
    return 100.0 * float((logits.argmax(1) == images.test_labels).float().mean()), loss
