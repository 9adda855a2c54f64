"""A perceptron widened at equal cost and trained sparse, against the dense one.

Fashion-MNIST, 6,000 training images pooled to 14x14, all 10,000 test images; a multilayer
perceptron 196-16-16-10. Sparse Wide widens the hidden layers by sqrt(1 / (1 - s)) and masks all
layers at one density, so that FLOPs (and with them weights) are the dense network's. SGD, learning
rate 0.1 to 0 along a cosine, Nesterov momentum 0.9, weight decay 5e-4, batch 100, 900 steps, alike
for all; RigL updates its mask every 30.

The input cannot widen, so a sparser network starves its first layer: gains that grow with the
sparsity, as the paper has them, are not claimed here.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import nn

import small_fashion
from aerogel.pruning import RigL, SparseWide
from aerogel.report.evidence import Claim, Result, mean
from aerogel.sparsity import MaskController, select_parameters

SLUG = "sparse-ift"
SEEDS = (0, 1, 2, 3, 4)

WIDTH, STEPS, UPDATE_EVERY = 16, 900, 30
SPARSITIES = (0.5, 0.75, 0.9)


def run(seed: int) -> Result:
    """Train the dense network, and at every sparsity one with a fixed mask and one with RigL."""
    started = time.perf_counter()
    images = small_fashion.load()
    metrics = {"dense": _trained(images, seed, None, False)}
    for sparsity in SPARSITIES:
        metrics[f"static {sparsity:g}"] = _trained(images, seed, sparsity, False)
        metrics[f"RigL {sparsity:g}"] = _trained(images, seed, sparsity, True)
    return Result(SLUG, seed, metrics, time.perf_counter() - started)


def claims(results: Sequence[Result]) -> list[Claim]:
    """The thresholds, on the means over seeds."""
    paper = "ResNet-18 on ImageNet +3.5 % (Sparse Wide 90 %, RigL; abstract)"
    found = [_against(results, "RigL 0.5", "dense", 0.2, paper)]
    for sparsity in SPARSITIES:
        ours, fixed = f"RigL {sparsity:g}", f"static {sparsity:g}"
        found.append(_against(results, ours, fixed, -0.2, "RigL above static masks"))
    return found


def _against(
    results: Sequence[Result], ours: str, baseline: str, threshold: float, paper: str
) -> Claim:
    return Claim(
        text=f"{ours} against {baseline}",
        ours=mean(results, ours),
        baseline=mean(results, baseline),
        threshold=threshold,
        unit="% test accuracy",
        paper=paper,
    )


def _trained(
    images: small_fashion.Images, seed: int, sparsity: float | None, moving: bool
) -> float:
    """Test accuracy, in per cent."""

    def factory(width_multiplier: float) -> nn.Module:
        width = round(WIDTH * width_multiplier)
        return small_fashion.mlp((196, width, width, 10), seed)

    if sparsity is None:
        model, wrapper = factory(1.0), None
    else:
        model, report = SparseWide.from_factory(
            factory,
            sparsity,
            example_input=images.test[:1],
            skip=(),
            generator=torch.Generator().manual_seed(seed),
        )

        def wrapper(model: nn.Module, optimizer: torch.optim.Optimizer) -> object:
            if not moving:
                selection = select_parameters(model)
                return MaskController(model, optimizer, selection, "hard", masks=report.masks)
            return RigL(
                model,
                optimizer,
                report.mask_sparsity,
                masks=report.masks,
                total_steps=STEPS,
                update_every=UPDATE_EVERY,
            )

    optimizer = torch.optim.SGD(
        model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    stepper = small_fashion.train(model, images, optimizer, STEPS, seed=seed, wrapper=wrapper)
    if stepper is not None:
        stepper.finalize()
    return small_fashion.accuracy(model, images)
