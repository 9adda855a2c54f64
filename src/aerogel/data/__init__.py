"""Real data: fetched from pinned packages, checked, cached, and held in memory as tensors.

dataset = aerogel.data.load("fashion-mnist")
(images,), labels = dataset.train.batch(torch.arange(128), augment="standard")
"""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Callable
from pathlib import Path

from aerogel.data import (
    digits,
    fashion_mnist,
    folder,
    smollm,
    superres,
    transforms,
    warps,
    wave2d,
    wordnet,
)
from aerogel.data.brown import load_brown
from aerogel.data.corruptions import CORRUPTIONS, corrupt
from aerogel.data.dataset import Batch, Dataset, ImageSplit
from aerogel.data.fetching import FetchError, Progress, cache_root, fetch
from aerogel.data.interactions import Interactions, load_movielens_100k
from aerogel.data.sources import ASSETS, Asset
from aerogel.data.text import RetrievalSplit, TokenSplit, load_tokenizer, token_windows

__all__ = [
    "ASSETS",
    "CORRUPTIONS",
    "Asset",
    "Batch",
    "Dataset",
    "FetchError",
    "ImageSplit",
    "Interactions",
    "Progress",
    "RetrievalSplit",
    "TokenSplit",
    "cache_root",
    "corrupt",
    "fetch",
    "fetch_checkpoint",
    "list_datasets",
    "load",
    "load_brown",
    "load_movielens_100k",
    "load_tokenizer",
    "superres",
    "token_windows",
    "transforms",
    "warps",
    "wave2d",
]

_Loader = Callable[[str | Path | None, Progress | None, int | None], Dataset]
_LOADERS: dict[str, _Loader] = {
    "fashion-mnist": lambda cache_dir, on_progress, _: fashion_mnist.load(cache_dir, on_progress),
    "digits": lambda *_: digits.load(),
    "wordnet-glosses": wordnet.load,
}
_CHECKPOINTS = {"mobilenet_v2": "mobilenet_v2-b0353104.pth", "minilm": ""}


def list_datasets() -> list[str]:
    """Names that `load` takes besides the path of an image folder."""
    return sorted(_LOADERS)


def load(
    name: str | Path,
    *,
    cache_dir: str | Path | None = None,
    limit: int | None = None,
    fallback: str | None = None,
    on_progress: Progress | None = None,
) -> Dataset:
    """Load a data set by name, or a folder of images by path.

    Args:
        name: "fashion-mnist", "digits", "wordnet-glosses", or a folder with one sub-folder of
            images for each class (or `train/` and `test/` or `val/` folders of such folders).
        cache_dir: cache folder; default `AEROGEL_CACHE` or `~/.cache/aerogel`.
        limit: keep at most this many samples of each split (a fixed random choice).
        fallback: "digits" takes scikit-learn's digits, enlarged to 28x28, if the data set cannot
            be had from anywhere; a warning then says so. Default: that is an error.
        on_progress: called as `(what, bytes_done, bytes_total)` while bytes arrive.

    Returns:
        The data set, in memory.

    Raises:
        ValueError: unknown name (the nearest names are listed) or unusable folder.
        FetchError: no origin delivered the data; the message lists what was tried.
    """
    if fallback not in (None, "digits"):
        raise ValueError(f"fallback must be None or 'digits', got {fallback!r}")
    dataset = _load(name, cache_dir, limit, fallback, on_progress)
    if limit is None:
        return dataset
    return dataclasses.replace(
        dataset, train=dataset.train.subset(limit), test=dataset.test.subset(limit)
    )


def _load(
    name: str | Path,
    cache_dir: str | Path | None,
    limit: int | None,
    fallback: str | None,
    on_progress: Progress | None,
) -> Dataset:
    if str(name) in _LOADERS:
        try:
            return _LOADERS[str(name)](cache_dir, on_progress, limit)
        except FetchError as error:
            if fallback is None:
                raise
            warnings.warn(
                f"{name} cannot be had here, so this run uses the 1,797 scikit-learn digits: its "
                f"numbers say nothing about {name}.\n{error}",
                stacklevel=3,
            )
            return digits.load(size=28)
    if Path(name).expanduser().is_dir():
        return folder.load(Path(name).expanduser())
    near = difflib.get_close_matches(str(name), _LOADERS, n=5, cutoff=0.3) or list_datasets()
    raise ValueError(
        f"unknown data set {str(name)!r}: neither a folder nor a name; nearest: {', '.join(near)}"
    )


def fetch_checkpoint(
    name: str,
    *,
    cache_dir: str | Path | None = None,
    on_progress: Progress | None = None,
) -> Path:
    """Fetch the pretrained weights of a model and return the path to give to `create_model`.

    Args:
        name: "mobilenet_v2" (a .pth of torchvision's ImageNet weights), "minilm" or "smollm2"
            (folders; the latter is converted once from a GGUF file).
        cache_dir: cache folder; default `AEROGEL_CACHE` or `~/.cache/aerogel`.
        on_progress: called as `(what, bytes_done, bytes_total)` while bytes arrive.

    Raises:
        ValueError: no pretrained weights are known for this model.
        FetchError: no origin delivered the weights.
        ModuleNotFoundError: "smollm2" needs the package `gguf` once.
    """
    if name == smollm.FOLDER:
        return smollm.folder_of(cache_dir, on_progress)
    if name not in _CHECKPOINTS:
        known = ", ".join(sorted([*_CHECKPOINTS, smollm.FOLDER]))
        raise ValueError(
            f"no pretrained weights are known for {name!r}; there are some for {known}"
        )
    return fetch(name, cache_dir=cache_dir, on_progress=on_progress) / _CHECKPOINTS[name]
