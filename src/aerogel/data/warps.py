"""Filters, movements and textures of image batches, of which `corruptions` are made."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def filtered(x: Tensor, kernel: Tensor) -> Tensor:
    """Every channel correlated with one (k, k) kernel, mirrored at the outermost pixel."""
    channels, reach = x.shape[1], kernel.shape[0] // 2
    padded = F.pad(x, (reach, reach, reach, reach), mode="reflect")
    return F.conv2d(padded, kernel.expand(channels, 1, -1, -1), groups=channels)


def disk(radius: float, alias: float) -> Tensor:
    """A disk of sum 1, smoothed by a 3x3 Gaussian of deviation `alias`: (k, k)."""
    reach = math.floor(radius) + 1
    line = torch.arange(-reach, reach + 1).float()
    inside = (line[:, None] ** 2 + line**2 <= radius**2).float()
    bump = torch.exp(-torch.tensor([1.0, 0.0, 1.0]) / (2.0 * alias**2))
    bump = bump / bump.sum()
    return F.conv2d((inside / inside.sum())[None, None], (bump[:, None] * bump)[None, None],
                    padding=1)[0, 0]  # fmt: skip


def gaussian(x: Tensor, sigma: float, truncate: float = 4.0) -> Tensor:
    """Gaussian blur of (N, C, H, W), the border repeated; the kernel ends at truncate * sigma."""
    reach = int(truncate * sigma + 0.5)
    if reach == 0:
        return x
    line = torch.arange(-reach, reach + 1).float()
    kernel = torch.exp(-(line**2) / (2.0 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, 1, -1)
    wide = F.conv2d(F.pad(x, (reach, reach, 0, 0), mode="replicate"), kernel, groups=x.shape[1])
    tall = F.pad(wide, (0, 0, reach, reach), mode="replicate")
    return F.conv2d(tall, kernel.transpose(2, 3), groups=x.shape[1])


def moved(x: Tensor, radius: int, sigma: float, angle: Tensor) -> Tensor:
    """Blur of a camera that moves: half a Gaussian along one direction, the border repeated.

    Args:
        x: (N, C, H, W).
        radius: 2 * radius + 1 pixels are summed.
        sigma: deviation of their weights, in pixels.
        angle: (N,) directions in degrees.
    """
    count, _, height, width = x.shape
    taps = torch.arange(2 * radius + 1).float()
    kernel = torch.exp(-(taps**2) / (2.0 * sigma**2))
    kernel = kernel / kernel.sum()
    radians = torch.deg2rad(angle)
    down, right = radians.sin(), radians.cos()
    image = torch.arange(count).view(-1, 1, 1)
    total = torch.zeros_like(x).permute(0, 2, 3, 1)
    for tap, weight in zip(taps.tolist(), kernel.tolist(), strict=True):
        dy = torch.ceil(tap * down - 0.5).long()
        dx = torch.ceil(tap * right - 0.5).long()
        rows = (torch.arange(height)[None] + dy[:, None]).clamp(0, height - 1)
        columns = (torch.arange(width)[None] + dx[:, None]).clamp(0, width - 1)
        total = total + weight * x.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None]]
    return total.permute(0, 3, 1, 2)


def jittered(x: Tensor, generator: torch.Generator) -> Tensor:
    """Every pixel but those of the first two rows and columns becomes itself or a neighbour.

    The neighbour is above, to the left, or both, each with one half, alike in all channels.
    """
    count, _, height, width = x.shape
    offsets = torch.randint(-1, 1, (2, count, height, width), generator=generator)
    offsets[:, :, :2] = 0
    offsets[:, :, :, :2] = 0
    rows = torch.arange(height)[:, None] + offsets[0]
    columns = torch.arange(width) + offsets[1]
    image = torch.arange(count).view(-1, 1, 1)
    return x.permute(0, 2, 3, 1)[image, rows, columns].permute(0, 3, 1, 2)


def zoomed(x: Tensor, factor: float) -> Tensor:
    """The centre of every image, enlarged linearly by `factor` >= 1 to the old size."""
    height, width = x.shape[2:]
    tall, wide = math.ceil(height / factor), math.ceil(width / factor)
    top, left = (height - tall) // 2, (width - wide) // 2
    size = (round(tall * factor), round(wide * factor))
    centre = x[:, :, top : top + tall, left : left + wide]
    large = F.interpolate(centre, size=size, mode="bilinear", align_corners=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return large[:, :, top : top + height, left : left + width]


def tilted(x: Tensor, shifts: Tensor) -> Tensor:
    """The affine map that moves three corners of a square in the middle.

    Args:
        x: (N, C, H, W).
        shifts: (N, 3, 2) pixels that the corners move right and down.
    """
    count, _, height, width = x.shape
    centre = torch.tensor([width // 2, height // 2]).float()
    third = min(height, width) // 3
    corners = centre + third * torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    one = torch.ones(count, 3, 1)
    # From places in the result back to places in the source.
    back = torch.linalg.solve(torch.cat((corners + shifts, one), 2), corners.expand(count, 3, 2))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack((columns, rows, torch.ones_like(rows)), -1).float()
    return _sampled(x, torch.einsum("hwi,nij->nhwj", places, back))


def displaced(x: Tensor, field: Tensor) -> Tensor:
    """Every pixel read from where a (N, 2, H, W) field of pixels, right and down, points."""
    rows, columns = torch.meshgrid(
        torch.arange(x.shape[2]), torch.arange(x.shape[3]), indexing="ij"
    )
    return _sampled(x, torch.stack((columns, rows), -1) + field.permute(0, 2, 3, 1))


def _sampled(x: Tensor, places: Tensor) -> Tensor:
    """Linear interpolation at (N, H, W, 2) places (column, row), mirrored at the border."""
    size = torch.tensor([x.shape[3] - 1, x.shape[2] - 1]).float()
    return F.grid_sample(
        x, 2.0 * places / size - 1.0, padding_mode="reflection", align_corners=True
    )


def plasma(count: int, side: int, decay: float, generator: torch.Generator) -> Tensor:
    """Cloudy textures by the diamond-square algorithm on a torus.

    Args:
        count: textures.
        side: a power of 2.
        decay: by which the noise shrinks from one scale to the next; small is rough.
        generator: on the CPU.

    Returns:
        (count, side, side), each from 0 to 1.

    Reference:
        Fournier, Fussell, Carpenter, "Computer rendering of stochastic models", 1982.
    """
    heights = torch.zeros(count, side, side, dtype=torch.float64)
    step, wobble = side, 100.0

    def around(total: Tensor) -> Tensor:
        noise = torch.rand(total.shape, generator=generator, dtype=torch.float64)
        return total / 4.0 + wobble * wobble * (2.0 * noise - 1.0)

    while step >= 2:
        half = step // 2
        corners = heights[:, ::step, ::step]
        pairs = corners + corners.roll(-1, 1)
        heights[:, half::step, half::step] = around(pairs + pairs.roll(-1, 2))
        middles = heights[:, half::step, half::step]
        beside = middles + middles.roll(1, 1) + corners + corners.roll(-1, 2)
        heights[:, ::step, half::step] = around(beside)
        below = middles + middles.roll(1, 2) + corners + corners.roll(-1, 1)
        heights[:, half::step, ::step] = around(below)
        step, wobble = half, wobble / decay
    low = heights.amin((1, 2), keepdim=True)
    return ((heights - low) / (heights.amax((1, 2), keepdim=True) - low)).float()
