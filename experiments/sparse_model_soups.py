"""Soups of copies retrained from one pruned network against the copies themselves.

Fashion-MNIST, 5,000 training images pooled to 14x14, the first 3,000 test images; a convolutional
network with batch norm (16, 32 with stride 2, 32 channels, mean pooling). SGD, Nesterov momentum
0.9, weight decay 1e-4, batch 100: 300 steps from 0.2 down to 0, then two cycles of global magnitude
pruning to 90 %, in each three copies of 120 steps (LLR, peak 0.2) that differ in the order of their
batches. Batch norm is re-estimated on 1,000 training images for copies and soups alike.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

import small_fashion
from aerogel.pruning import SparseModelSoups
from aerogel.pruning.sparse_model_soups import Variation
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
)

SLUG = "sparse-model-soups"
SEEDS = (0, 1, 2)

TRAIN_IMAGES, TEST_IMAGES = 5_000, 3_000
PEAK, DENSE_STEPS, STEPS = 0.2, 300, 120
SPARSITY, CYCLES, COPIES = 0.9, 2, 3
ORIGINAL = [PEAK * (1 - step / DENSE_STEPS) for step in range(DENSE_STEPS)]


def run(seed: int) -> Result:
    """Train, cook two soups of three copies, and one of networks pruned separately."""
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
        bn_fraction=1.0,
        seed=100 * seed,
    )
    probe = copy.deepcopy(dense)
    for number, cycle in enumerate(soups.run().cycles, start=1):
        copies = []
        for state in cycle.ingredients:
            probe.load_state_dict(state)
            copies.append(_score(probe, images))
        probe.load_state_dict(cycle.soup)
        accuracy, loss = _score(probe, images)
        metrics |= {
            f"cycle {number}: soup accuracy": accuracy,
            f"cycle {number}: copies' accuracy": statistics.mean(a for a, _ in copies),
            f"cycle {number}: soup loss": loss,
            f"cycle {number}: copies' loss": statistics.mean(each for _, each in copies),
        }
    metrics["pruned separately: soup accuracy"] = _separate(dense, images, seed)
    return Result(SLUG, seed, metrics, time.perf_counter() - started, _intervals(metrics))


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
            text="soup of one mask against a soup of networks pruned separately",
            ours=mean(results, f"cycle {CYCLES}: soup accuracy"),
            baseline=mean(results, "pruned separately: soup accuracy"),
            threshold=5.0,
            unit="% test accuracy",
        ),
    ]


def _intervals(metrics: dict[str, float]) -> tuple[str, ...]:
    gains = [
        metrics[f"cycle {n}: soup accuracy"] - metrics[f"cycle {n}: copies' accuracy"]
        for n in range(1, CYCLES + 1)
    ]
    return (f"Accuracy gained by cycle: {', '.join(f'{gain:+.2f}' for gain in gains)} points.",)


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
    model: nn.Module, masks: MaskSet | None, images: small_fashion.Images, seed: int
) -> nn.Module:
    optimizer = _optimizer(model)
    rate = RetrainingLR(optimizer, retraining_curve("LLR", ORIGINAL, STEPS))

    def hold(model: nn.Module, optimizer: torch.optim.Optimizer) -> MaskController:
        return MaskController(model, optimizer, select_parameters(model), "hard", masks=masks)

    controller = small_fashion.train(
        model,
        images,
        optimizer,
        STEPS,
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
    recalibrate_batchnorm(model, _batches(images), 1.0)
    return _score(model, images)[0]


def _batches(images: small_fashion.Images) -> list[torch.Tensor]:
    return list(images.train[:1_000].split(100))


@torch.no_grad()
def _score(model: nn.Module, images: small_fashion.Images) -> tuple[float, float]:
    """Test accuracy in per cent, and cross-entropy."""
    model.eval()
    logits = model(images.test)
    loss = float(F.cross_entropy(logits, images.test_labels))
    return 100.0 * float((logits.argmax(1) == images.test_labels).float().mean()), loss
