"""A small learnable task and a small network, the same in every process."""

from __future__ import annotations

import torch

from aerogel.data import Dataset, ImageSplit
from aerogel.models import MobileNetV1


def toy_dataset(samples: int = 96, classes: int = 3) -> Dataset:
    """8x8 images whose class is the brightest third."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 120, (samples + 60, 1, 8, 8), generator=generator)
    labels = torch.randint(0, classes, (samples + 60,), generator=generator)
    for row, label in enumerate(labels.tolist()):
        images[row, 0, label * 2 : label * 2 + 3] += 60
    train, test = slice(0, samples), slice(samples, None)
    splits = [
        ImageSplit(images[part].byte(), labels[part], (0.3,), (0.2,), classes)
        for part in (train, test)
    ]
    names = tuple(str(n) for n in range(classes))
    return Dataset(
        "toy", "classification", splits[0], splits[1], classes, names, (1, 8, 8), "made up", "none"
    )


def toy_model(drop_rate: float = 0.0) -> MobileNetV1:
    """Two blocks, batch norm and all."""
    torch.manual_seed(0)
    return MobileNetV1(
        8,
        in_chans=1,
        num_classes=3,
        blocks=((16, 2), (16, 1)),
        stem_chs=8,
        stem_stride=1,
        drop_rate=drop_rate,
    )


def pruner_of(model, optimizer):
    """Gradual pruning of the 1x1 convolutions to 75 % within 12 steps."""
    from aerogel.pruning import GradualPruner

    names = [f"{name}.weight" for name, _ in model.prune_targets()]
    return GradualPruner(
        model, optimizer, 0.75, begin_step=1, end_step=12, frequency=2, include=names
    )
