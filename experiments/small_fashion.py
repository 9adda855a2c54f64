"""What several experiments share: small Fashion-MNIST, and one plain way to train on it.

Everything is a function of the seed: initial weights, and the order of the batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aerogel import data

Wrapper = Callable[[nn.Module, torch.optim.Optimizer], Any]
"""What stands in for the optimizer: has `step` and `finalize`."""


class Images(NamedTuple):
    """Normalised images, (N, 1, 14, 14), (N, 1, 28, 28) or (N, 196), and their labels."""

    train: Tensor
    labels: Tensor
    test: Tensor
    test_labels: Tensor


@lru_cache(maxsize=4)
def load(
    train_images: int = 6_000, test_images: int = 10_000, flat: bool = True, pool: int = 2
) -> Images:
    """The first images of either split, average-pooled by 2 (1: as they are)."""
    dataset = data.load("fashion-mnist")

    def part(split: data.ImageSplit, count: int) -> Tensor:
        small = pooled(split.images[:count], split, pool)
        return small.flatten(1) if flat else small

    train, test = dataset.train, dataset.test
    return Images(
        part(train, train_images),
        train.labels[:train_images],
        part(test, test_images),
        test.labels[:test_images],
    )


def pooled(images: Tensor, like: data.ImageSplit, pool: int = 2) -> Tensor:
    """(N, 1, 28, 28) grey values -> (N, 1, 28 / pool, 28 / pool), normalised as a split's."""
    small = F.avg_pool2d(images.float() / 255.0, pool)
    return (small - like.mean[0]) / like.std[0]


def mlp(widths: tuple[int, ...], seed: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between, drawn with a seed."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for index in range(len(widths) - 1):
        layers += [nn.Linear(widths[index], widths[index + 1]), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def batches(count: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Indices of one batch after the other, shuffled anew when the images are used up."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).split(batch)


def train(
    model: nn.Module,
    images: Images,
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    seed: int,
    batch: int = 100,
    wrapper: Wrapper | None = None,
    cosine: bool = True,
    on_step: Callable[[int], None] | None = None,
) -> Any:
    """Train a classifier in place for `steps`; returns what stood in for the optimizer, if any."""
    stepper = None if wrapper is None else wrapper(model, optimizer)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if cosine else None
    chosen = batches(len(images.labels), batch, seed)
    model.train()
    for step in range(steps):
        index = next(chosen)
        optimizer.zero_grad()
        F.cross_entropy(model(images.train[index]), images.labels[index]).backward()
        (stepper or optimizer).step()
        if schedule is not None:
            schedule.step()
        if on_step is not None:
            on_step(step + 1)
    return stepper


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Of the test images, in per cent."""
    model.eval()
    return 100.0 * float((model(images.test).argmax(1) == images.test_labels).float().mean())
