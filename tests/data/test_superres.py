"""Small images and patches for super-resolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from aerogel.data import superres
from aerogel.data.superres import PatchPairs


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_photographs_are_there():
    pytest.importorskip("sklearn")
    images = superres.photographs()
    assert images.shape == (2, 3, 427, 640)
    assert images.dtype == torch.uint8
    assert superres.cropped(images, 4).shape == (2, 3, 424, 640)


def test_shrinking_keeps_smooth_images_and_means():
    ramp = torch.linspace(0.2, 0.8, 64).expand(1, 1, 64, 64)
    small = superres.shrink_images(ramp, 4)
    assert small.shape == (1, 1, 16, 16)
    assert float(small.mean()) == pytest.approx(float(ramp.mean()), abs=1e-3)
    large = superres.enlarge_bicubic(small, 4)
    torch.testing.assert_close(large[..., 8:-8], ramp[..., 8:-8], atol=2e-3, rtol=0)


def test_shrinking_does_not_alias():
    checks = (torch.arange(32)[:, None] + torch.arange(32)) % 2
    small = superres.shrink_images(checks.float()[None, None], 2)
    torch.testing.assert_close(small, torch.full_like(small, 0.5), atol=0.02, rtol=0)


def test_patches_are_large_and_small_of_the_same_place():
    torch.manual_seed(0)
    images = [F.avg_pool2d(torch.rand(1, 44, 52), 5, 1), torch.rand(1, 32, 36)]
    pairs = PatchPairs(images, 2, 16)
    low, high = pairs.batch(40, source())
    assert low.shape == (40, 1, 8, 8)
    assert high.shape == (40, 1, 16, 16)
    again = superres.shrink_images(high, 2)
    inner = (slice(None), slice(None), slice(2, -2), slice(2, -2))
    torch.testing.assert_close(low[inner], again[inner], atol=1e-5, rtol=0)


def test_flips_and_turns_are_drawn_and_a_seed_fixes_them():
    image = torch.arange(16.0).view(1, 4, 4) / 16
    for rotate, kinds in ((False, 4), (True, 8)):
        pairs = PatchPairs([image], 2, 4, rotate=rotate)
        _, high = pairs.batch(200, source())
        assert len({tuple(patch.flatten().tolist()) for patch in high}) == kinds
        assert torch.equal(high, pairs.batch(200, source())[1])
        assert not torch.equal(high, pairs.batch(200, source(1))[1])


def test_tiles_lie_on_their_grid():
    images = torch.rand(2, 3, 20, 30)
    pieces = superres.tiles(images, 8, 10, 9)
    assert pieces.shape == (2, 2, 3, 3, 8, 8)
    assert torch.equal(pieces[1, 1, 2], images[1, :, 10:18, 18:26])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: superres.shrink_images(torch.rand(1, 1, 15, 16), 2), "15x16.* scale=2"),
        (lambda: superres.shrink_images(torch.zeros(1, 1, 8, 8).byte(), 2), "got torch.uint8"),
        (lambda: superres.enlarge_bicubic(torch.zeros(1, 1, 8, 8).byte(), 2), "got torch.uint8"),
        (lambda: superres.to_luma(torch.zeros(3, 8, 8).byte()), "divide 8-bit images by 255"),
        (lambda: superres.to_luma(torch.zeros(1, 8, 8)), r"\(1, 8, 8\)"),
        (lambda: superres.tiles(torch.zeros(1, 1, 8, 8), 9, 9, 9), "size=9 is larger"),
        (lambda: PatchPairs([], 2, 8), "images is empty"),
        (lambda: PatchPairs([torch.rand(1, 16, 16)], 3, 8), "size=8 .* scale=3"),
        (lambda: PatchPairs([torch.rand(1, 16, 6)], 2, 8), "at least 8x8"),
        (lambda: PatchPairs([torch.rand(1, 17, 16)], 2, 8), "17x16"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
