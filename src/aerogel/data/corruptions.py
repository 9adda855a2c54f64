"""Common corruptions: photographs as bad cameras, weather and compression deliver them.

14 of the 15 corruptions of the benchmark, at five severities, for small images of one or three
channels. Frost is left out, which needs photographs of frost. The severities are those of the
released CIFAR-10-C, which were chosen for 32x32 pixels; distances in the image scale with its side.
Differences from that release: results are rounded instead of cut to whole values, and an elastic
field is mirrored at the outermost pixel.

Reference: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions
and Perturbations", ICLR 2019, arXiv 1903.12261.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from aerogel.data import warps

SEVERITIES = (1, 2, 3, 4, 5)
LEAST_SIDE = 12  # a moving camera smears over up to 18 pixels: below this, nothing is left

_LUMA = (0.299, 0.587, 0.114)
_Corruption = Callable[[Tensor, int, torch.Generator], Tensor]


def corrupt(images: Tensor, corruption: str, severity: int, seed: int = 0) -> Tensor:
    """Corrupted copies of a batch of images, a pure function of the arguments.

    Args:
        images: (N, C, H, W) uint8 of one or three channels, at least 12 pixels high and wide.
        corruption: one of `CORRUPTIONS`.
        severity: 1 (mild) to 5.
        seed: of noise, angles and fields; every corruption and severity draws its own.

    Returns:
        (N, C, H, W) uint8.

    Raises:
        ValueError: an unknown corruption or severity, or images of another type or shape.
        ImportError: jpeg_compression without Pillow.
    """
    if corruption not in _CORRUPTIONS:
        raise ValueError(f"corruption must be one of {', '.join(CORRUPTIONS)}, got {corruption!r}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity must be in 1..5, got {severity!r}")
    if images.dtype is not torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            "images must be (N, C, H, W) uint8 of 1 or 3 channels, got "
            f"{images.dtype} {tuple(images.shape)}"
        )
    if min(images.shape[2:]) < LEAST_SIDE:
        raise ValueError(
            f"images must be at least {LEAST_SIDE}x{LEAST_SIDE}, got {tuple(images.shape[2:])}"
        )
    if len(images) == 0:
        return images.clone()
    place = CORRUPTIONS.index(corruption) * len(SEVERITIES) + severity
    # One stream for each pair, whatever was drawn before it.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + place) % 2**63)
    changed = _CORRUPTIONS[corruption](images.cpu().float() / 255.0, severity - 1, generator)
    return (changed.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8).to(images.device)


# ----------------------------------------------------------------------------------------- noise


def _normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def _uniform(shape: Sequence[int], low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def _gaussian_noise(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    return x + (0.04, 0.06, 0.08, 0.09, 0.10)[level] * _normal(x.shape, generator)


def _shot_noise(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    photons = (500, 250, 100, 75, 50)[level]
    return torch.poisson(x * photons, generator=generator) / photons


def _impulse_noise(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    share = (0.01, 0.02, 0.03, 0.05, 0.07)[level]
    hit = torch.rand(x.shape, generator=generator) < share
    salt = (torch.rand(x.shape, generator=generator) < 0.5).float()
    return torch.where(hit, salt, x)


# ------------------------------------------------------------------------------------------ blur


def _defocus_blur(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    radius, alias = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))[level]
    return warps.filtered(x, warps.disk(radius, alias))


def _glass_blur(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    sigma, rounds = ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))[level]
    x = warps.gaussian(x, sigma)
    for _ in range(rounds):
        # The release's loop swaps views of one array, which copies the neighbour and no more.
        x = warps.jittered(x, generator)
    return warps.gaussian(x, sigma)


def _motion_blur(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    radius, sigma = ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5))[level]
    return warps.moved(x, radius, sigma, _uniform((len(x),), -45.0, 45.0, generator))


def _zoom_blur(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    factors = np.arange(1.0, (1.06, 1.11, 1.16, 1.21, 1.26)[level], 0.01)
    total = x.clone()
    for factor in factors:
        total += warps.zoomed(x, float(factor))
    return total / (len(factors) + 1)


# --------------------------------------------------------------------------------------- weather


def _snow(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    loc, scale, zoom, least, radius, sigma, kept = (
        (0.1, 0.2, 1.0, 0.6, 8, 3.0, 0.95),
        (0.1, 0.2, 1.0, 0.5, 10, 4.0, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4.0, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6.0, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12.0, 0.8),
    )[level]
    count, channels, height, width = x.shape
    flakes = warps.zoomed(loc + scale * _normal((count, 1, height, width), generator), zoom)
    flakes = flakes.masked_fill(flakes < least, 0.0).clamp(0.0, 1.0)
    flakes = warps.moved(flakes, radius, sigma, _uniform((count,), -135.0, -45.0, generator))
    weights = torch.tensor(_LUMA if channels == 3 else (1.0,)).view(1, -1, 1, 1)
    grey = (x * weights).sum(1, keepdim=True)
    x = kept * x + (1.0 - kept) * torch.maximum(x, grey * 1.5 + 0.5)
    return x + flakes + flakes.flip(2, 3)


def _fog(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    thickness, decay = ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))[level]
    height, width = x.shape[2:]
    side = 2 ** math.ceil(math.log2(max(height, width)))
    clouds = warps.plasma(len(x), side, decay, generator)[:, None, :height, :width]
    brightest = x.amax((1, 2, 3), keepdim=True)
    return (x + thickness * clouds) * brightest / (brightest + thickness)


def _brightness(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    # Value of the HSV model: with hue and saturation kept, all channels scale alike.
    value = x.amax(1, keepdim=True)
    brighter = (value + (0.05, 0.1, 0.15, 0.2, 0.3)[level]).clamp(max=1.0)
    return torch.where(value > 0, x * brighter / value.clamp(min=1e-6), brighter)


# --------------------------------------------------------------------------------------- digital


def _contrast(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * (0.75, 0.5, 0.4, 0.3, 0.15)[level] + mean


def _elastic_transform(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    reach, smooth, corner = (
        (0.0, 0.0, 0.08),
        (0.05, 0.2, 0.07),
        (0.08, 0.06, 0.06),
        (0.1, 0.04, 0.05),
        (0.1, 0.03, 0.03),
    )[level]
    count, _, height, width = x.shape
    side = min(height, width)
    x = warps.tilted(x, _uniform((count, 3, 2), -corner * side, corner * side, generator))
    if reach == 0.0:
        return x
    field = _uniform((count, 2, height, width), -1.0, 1.0, generator)
    return warps.displaced(x, reach * side * warps.gaussian(field, smooth * side, truncate=3.0))


def _pixelate(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    share = (0.95, 0.9, 0.85, 0.75, 0.65)[level]
    height, width = x.shape[2:]
    coarse = F.adaptive_avg_pool2d(x, (int(height * share), int(width * share)))
    return F.interpolate(coarse, size=(height, width), mode="nearest-exact")


def _jpeg_compression(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("jpeg_compression needs Pillow: pip install 'aerogel[images]'") from error
    quality = (80, 65, 58, 50, 40)[level]
    out = []
    for image in (x * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1).numpy():
        buffer = io.BytesIO()
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(
            buffer, "JPEG", quality=quality
        )
        out.append(np.array(Image.open(buffer)).reshape(image.shape))
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).float() / 255.0


_CORRUPTIONS: Mapping[str, _Corruption] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}
CORRUPTIONS: tuple[str, ...] = tuple(_CORRUPTIONS)
