"""Networks widened at equal cost and trained sparse, against the dense ones.

Sparse Wide makes the hidden layers sqrt(1 / (1 - s)) times as wide and masks them so that FLOPs are
the dense network's; RigL moves the mask while it trains, "static" keeps the first one. SGD with
Nesterov momentum 0.9 and weight decay 5e-4, learning rate 0.1 to 0 along a cosine, alike for all.
Two networks on Fashion-MNIST, 6,000 training images:

- a perceptron 196-16-16-10 on images pooled to 14x14, all layers masked; 900 steps of 100, RigL
  every 30, all 10,000 test images. The input cannot widen, so a sparser network starves its first
  layer: gains that grow with the sparsity, as the paper has them, are not claimed here;
- a ResNet-8 of width 8 on 28x28, masked inside its blocks; 200 steps of 32, RigL every 20, 4,000
  test images.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

import small_fashion
from aerogel.models import CifarResNet
from aerogel.pruning import RigL, SparseWide
from aerogel.report.evidence import Claim, Result, mean
from aerogel.sparsity import MaskController, select_parameters

SLUG = "sparse-ift"
SEEDS = (0, 1, 2, 3, 4)

WIDTH = 16  # of the perceptron
CHANNELS = 8  # of the ResNet's first stage
TEST_CHUNK = 1_000  # images, so that maps of a convolution stay small


@dataclass(frozen=True)
class Recipe:
    """A network, its images, and how it is trained.

    Attributes:
        prefix: of its metrics.
        sparsities: that it is widened for.
        gains: those at which RigL shall be better than dense.
        steps: of training.
        batch: images a step.
        update_every: steps between mask updates.
        skip: what stays dense.
        images: the images.
        build: (width multiplier, seed) -> the network.
    """

    prefix: str
    sparsities: tuple[float, ...]
    gains: tuple[float, ...]
    steps: int
    batch: int
    update_every: int
    skip: tuple[str, ...]
    images: Callable[[], small_fashion.Images]
    build: Callable[[float, int], nn.Module]


def perceptron(width_multiplier: float, seed: int) -> nn.Module:
    """196-w-w-10."""
    width = round(WIDTH * width_multiplier)
    return small_fashion.mlp((196, width, width, 10), seed)


def resnet(width_multiplier: float, seed: int) -> nn.Module:
    """ResNet-8 for grey images; stored by pixels, which is faster on CPUs."""
    torch.manual_seed(seed)
    model = CifarResNet(8, round(CHANNELS * width_multiplier), in_chans=1)
    return model.to(memory_format=torch.channels_last)


RECIPES = (
    Recipe("", (0.5, 0.75, 0.9), (0.5,), 900, 100, 30, (), small_fashion.load, perceptron),
    Recipe(
        "ResNet-8 ",
        (0.5, 0.75),
        (0.5, 0.75),
        200,
        32,
        20,
        ("stem", "head"),
        lambda: small_fashion.load(test_images=4_000, flat=False, pool=1),
        resnet,
    ),
)


def run(seed: int) -> Result:
    """Train the dense networks, and at every sparsity one with a fixed mask and one with RigL."""
    started = time.perf_counter()
    metrics = {}
    for recipe in RECIPES:
        metrics[f"{recipe.prefix}dense"] = _trained(recipe, seed, None, False)
        for sparsity in recipe.sparsities:
            fixed, moving = _names(recipe, sparsity)
            metrics[fixed] = _trained(recipe, seed, sparsity, False)
            metrics[moving] = _trained(recipe, seed, sparsity, True)
    return Result(SLUG, seed, metrics, time.perf_counter() - started)


def claims(results: Sequence[Result]) -> list[Claim]:
    """The thresholds, on the means over seeds."""
    paper = "ResNet-18 on ImageNet +3.5 % (Sparse Wide 90 %, RigL; abstract)"
    found = []
    for recipe in RECIPES:
        dense = f"{recipe.prefix}dense"
        for sparsity in recipe.gains:
            found.append(_against(results, _names(recipe, sparsity)[1], dense, 0.2, paper))
        for sparsity in recipe.sparsities:
            fixed, moving = _names(recipe, sparsity)
            found.append(_against(results, moving, fixed, -0.2, "RigL above static masks"))
    return found


def _names(recipe: Recipe, sparsity: float) -> tuple[str, str]:
    """Metrics of the fixed mask and of the moving one."""
    return f"{recipe.prefix}static {sparsity:g}", f"{recipe.prefix}RigL {sparsity:g}"


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


def _trained(recipe: Recipe, seed: int, sparsity: float | None, moving: bool) -> float:
    """Test accuracy, in per cent."""
    images = recipe.images()

    def factory(width_multiplier: float) -> nn.Module:
        return recipe.build(width_multiplier, seed)

    if sparsity is None:
        model, wrapper = factory(1.0), None
    else:
        model, report = SparseWide.from_factory(
            factory,
            sparsity,
            example_input=images.test[:1],
            skip=recipe.skip,
            generator=torch.Generator().manual_seed(seed),
        )
        names = tuple(report.masks)

        def wrapper(model: nn.Module, optimizer: torch.optim.Optimizer) -> object:
            if not moving:
                selection = select_parameters(model, include=names)
                return MaskController(model, optimizer, selection, "hard", masks=report.masks)
            return RigL(
                model,
                optimizer,
                report.mask_sparsity,
                masks=report.masks,
                include=names,
                total_steps=recipe.steps,
                update_every=recipe.update_every,
            )

    optimizer = torch.optim.SGD(
        model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    stepper = small_fashion.train(
        model, images, optimizer, recipe.steps, seed=seed, batch=recipe.batch, wrapper=wrapper
    )
    if stepper is not None:
        stepper.finalize()
    chunks = list(_chunks(images))
    return sum(small_fashion.accuracy(model, chunk) for chunk in chunks) / len(chunks)


def _chunks(images: small_fashion.Images) -> Iterator[small_fashion.Images]:
    """The images with equal parts of the test images, one after the other."""
    for test, labels in zip(
        images.test.split(TEST_CHUNK), images.test_labels.split(TEST_CHUNK), strict=True
    ):
        yield images._replace(test=test, test_labels=labels)
