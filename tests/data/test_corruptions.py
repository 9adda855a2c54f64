"""Common corruptions, against their definitions."""

from __future__ import annotations

import colorsys
import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from aerogel.data import CORRUPTIONS, corrupt, warps
from aerogel.insight import corruption_accuracy

RANDOM = {"gaussian_noise", "shot_noise", "impulse_noise", "glass_blur", "motion_blur", "snow",
          "fog", "elastic_transform"}  # fmt: skip


def pictures(count=6, channels=1, side=28):
    """Smooth blobs with an edge: what blurs, moves and noise all change."""
    generator = torch.Generator().manual_seed(3)
    x = warps.plasma(count * channels, 32, 2.0, generator)[:, :side, :side]
    x[:, side // 3 : side // 2] = 1.0 - x[:, side // 3 : side // 2]
    return (x * 200 + 20).to(torch.uint8).view(count, channels, side, side)


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_corruption_changes_images_and_only_the_seed_decides_how(corruption):
    for channels, side in ((1, 28), (3, 14)):
        x = pictures(2, channels, side)
        before = x.clone()
        first = [corrupt(x, corruption, severity, seed=1) for severity in (1, 5)]
        again = [corrupt(x, corruption, severity, seed=1) for severity in (1, 5)]
        assert torch.equal(x, before)
        for y, same in zip(first, again, strict=True):
            assert y.shape == x.shape
            assert y.dtype is torch.uint8
            assert torch.equal(y, same)
            assert not torch.equal(y, x)
        other = corrupt(x, corruption, 5, seed=2)
        assert torch.equal(other, first[1]) == (corruption not in RANDOM)


@pytest.mark.parametrize("corruption", sorted(set(CORRUPTIONS) - {"elastic_transform", "pixelate"}))
def test_the_mildest_corruption_is_milder_than_the_worst(corruption):
    # Elastic fields and coarse pixels change their kind with the severity, not only their size.
    x = pictures(8)
    change = [float((corrupt(x, corruption, s).float() - x.float()).abs().mean()) for s in (1, 5)]
    assert change[0] < change[1]


def test_noise_has_the_benchmarks_strength():
    grey = torch.full((64, 1, 28, 28), 128, dtype=torch.uint8)
    for severity, deviation in zip((1, 2, 3, 4, 5), (0.04, 0.06, 0.08, 0.09, 0.10), strict=True):
        noisy = corrupt(grey, "gaussian_noise", severity).float() / 255
        assert float(noisy.std()) == pytest.approx(deviation, rel=0.03)
    shot = corrupt(grey, "shot_noise", 5).float() / 255
    assert float(shot.std()) == pytest.approx((128 / 255 / 50) ** 0.5, rel=0.03)
    impulse = corrupt(grey, "impulse_noise", 5)
    assert float((impulse != 128).float().mean()) == pytest.approx(0.07, rel=0.08)
    assert set(impulse.unique().tolist()) == {0, 128, 255}


def test_contrast_and_brightness_are_their_formulas():
    x = pictures(3, 3, 32)
    mean = x.float().mean((2, 3), keepdim=True)
    flat = ((x.float() - mean) * 0.15 + mean).round()
    torch.testing.assert_close(corrupt(x, "contrast", 5).float(), flat, atol=1.0, rtol=0)
    x[0, :, 0, 0] = 0  # black has no hue
    bright = corrupt(x, "brightness", 5)
    for row in (0, 13):
        red, green, blue = (x[0, :, row, row].double() / 255).tolist()
        hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
        wanted = colorsys.hsv_to_rgb(hue, saturation, min(1.0, value + 0.3))
        got = bright[0, :, row, row].double() / 255
        torch.testing.assert_close(got, torch.tensor(wanted).double(), atol=3e-3, rtol=0)


def test_jpeg_is_what_the_codec_makes_of_it():
    x = pictures(2, 3, 32)
    buffer = io.BytesIO()
    Image.fromarray(x[1].permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=40)
    wanted = torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)
    assert torch.equal(corrupt(x, "jpeg_compression", 5)[1], wanted)


def test_glass_moves_pixels_to_their_neighbours():
    x = pictures(2)
    glass = corrupt(x, "glass_blur", 1)  # too narrow a Gaussian to blur
    near = torch.stack([x.roll((dy, dx), (2, 3)) for dy in (0, 1) for dx in (0, 1)])
    assert bool((glass == near).any(0).all())
    assert torch.equal(glass[:, :, :2], x[:, :, :2])


