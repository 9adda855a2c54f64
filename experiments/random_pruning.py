"""Randomly pruned perceptrons of growing width against dense ones and uniform densities.

Fashion-MNIST, 6,000 training images pooled to 14x14, all 10,000 test images. A perceptron
196-w-w-10 with He-normal weights is pruned before training, at 5 % density. Every network trains
for the same 700 steps on the same batches of 100: SGD with Nesterov momentum 0.9, weight decay
5e-4, learning rate 0.05, divided by 10 at 1/2 and 3/4.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import small_fashion
from aerogel import data
from aerogel.insight import expected_calibration_error, fgsm_accuracy, ood_auroc
from aerogel.pruning import StaticSparseTrainer, layerwise_report, random_prune
from aerogel.report.evidence import Claim, Result, as_script, mean
from aerogel.sparsity import MaskSet

SLUG = "random-pruning"
SEEDS = (0, 1, 2)

TRAIN_IMAGES = 6_000
STEPS, BATCH = 700, 100
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 5e-4
WIDTHS = (24, 64, 192, 512)
DENSITY, MILD_DENSITY = 0.05, 0.3
MILD_WIDTH = 192
ATTACK = 8 / 255  # of the grey values


def run(seed: int) -> Result:
    """Train every variant once; test accuracy in per cent."""
    started = time.perf_counter()
    metrics: dict[str, float] = {}
    notes: list[str] = []
    for width in WIDTHS:
        dense = _train(_network(width, seed), seed)
        metrics[f"dense, w={width}"] = _accuracy(dense)
        for density in (DENSITY, MILD_DENSITY) if width == MILD_WIDTH else (DENSITY,):
            for allocation in ("erk", "uniform"):
                name = f"{allocation} {density:.0%}, w={width}"
                model, note = _pruned(width, density, allocation, seed)
                metrics[name] = _accuracy(model)
                notes.append(f"{name}: {note}")
                if density == MILD_DENSITY and allocation == "erk":
                    metrics |= _beyond_accuracy(dense, f"dense, w={width}")
                    metrics |= _beyond_accuracy(model, name)
    return Result(
        SLUG, seed, metrics, time.perf_counter() - started, tuple(notes if seed == 0 else ())
    )


def claims(results: Sequence[Result]) -> list[Claim]:
    """The thresholds, on the means over seeds."""

    def gap(width: int) -> float:
        return mean(results, f"dense, w={width}") - mean(results, f"erk 5%, w={width}")

    def closes(wide: int, narrow: int, threshold: float, text: str) -> Claim:
        return Claim(
            text=text,
            ours=gap(wide),
            baseline=gap(narrow),
            threshold=threshold,
            paper="at 80 % zeros ResNet-20 loses 2.4 points, ResNet-110 at 60-70 % none",
            unit="points below dense",
            higher_is_better=False,
        )

    def compares(ours: str, baseline: str, threshold: float, paper: str) -> Claim:
        return Claim(
            text=f"{ours} against {baseline}",
            ours=mean(results, ours),
            baseline=mean(results, baseline),
            threshold=threshold,
            paper=paper,
            unit="% test accuracy",
        )

    erk = "ResNet-20 at 90 %: ERK 87.8, uniform 86.3"
    strictly = 1e-6
    return [
        closes(64, 24, strictly, "gap to dense at w=64 below that at w=24"),
        closes(192, 64, strictly, "gap to dense at w=192 below that at w=64"),
        closes(192, 24, 12.0, "gap to dense at w=192 far below that at w=24"),
        compares("erk 5%, w=64", "uniform 5%, w=64", 5.0, erk),
        compares("erk 5%, w=24", "uniform 5%, w=24", 8.0, erk),
        compares("erk 30%, w=192", "dense, w=192", -1.5, "within the dense band when wide enough"),
    ]


def _network(width: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(196, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )
    for layer in model[::2]:
        nn.init.kaiming_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def _pruned(width: int, density: float, allocation: str, seed: int) -> tuple[nn.Module, str]:
    """A pruned and trained network, and what was pruned."""
    model = _network(width, seed)
    source = torch.Generator().manual_seed(seed)
    masks = random_prune(model, density, allocation=allocation, generator=source)
    report = layerwise_report(masks, model, torch.zeros(1, 196))
    layers = ", ".join(f"{layer.density:.3f}" for layer in report.layers)
    note = f"layer densities {layers}; {report.dead_rows} dead units"
    return _train(model, seed, masks), note


def _train(model: nn.Module, seed: int, masks: MaskSet | None = None) -> nn.Module:
    images, labels, *_ = small_fashion.load(TRAIN_IMAGES)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=LEARNING_RATE,
        momentum=MOMENTUM,
        nesterov=True,
        weight_decay=WEIGHT_DECAY,
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [STEPS // 2, 3 * STEPS // 4])
    stepper = optimizer if masks is None else StaticSparseTrainer(model, optimizer, masks)
    generator = torch.Generator().manual_seed(seed)
    batches: list[Tensor] = []
    for _ in range(STEPS):
        if not batches:
            batches = list(torch.randperm(TRAIN_IMAGES, generator=generator).split(BATCH))
        chosen = batches.pop()
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        stepper.step()
        schedule.step()
    if isinstance(stepper, StaticSparseTrainer):
        stepper.finalize()
    return model


def _beyond_accuracy(model: nn.Module, name: str) -> dict[str, float]:
    """Calibration, detection of other data (handwritten digits), and robustness."""
    _, _, images, labels = small_fashion.load(TRAIN_IMAGES)
    like = data.load("fashion-mnist").train
    digits = data.digits.load(28).train
    with torch.no_grad():
        probabilities = model(images).softmax(dim=1)
        others = model(small_fashion.pooled(digits.images, like).flatten(1)).softmax(dim=1)
    attacked = fgsm_accuracy(model, images, labels, ATTACK / like.std[0])
    return {
        f"{name}: calibration error": 100.0 * expected_calibration_error(probabilities, labels),
        f"{name}: negative log-likelihood": float(F.nll_loss(probabilities.log(), labels)),
        f"{name}: AUROC against digits": 100.0
        * ood_auroc(probabilities.amax(dim=1), others.amax(dim=1)),
        f"{name}: accuracy under FGSM 8/255": 100.0 * attacked,
    }


def _accuracy(model: nn.Module) -> float:
    return small_fashion.accuracy(model, small_fashion.load(TRAIN_IMAGES))


if __name__ == "__main__":
    as_script(run, claims, SEEDS)
