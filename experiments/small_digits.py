"""What the experiments on scikit-learn's digits share: 1,300 images to train on, 497 to test on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from aerogel import data, models

TRAIN_IMAGES = 1_300
BATCH = 64


@dataclass(frozen=True)
class Batches:
    """Batches that can be walked through again; shuffled anew each time if there is a seed."""

    images: Tensor
    labels: Tensor
    generator: torch.Generator | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count = len(self.labels)
        order = torch.arange(count)
        if self.generator is not None:
            order = torch.randperm(count, generator=self.generator)
        for index in order.split(BATCH):
            yield self.images[index], self.labels[index]

    def __len__(self) -> int:
        return -(-len(self.labels) // BATCH)


@lru_cache(maxsize=1)
def _images() -> tuple[Tensor, Tensor]:
    splits = data.load("digits")
    images = torch.cat([splits.train.images, splits.test.images]).float() / 255.0
    labels = torch.cat([splits.train.labels, splits.test.labels])
    train = images[:TRAIN_IMAGES]
    return (images - train.mean()) / train.std(), labels


def train(seed: int) -> Batches:
    """The training images (in the data set's own random order), shuffled with a seed."""
    images, labels = _images()
    generator = torch.Generator().manual_seed(seed)
    return Batches(images[:TRAIN_IMAGES], labels[:TRAIN_IMAGES], generator)


def test() -> Batches:
    """The test images."""
    images, labels = _images()
    return Batches(images[TRAIN_IMAGES:], labels[TRAIN_IMAGES:])


def vit(seed: int) -> nn.Module:
    """The tiny ViT, drawn with a seed.

    Its linear layers are drawn as torch draws them (uniform, up to 1 / sqrt(inputs)): so tiny a
    network drawn at a deviation of 0.02, as large ones are, keeps so many weights near zero that
    pruning 70 % at once costs nothing, and there is nothing to tell methods apart by.
    """
    torch.manual_seed(seed)
    model = models.create_model("vit_digits")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    return model
