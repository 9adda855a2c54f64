"""Augmentation of whole batches of image tensors, deterministic for (seed, epoch, sample index).

The random numbers of a sample are a hash of its own coordinates, not a stream shared by a batch:
the same sample gets the same crop whatever batch, worker or process it lands in.
"""

from __future__ import annotations

import difflib
import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augment:
    """What a training batch goes through."""

    pad: int = 0  # pixels of zero padding before a random crop to the old size
    flip: bool = False  # mirror half of the images
    erase: float = 0.0  # probability of a random erased rectangle
    mixup: float = 0.0  # alpha of the Beta distribution of mixing weights; 0 is off


AUGMENTATIONS = {
    "none": Augment(),
    "flip": Augment(flip=True),
    "standard": Augment(pad=2, flip=True),
    "strong": Augment(pad=2, flip=True, erase=0.25, mixup=0.2),
}


def augmentation(policy: str | Augment) -> Augment:
    """Look up a named policy; an `Augment` is returned as it is."""
    if isinstance(policy, Augment):
        return policy
    if policy not in AUGMENTATIONS:
        near = difflib.get_close_matches(policy, AUGMENTATIONS, n=5, cutoff=0.0)
        raise ValueError(f"unknown augment {policy!r}; nearest names: {', '.join(near)}")
    return AUGMENTATIONS[policy]


def sample_uniform(seed: int, epoch: int, indices: Tensor, count: int) -> np.ndarray:
    """Independent uniform numbers in [0, 1) for each sample, a pure function of the arguments.

    Args:
        seed: run seed.
        epoch: epoch number.
        indices: (B,) integer sample indices.
        count: numbers for each sample.

    Returns:
        (B, count) float64.

    Reference:
        SplitMix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    counter = np.arange(count, dtype=np.uint64)[None, :]
    state = _mix(np.array([seed % 2**64], dtype=np.uint64))
    state = _mix(state + np.uint64(epoch))
    state = _mix(state + indices.numpy().astype(np.uint64)[:, None])
    return (_mix(state + counter) >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def crop_flip(x: Tensor, pad: int, dy: Tensor, dx: Tensor, mirror: Tensor) -> Tensor:
    """Zero-pad, crop back to the old size at (dy, dx), mirror where asked: one gather.

    Args:
        x: (B, C, H, W), any type.
        pad: padding on every side.
        dy: (B,) int64 top edges of the crops in [0, 2 * pad].
        dx: (B,) int64 left edges.
        mirror: (B,) bool.

    Returns:
        (B, C, H, W) of the type of x.
    """
    batch, channels, height, width = x.shape
    padded = F.pad(x, (pad, pad, pad, pad)) if pad else x
    rows = dy[:, None] + torch.arange(height)
    steps = torch.arange(width)
    columns = dx[:, None] + torch.where(mirror[:, None], width - 1 - steps, steps)
    flat = rows[:, :, None] * (width + 2 * pad) + columns[:, None, :]  # [B, H, W]
    index = flat.reshape(batch, 1, -1).expand(-1, channels, -1)
    return padded.reshape(batch, channels, -1).gather(2, index).reshape(x.shape)


def normalize(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Turn uint8 images (B, C, H, W) into float32 with the given per-channel mean and std in 0..1.

    Raises:
        ValueError: the number of channels differs from the number of means.
    """
    if len(mean) != x.shape[1] or len(std) != x.shape[1]:
        raise ValueError(f"mean {mean} and std {std} do not fit {x.shape[1]} channels")
    shape = (1, -1, 1, 1)
    scale = torch.tensor([1 / (255.0 * s) for s in std]).view(shape)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(shape)
    return torch.addcmul(shift, x.float(), scale)


def random_erase(x: Tensor, u: Tensor, probability: float) -> Tensor:
    """Set a random rectangle of some images to 0 (the mean, after `normalize`).

    Args:
        x: (B, C, H, W) float.
        u: (B, 5) uniform numbers: choice, area, aspect, row, column.
        probability: fraction of the images that lose a rectangle.

    Reference:
        Zhong et al., "Random Erasing Data Augmentation", arXiv 1708.04896 (area 2-33 %).
    """
    height, width = x.shape[-2:]
    area = (0.02 + 0.31 * u[:, 1]) * height * width
    aspect = torch.exp((2 * u[:, 2] - 1) * 1.204)  # 0.3 to 1/0.3, uniform in the logarithm
    tall = (area * aspect).sqrt().round().clamp(1, height)
    wide = (area / aspect).sqrt().round().clamp(1, width)
    top, left = (u[:, 3] * (height - tall + 1)).floor(), (u[:, 4] * (width - wide + 1)).floor()
    rows, columns = torch.arange(height), torch.arange(width)
    inside_rows = (rows >= top[:, None]) & (rows < (top + tall)[:, None])
    inside_columns = (columns >= left[:, None]) & (columns < (left + wide)[:, None])
    hit = inside_rows[:, :, None] & inside_columns[:, None, :]
    hit &= (u[:, 0] < probability)[:, None, None]
    return x.masked_fill(hit[:, None], 0.0)


def mixup(
    x: Tensor, other: Tensor, labels: Tensor, other_labels: Tensor, weight: Tensor, classes: int
) -> tuple[Tensor, Tensor]:
    """Mix images and one-hot labels of two batches.

    Args:
        x: (B, C, H, W) float.
        other: (B, C, H, W) float.
        labels: (B,) int64, of x.
        other_labels: (B,) int64, of other.
        weight: (B,) share of the first batch.
        classes: number of classes.

    Returns:
        Mixed images and (B, classes) float targets.

    Reference:
        Zhang et al., "mixup: Beyond Empirical Risk Minimization", arXiv 1710.09412.
    """
    mixed = torch.lerp(other, x, weight.view(-1, 1, 1, 1))
    first, second = F.one_hot(labels, classes), F.one_hot(other_labels, classes)
    return mixed, torch.lerp(second.float(), first.float(), weight[:, None])


def beta_quantile(u: np.ndarray, alpha: float) -> np.ndarray:
    """Values of the symmetric Beta(alpha, alpha) distribution at the quantiles u."""
    points, cumulative = _beta_table(alpha)
    return np.interp(u, cumulative, points)


@functools.lru_cache(maxsize=8)
def _beta_table(alpha: float) -> tuple[np.ndarray, np.ndarray]:
    # Substituting x = sin^2(t) tames the poles of the density at 0 and 1 for alpha < 1.
    t = (np.arange(20_000) + 0.5) * (np.pi / 2 / 20_000)
    density = (np.sin(t) * np.cos(t)) ** (2 * alpha - 1)
    cumulative = np.cumsum(density)
    return np.sin(t) ** 2, cumulative / cumulative[-1]
