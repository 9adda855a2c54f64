"""A folder of images as a data set: one sub-folder for each class.

Either `ROOT/CLASS/*.png`, split 90:10 by a fixed shuffle, or `ROOT/train/CLASS/...` beside
`ROOT/test/CLASS/...` (or `val`). Everything is decoded once into memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aerogel.data.dataset import Dataset, ImageSplit

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TEST_FRACTION = 0.1
MAX_BYTES = 8 << 30  # images in memory


def load(root: Path, size: int = 224) -> Dataset:
    """Load a folder of images as RGB of size x size pixels (short side resized, centre cropped).

    Args:
        root: the folder.
        size: height and width in pixels, at least 1.

    Raises:
        ValueError: no class folders, no images, an image that cannot be read, classes that differ
            between train and test, or more images than fit into memory.
        ModuleNotFoundError: Pillow is not installed.
    """
    pillow = _pillow()
    train_root = root / "train"
    test_root = next((p for p in (root / "test", root / "val") if p.is_dir()), None)
    if train_root.is_dir() and test_root is not None:
        train, classes = _listing(train_root)
        test, test_classes = _listing(test_root)
        if classes != test_classes:
            odd = sorted(set(classes) ^ set(test_classes))
            raise ValueError(f"{root}: classes differ between train and {test_root.name}: {odd}")
    else:
        everything, classes = _listing(root)
        order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(0))
        cut = max(1, int(len(everything) * TEST_FRACTION))
        test = [everything[i] for i in order[:cut].sort().values.tolist()]
        train = [everything[i] for i in order[cut:].sort().values.tolist()]
    if not train or not test:
        raise ValueError(f"{root}: {len(train)} training and {len(test)} test images are too few")
    needed = (len(train) + len(test)) * 3 * size * size
    if needed > MAX_BYTES:
        raise ValueError(
            f"{root}: {len(train) + len(test)} images of {size}x{size} need {needed >> 20} MiB of "
            f"memory, the limit is {MAX_BYTES >> 20} MiB; give a smaller folder"
        )
    return Dataset(
        name=root.resolve().name,
        task="classification",
        train=_decode(pillow, train, size, len(classes)),
        test=_decode(pillow, test, size, len(classes)),
        num_classes=len(classes),
        class_names=tuple(classes),
        input_shape=(3, size, size),
        source=f"folder {root.resolve()}",
        license="unknown",
    )


def _pillow() -> Any:
    try:
        from PIL import Image  # type: ignore[import-not-found,unused-ignore]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("folders of images need Pillow: pip install pillow") from error
    return Image


def _listing(root: Path) -> tuple[list[tuple[Path, int]], list[str]]:
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    found = [
        (path, label)
        for label, folder in enumerate(folders)
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in SUFFIXES
    ]
    if not found:
        names = [p.name for p in folders][:5]
        raise ValueError(
            f"{root}: expected one sub-folder of images for each class "
            f"({', '.join(SUFFIXES)}), found sub-folders {names} without images"
        )
    return found, [folder.name for folder in folders]


def _decode(pillow: Any, files: list[tuple[Path, int]], size: int, classes: int) -> ImageSplit:
    images = torch.empty((len(files), 3, size, size), dtype=torch.uint8)
    for row, (path, _) in enumerate(files):
        try:
            with pillow.open(path) as image:
                images[row] = _fit(image.convert("RGB"), size)
        except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
            raise ValueError(f"cannot read the image {path}: {error}") from error
    labels = torch.tensor([label for _, label in files], dtype=torch.int64)
    return ImageSplit(images, labels, IMAGENET_MEAN, IMAGENET_STD, classes)


def _fit(image: Any, size: int) -> Tensor:
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    fitted = image.resize((width, height)).crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)
