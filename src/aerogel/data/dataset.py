"""What `data.load` returns: a data set held in memory as tensors, with batches cut by index.

A split is an ordinary `torch.utils.data.Dataset`; `batch` beside it serves a whole batch at once,
which on a CPU is many times faster than collating single items.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aerogel.data import transforms
from aerogel.data.transforms import Augment


class Batch(NamedTuple):
    """Inputs for `model(*inputs)` and the target, if the task has one."""

    inputs: tuple[Tensor, ...]
    target: Tensor | None


@dataclass(frozen=True)
class Dataset:
    """A named data set with its two splits and where it came from."""

    name: str
    task: str  # "classification" or "distillation"
    train: Any
    test: Any
    num_classes: int  # 0 where there are no classes
    class_names: tuple[str, ...]
    input_shape: tuple[int, ...]  # one sample, without the batch dimension
    source: str
    license: str


class ImageSplit(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Labelled images as one uint8 tensor; `split[i]` is (normalised image, label).

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) int64.
        mean: per-channel mean in 0..1.
        std: per-channel standard deviation in 0..1.
        num_classes: number of classes (labels are 0..num_classes - 1).
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        num_classes: int,
    ) -> None:
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise ValueError(
                f"images must be (N, C, H, W) uint8, got {tuple(images.shape)} {images.dtype}"
            )
        if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
            raise ValueError(
                f"labels must be ({len(images)},) int64, got {tuple(labels.shape)} {labels.dtype}"
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise ValueError(f"labels must lie in 0..{num_classes - 1}")
        self.images, self.labels = images, labels
        self.mean, self.std, self.num_classes = mean, std, num_classes

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.normalized(self.images[index : index + 1])[0], self.labels[index]

    def normalized(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> float32 with this data set's mean and deviation removed."""
        return transforms.normalize(images, self.mean, self.std)

    def batch(
        self, indices: Tensor, *, augment: str | Augment = "none", seed: int = 0, epoch: int = 0
    ) -> Batch:
        """Cut a batch; with augmentation, a pure function of (seed, epoch, index).

        Args:
            indices: (B,) int64.
            augment: "none", "flip", "standard" (pad 2, crop, flip), "strong" (with erasing and
                mixup: the target is then (B, num_classes) float) or an `Augment`.
            seed: run seed.
            epoch: epoch number.

        Returns:
            ((images,), labels).
        """
        policy = transforms.augmentation(augment)
        images, labels = self.images[indices], self.labels[indices]
        if policy == Augment():
            return Batch((self.normalized(images),), labels)
        u = torch.from_numpy(transforms.sample_uniform(seed, epoch, indices, 10))
        if policy.pad or policy.flip:
            corner = (u[:, :2] * (2 * policy.pad + 1)).long()
            mirror = (u[:, 2] < 0.5) if policy.flip else torch.zeros(len(u), dtype=torch.bool)
            images = transforms.crop_flip(images, policy.pad, corner[:, 0], corner[:, 1], mirror)
        x = self.normalized(images)
        if policy.erase:
            x = transforms.random_erase(x, u[:, 3:8], policy.erase)
        if not policy.mixup:
            return Batch((x,), labels)
        partner = (u[:, 8] * len(self)).long()
        weight = transforms.beta_quantile(u[:, 9].numpy(), policy.mixup)
        other = self.normalized(self.images[partner])
        return Batch(*_mixed(x, other, labels, self.labels[partner], weight, self.num_classes))

    def subset(self, count: int) -> ImageSplit:
        """The first `count` samples of a fixed shuffle."""
        return self.select(fixed_subset(len(self), count))

    def select(self, keep: Tensor) -> ImageSplit:
        """The samples at `keep`, (N,) int64."""
        return ImageSplit(
            self.images[keep], self.labels[keep], self.mean, self.std, self.num_classes
        )


def _mixed(
    x: Tensor, other: Tensor, labels: Tensor, other_labels: Tensor, weight: Any, classes: int
) -> tuple[tuple[Tensor], Tensor]:
    share = torch.from_numpy(weight).float()
    mixed, target = transforms.mixup(x, other, labels, other_labels, share, classes)
    return (mixed,), target


def fixed_subset(total: int, count: int) -> Tensor:
    """`count` of `total` indices in ascending order, the same ones every time."""
    if count < 1:
        raise ValueError(f"limit must be at least 1, got {count}")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    return order[: min(count, total)].sort().values
