"""PSNR and SSIM follow the protocol of super-resolution papers."""

from __future__ import annotations

import math

import pytest
import torch

from aerogel.data.superres import to_luma
from aerogel.insight import psnr, ssim


def noisy(images, amount=0.05, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (images + amount * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def test_identical_images_are_infinitely_good():
    images = torch.rand(2, 3, 16, 16)
    assert psnr(images, images.clone()) == math.inf
    assert ssim(images, images.clone()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("colour", "luma"),
    [((1, 0, 0), 81.481), ((0, 1, 0), 144.553), ((0, 0, 1), 40.966), ((1, 1, 1), 235.0)],
)
def test_pure_colours_have_the_luma_of_the_standard(colour, luma):
    plane = torch.tensor(colour, dtype=torch.float64).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert float(to_luma(plane).mean()) == pytest.approx(luma / 255)


def test_psnr_is_that_of_the_y_channel_by_hand():
    truth = torch.rand(1, 3, 20, 20).mul(255).round().div(255)
    images = noisy(truth).mul(255).round().div(255)
    error = (to_luma(images) - to_luma(truth)).mul(255)[..., 4:-4, 4:-4].double().square().mean()
    expected = 10 * math.log10(255**2 / float(error))
    assert psnr(images, truth, border=4) == pytest.approx(expected, abs=1e-4)


def test_the_border_does_not_count():
    truth = torch.rand(1, 1, 12, 12)
    images = truth.clone()
    images[..., :2, :] = 0.0
    images[..., -1] = 1.0
    assert psnr(images, truth, border=2) == math.inf
    assert psnr(images, truth, border=1) < 30


def test_values_are_clipped_and_rounded_as_in_a_file():
    truth = torch.full((1, 1, 4, 4), 1.0)
    assert psnr(truth * 1.5, truth) == math.inf
    assert psnr(truth - 0.3 / 255, truth) == math.inf
    assert psnr(truth - 0.3 / 255, truth, rounded=False) == pytest.approx(58.59, abs=0.01)


def test_the_mean_is_over_images():
    truth = torch.rand(2, 1, 8, 8)
    images = torch.cat((noisy(truth[:1], 0.01), noisy(truth[1:], 0.2)))
    single = [psnr(images[i : i + 1], truth[i : i + 1]) for i in range(2)]
    assert psnr(images, truth) == pytest.approx(sum(single) / 2)


def test_ssim_equals_the_formula_written_out():
    torch.manual_seed(0)
    truth = torch.rand(1, 1, 13, 12, dtype=torch.float64)
    images = noisy(truth, 0.1)
    place = torch.arange(11, dtype=torch.float64) - 5
    window = torch.exp(-(place[:, None] ** 2 + place[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for top in range(3):
        for left in range(2):
            a = images[0, 0, top : top + 11, left : left + 11]
            b = truth[0, 0, top : top + 11, left : left + 11]
            ma, mb = (window * a).sum(), (window * b).sum()
            va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
            cov = (window * (a - ma) * (b - mb)).sum()
            c1, c2 = 0.01**2, 0.03**2
            values.append(
                (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
            )
    assert ssim(images, truth, rounded=False) == pytest.approx(float(sum(values) / 6))
    assert ssim(noisy(truth, 0.3), truth) < ssim(images, truth) < 1


@pytest.mark.parametrize("measure", [psnr, ssim])
@pytest.mark.parametrize(
    ("images", "truth", "border", "message"),
    [
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1, 3, 16, 16), 0, "images must"),
        (torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16, dtype=torch.uint8), 0, "truth must"),
        (torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 15), 0, r"\(1, 3, 16, 15\)"),
        (torch.zeros(1, 2, 16, 16), torch.zeros(1, 2, 16, 16), 0, "1 or 3"),
        (torch.zeros(3, 16, 16), torch.zeros(3, 16, 16), 0, "1 or 3"),
        (torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16), 8, "border=8 leaves less"),
        (torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16), -1, "border=-1"),
    ],
)
def test_bad_input_is_named(measure, images, truth, border, message):
    with pytest.raises(ValueError, match=message):
        measure(images, truth, border=border)


def test_ssim_needs_a_whole_window():
    with pytest.raises(ValueError, match="less than 11x11 pixels of 16x16"):
        ssim(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16), border=3)