def test_filters_agree_with_scipy():
    x = pictures(1).float()
    for sigma in (0.4, 1.3):
        wanted = ndimage.gaussian_filter(x[0, 0].numpy(), sigma, mode="nearest", truncate=4.0)
        got = warps.gaussian(x, sigma)[0, 0]
        torch.testing.assert_close(got, torch.from_numpy(wanted), rtol=1e-4, atol=1e-2)
    kernel = warps.disk(1.5, 0.1)
    assert float(kernel.sum()) == pytest.approx(1.0)
    wanted = ndimage.correlate(x[0, 0].numpy(), kernel.numpy(), mode="mirror")
    got = warps.filtered(x, kernel)[0, 0]
    torch.testing.assert_close(got, torch.from_numpy(wanted), rtol=1e-4, atol=1e-2)
    crop = x[0, 0, 3:25, 3:25].numpy()  # ceil(28 / 1.3) = 22
    large = ndimage.zoom(crop, 1.3, order=1)
    assert large.shape == (29, 29)
    torch.testing.assert_close(
        warps.zoomed(x, 1.3)[0, 0], torch.from_numpy(large[:28, :28]), rtol=1e-4, atol=1e-2
    )


def test_a_moving_camera_smears_along_its_direction():
    point = torch.zeros(2, 1, 28, 28)
    point[:, :, 14, 14] = 1.0
    smear = warps.moved(point, 6, 2.0, torch.tensor([0.0, 45.0]))
    torch.testing.assert_close(smear.sum((1, 2, 3)), torch.ones(2))
    assert bool((smear[0, 0].sum(1) > 0).nonzero().flatten().tolist() == [14])
    ys, xs = (smear[1, 0] > 0).nonzero().unbind(1)
    assert torch.equal(ys, xs)
    weights = torch.exp(-(torch.arange(13.0) ** 2) / 8)
    torch.testing.assert_close(smear[0, 0, 14, 2:15].flip(0), weights / weights.sum())


def test_warps_that_move_nothing_are_the_identity():
    x = pictures(3, 3, 32).float()
    torch.testing.assert_close(warps.tilted(x, torch.zeros(3, 3, 2)), x, rtol=1e-3, atol=0.05)
    torch.testing.assert_close(
        warps.displaced(x, torch.zeros(3, 2, 32, 32)), x, rtol=1e-3, atol=0.05
    )
    right = torch.zeros(3, 2, 32, 32)
    right[:, 0] = 1.0
    torch.testing.assert_close(
        warps.displaced(x, right)[..., :-1], x[..., 1:], rtol=1e-3, atol=0.05
    )
    shifted = warps.tilted(x, torch.tensor([1.0, 0.0]).expand(3, 3, 2))  # all corners right
    torch.testing.assert_close(shifted[..., 1:], x[..., :-1], rtol=1e-3, atol=0.05)


def test_clouds_fill_the_range_and_grow_smoother():
    clouds = [warps.plasma(40, 32, decay, torch.Generator().manual_seed(0)) for decay in (1.5, 3)]
    for each in clouds:
        assert float(each.amin((1, 2)).max()) == 0.0
        assert float(each.amax((1, 2)).min()) == 1.0
    rough, smooth = (float((c[:, 1:] - c[:, :-1]).abs().mean()) for c in clouds)
    assert smooth < rough


def test_accuracy_is_counted_on_the_same_copies_for_all():
    x = pictures(10)
    labels = torch.arange(10) % 2
    seen = {"a": [], "b": []}

    def watch(name, answer):
        def predict(images):
            seen[name].append(images)
            return torch.eye(2)[answer]

        return predict

    wrong_thrice = labels.clone()
    wrong_thrice[:3] = 1 - wrong_thrice[:3]
    found = corruption_accuracy(
        {"a": watch("a", labels), "b": watch("b", wrong_thrice)},
        x, labels, corruptions=("fog", "snow"), severities=(1, 3), seed=5,
    )  # fmt: skip
    assert found["a"] == {"fog": (1.0, 1.0), "snow": (1.0, 1.0)}
    assert found["b"]["snow"] == (0.7, 0.7)
    assert all(torch.equal(a, b) for a, b in zip(seen["a"], seen["b"], strict=True))
    assert torch.equal(seen["a"][3], corrupt(x, "snow", 3, seed=5))


@pytest.mark.parametrize(
    ("images", "corruption", "severity", "message"),
    [
        (torch.zeros(1, 1, 28, 28), "fog", 1, "uint8 of 1 or 3 channels, got torch.float32"),
        (torch.zeros(1, 2, 28, 28).byte(), "fog", 1, r"\(1, 2, 28, 28\)"),
        (torch.zeros(1, 1, 8, 28).byte(), "fog", 1, r"at least 12x12, got \(8, 28\)"),
        (torch.zeros(1, 1, 28, 28).byte(), "frost", 1, "corruption must be one of .* got 'frost'"),
        (torch.zeros(1, 1, 28, 28).byte(), "fog", 6, "severity must be in 1..5, got 6"),
    ],
)
def test_bad_arguments_are_named(images, corruption, severity, message):
    with pytest.raises(ValueError, match=message):
        corrupt(images, corruption, severity)
    with pytest.raises(ValueError, match="as many"):
        corruption_accuracy({}, images, torch.zeros(2).long())


def test_no_image_is_no_image():
    assert corrupt(torch.zeros(0, 1, 28, 28).byte(), "fog", 1).shape == (0, 1, 28, 28)
