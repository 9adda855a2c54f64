"""How near a restored image is to the true one: PSNR and SSIM, as super-resolution papers measure.

Colour images are compared on their Y channel (BT.601), with `border` pixels (the scale, by
convention) cut from every side, after rounding to the 256 levels of an image file.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aerogel.data.superres import to_luma

# Of the SSIM paper: window, its deviation, and what keeps the quotients finite.
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_K1, SSIM_K2 = 0.01, 0.03


def psnr(images: Tensor, truth: Tensor, *, border: int = 0, rounded: bool = True) -> float:
    """Peak signal-to-noise ratio in dB, mean over images; infinite if one is exact.

    Args:
        images: (B, C, H, W) float in 0..1 (clipped to it); C = 3 is compared on Y, 1 as it is.
        truth: the same shape.
        border: pixels cut from every side.
        rounded: round both to 256 levels first, as image files do.

    Raises:
        ValueError: integers, shapes that differ, other channels, or nothing left of an image.
    """
    a, b = _compared(images, truth, border, rounded, least=1)
    error = (a - b).square().mean((1, 2, 3))
    return float((-10.0 * error.log10()).mean())


def ssim(images: Tensor, truth: Tensor, *, border: int = 0, rounded: bool = True) -> float:
    """Structural similarity, 1 = equal, mean over images and places.

    Windows are Gaussian, 11x11 with a deviation of 1.5, and only those wholly inside count.
    Arguments and errors as `psnr`; at least 11x11 pixels must be left.

    Reference:
        Wang et al., "Image quality assessment: from error visibility to structural similarity",
        2004.
    """
    a, b = _compared(images, truth, border, rounded, least=SSIM_WINDOW)
    mean_a, mean_b, aa, bb, ab = _blurred(torch.cat((a, b, a * a, b * b, a * b))).chunk(5)
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    spread = aa - mean_a.square() + bb - mean_b.square()
    likeness = (2 * mean_a * mean_b + c1) * (2 * (ab - mean_a * mean_b) + c2)
    return float((likeness / ((mean_a.square() + mean_b.square() + c1) * (spread + c2))).mean())


def _blurred(planes: Tensor) -> Tensor:
    place = torch.arange(SSIM_WINDOW, dtype=planes.dtype, device=planes.device)
    kernel = torch.exp(-((place - SSIM_WINDOW // 2) ** 2) / (2 * SSIM_SIGMA**2))
    kernel = kernel / kernel.sum()
    return F.conv2d(F.conv2d(planes, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))


def _compared(
    images: Tensor, truth: Tensor, border: int, rounded: bool, least: int
) -> tuple[Tensor, Tensor]:
    """Both as (B, 1, h, w) float64 planes in 0..1."""
    for name, given in (("images", images), ("truth", truth)):
        if not given.is_floating_point():
            raise ValueError(
                f"{name} must be float in 0..1, got {given.dtype}: divide 8-bit images by 255"
            )
    if images.shape != truth.shape or images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"images and truth must be (batch, 1 or 3, height, width) alike, got "
            f"{tuple(images.shape)} and {tuple(truth.shape)}"
        )
    height, width = images.shape[-2:]
    if border < 0 or min(height, width) - 2 * border < least:
        raise ValueError(
            f"border={border} leaves less than {least}x{least} pixels of {height}x{width}"
        )

    def plane(given: Tensor) -> Tensor:
        given = given.double().clamp(0.0, 1.0)
        if rounded:
            given = (given * 255.0).round() / 255.0
        given = to_luma(given) if given.shape[1] == 3 else given
        return given[..., border : height - border, border : width - border]

    return plane(images), plane(truth)
