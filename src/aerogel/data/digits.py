"""scikit-learn's handwritten digits, 1,797 images of 8x8: small, offline, and no substitute.

It stands in for a larger data set only where nothing else can be had, and then it is said aloud.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from aerogel.data.dataset import Dataset, ImageSplit

TEST_FRACTION = 0.2


def load(size: int = 8) -> Dataset:
    """Load the digits; `size` above 8 enlarges them so that nets for larger images run on them.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the data set 'digits' comes with scikit-learn: pip install scikit-learn"
        ) from error
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().mul_(255 / 16).unsqueeze(1)
    if size != 8:
        images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    images = images.round().to(torch.uint8)
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    cut = int(len(labels) * TEST_FRACTION)
    train = images[order[cut:]].float() / 255
    mean, std = (float(train.mean()),), (float(train.std()),)
    test, rest = order[:cut], order[cut:]
    return Dataset(
        name="digits",
        task="classification",
        train=ImageSplit(images[rest], labels[rest], mean, std, 10),
        test=ImageSplit(images[test], labels[test], mean, std, 10),
        num_classes=10,
        class_names=tuple(str(n) for n in range(10)),
        input_shape=(1, size, size),
        source="scikit-learn load_digits (UCI optical recognition of handwritten digits)",
        license="BSD-3-Clause",
    )
