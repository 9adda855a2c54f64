"""Gradual pruning against a small dense network of as many weights, and against one-shot pruning.

Fashion-MNIST, 6,000 training images pooled to 14x14, all 10,000 test images. A multilayer
perceptron 196-256-128-10 is pruned to 95 % and 98 % zeros while it trains. Every network trains for
the same 900 steps on the same batches: SGD, learning rate 0.1 to 0 along a cosine, momentum 0.9,
weight decay 1e-4, batch 100.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aerogel import data
from aerogel.pruning import GradualPruner
from aerogel.report.evidence import Claim, Result, as_script, mean
from aerogel.sparsity import (
    Frozen,
    MaskController,
    OneShot,
    Rebuild,
    build_masks,
    compute_scores,
    select_parameters,
)

SLUG = "gradual-pruning"
SEEDS = (0, 1, 2)

TRAIN_IMAGES = 6_000
STEPS, BATCH = 900, 100
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 1e-4
HIDDEN = (256, 128)
BEGIN, END, EVERY = 150, 600, 30
SPARSITIES = (0.95, 0.98)

Wrapper = Callable[[nn.Module, torch.optim.Optimizer], "GradualPruner | MaskController"]


def run(seed: int) -> Result:
    """Train every variant once and measure its test accuracy in per cent."""
    started = time.perf_counter()
    images, labels, test_images, test_labels = _data()
    metrics: dict[str, float] = {}

    def measure(name: str, widths: tuple[int, int], wrapper: Wrapper | None = None) -> nn.Module:
        model = _train(_network(widths, seed), images, labels, seed, wrapper)
        metrics[name] = _accuracy(model, test_images, test_labels)
        return model

    dense = measure("dense", HIDDEN)
    for sparsity in SPARSITIES:
        zeros = f"{sparsity:.0%}"
        measure(f"gradual {zeros}", HIDDEN, _gradual(sparsity))
        measure(f"small dense {zeros}", _small_widths(sparsity))
        measure(f"one-shot at step {END} {zeros}", HIDDEN, _one_shot(sparsity))
        _prune_now(model := _copy(dense), sparsity)
        metrics[f"one-shot at the end {zeros}"] = _accuracy(model, test_images, test_labels)
    return Result(SLUG, seed, metrics, time.perf_counter() - started, (_about_small(),))


def claims(results: Sequence[Result]) -> list[Claim]:
    """The thresholds, on the means over seeds."""
    better = "large-sparse consistently outperforms small-dense (abstract)"
    one_shot = f"one-shot at step {END}"
    wanted = [
        ("95%", "small dense 95%", 0.4, better),
        ("98%", "small dense 98%", 0.8, better),
        ("95%", f"{one_shot} 95%", 1.5, ""),
        ("98%", f"{one_shot} 98%", 4.0, ""),
        ("95%", "dense", -1.5, "up to 10x fewer weights at minimal loss (abstract)"),
    ]
    return [
        Claim(
            text=f"gradual at {zeros} zeros against {baseline}",
            ours=mean(results, f"gradual {zeros}"),
            baseline=mean(results, baseline),
            threshold=threshold,
            paper=figure,
            unit="% test accuracy",
        )
        for zeros, baseline, threshold, figure in wanted
    ]


@lru_cache(maxsize=1)
def _data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dataset = data.load("fashion-mnist")

    def pooled(split: data.ImageSplit, count: int) -> Tensor:
        mean, std = split.mean[0], split.std[0]
        small = F.avg_pool2d(split.images[:count].float() / 255.0, 2)
        return ((small - mean) / std).flatten(1)

    train, test = dataset.train, dataset.test
    return (
        pooled(train, TRAIN_IMAGES),
        train.labels[:TRAIN_IMAGES],
        pooled(test, len(test)),
        test.labels,
    )


def _network(widths: tuple[int, int], seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    first, second = widths
    return nn.Sequential(
        nn.Linear(196, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 10)
    )


def _train(
    model: nn.Module, images: Tensor, labels: Tensor, seed: int, wrapper: Wrapper | None
) -> nn.Module:
    optimizer = torch.optim.SGD(
        model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    stepper = None if wrapper is None else wrapper(model, optimizer)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    generator = torch.Generator().manual_seed(seed)
    batches: list[Tensor] = []
    for _ in range(STEPS):
        if not batches:
            batches = list(torch.randperm(len(images), generator=generator).split(BATCH))
        chosen = batches.pop()
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        (stepper or optimizer).step()
        schedule.step()
    if stepper is not None:
        stepper.finalize()
    return model


def _gradual(sparsity: float) -> Wrapper:
    return lambda model, optimizer: GradualPruner(
        model, optimizer, sparsity, begin_step=BEGIN, end_step=END, frequency=EVERY
    )


def _one_shot(sparsity: float) -> Wrapper:
    """Dense until the step at which the gradual ramp ends, then all at once, then training on."""
    return lambda model, optimizer: MaskController(
        model,
        optimizer,
        select_parameters(model),
        Frozen(),
        "uniform",
        OneShot(END, sparsity),
        Rebuild(),
    )


def _prune_now(model: nn.Module, sparsity: float) -> None:
    scores = compute_scores(select_parameters(model), "magnitude")
    build_masks(scores, 1.0 - sparsity).apply_(model)


def _copy(model: nn.Module) -> nn.Module:
    copy = _network(HIDDEN, 0)
    copy.load_state_dict(model.state_dict())
    return copy


def _weights(widths: tuple[int, int]) -> int:
    first, second = widths
    return 196 * first + first * second + second * 10


def _small_widths(sparsity: float) -> tuple[int, int]:
    """The narrowest network of widths (w, half of w) with at least as many weights as are kept."""
    kept = _weights(HIDDEN) * (1.0 - sparsity)
    widths = ((w, (w + 1) // 2) for w in range(2, HIDDEN[0]))
    return next(pair for pair in widths if _weights(pair) >= kept)


def _about_small() -> str:
    parts = []
    for sparsity in SPARSITIES:
        widths = _small_widths(sparsity)
        kept = round(_weights(HIDDEN) * (1.0 - sparsity))
        parts.append(
            f"at {sparsity:.0%} 196-{widths[0]}-{widths[1]}-10 with {_weights(widths)} "
            f"weights for {kept} kept"
        )
    return "Small dense: " + ", ".join(parts) + "."


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return 100.0 * (model(images).argmax(dim=1) == labels).float().mean().item()


if __name__ == "__main__":
    as_script(run, claims, SEEDS)
