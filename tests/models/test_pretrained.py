"""Real ImageNet weights: they load strictly, see what is in photographs, and compile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from aerogel import models
from aerogel.runtime import compile
from aerogel.sparsity import build_masks, compute_scores, select_parameters

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.fixture
def pretrained(real_asset: Callable[[str], Path]) -> nn.Module:
    weights = real_asset("mobilenet_v2") / "mobilenet_v2-b0353104.pth"
    return models.create_model("mobilenet_v2", checkpoint_path=weights).eval()


@pytest.fixture
def photos(real_asset: Callable[[str], Path]) -> tuple[Tensor, Tensor]:
    """(20, 3, 224, 224) normalised photographs and their classes."""
    image = pytest.importorskip("PIL.Image")
    numpy = pytest.importorskip("numpy")
    folder = real_asset("imagenet-photos")
    pixels, classes = [], []
    for path in sorted(folder.glob("imagenet_*.jpg")):
        with image.open(path) as photo:
            small = photo.convert("RGB").resize((224, 224), image.Resampling.BILINEAR)
        pixels.append(torch.from_numpy(numpy.asarray(small).copy()).float().div(255))
        classes.append(int(path.stem.rpartition("_")[2]))
    return ((torch.stack(pixels) - MEAN) / STD).permute(0, 3, 1, 2).contiguous(), torch.tensor(
        classes
    )


@torch.no_grad()
def test_pretrained_mobilenet_knows_18_of_20_photos(
    pretrained: nn.Module, photos: tuple[Tensor, Tensor]
) -> None:
    images, classes = photos
    best = pretrained(images).topk(5).indices
    assert int((best[:, 0] == classes).sum()) == 18
    assert int((best == classes[:, None]).any(1).sum()) == 20


@torch.no_grad()
def test_sparse_compiled_mobilenet_answers_as_the_sparse_one(
    pretrained: nn.Module, photos: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.setenv("AEROGEL_CACHE", str(tmp_path))
    names = [f"{name}.weight" for name, _ in pretrained.prune_targets()]
    scores = compute_scores(select_parameters(pretrained, include=names), "magnitude")
    build_masks(scores, 0.15).apply_(pretrained)
    images, _ = photos
    compiled = compile(pretrained, images[:1], threads=1, strategy="native plans")
    expected = pretrained(images[:4])
    got = torch.cat([compiled(image[None]) for image in images[:4]])
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert compiled.explain().chosen == "native plans"
