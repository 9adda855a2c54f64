"""What super-resolution networks share: the colours they expect, and how they end."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Mean of DIV2K's training images, R, G, B in 0..1.
RGB_MEAN = (0.4488, 0.4371, 0.4040)


class UpscalingModel(nn.Module):
    """(B, C, H, W) images in 0..1 -> (B, C, scale * H, scale * W).

    Args:
        scale: of both sides: 3, or a power of two.
        in_chans: channels of the images, both ways; 3 means colours, whose mean is removed first.
        img_range: what an image in 0..1 is multiplied by first.

    Raises:
        ValueError: a scale that is neither.
    """

    mean: Tensor

    def __init__(self, scale: int, in_chans: int, img_range: float) -> None:
        super().__init__()
        if scale < 1 or (scale != 3 and scale & (scale - 1)):
            raise ValueError(f"scale must be 3 or a power of two, got {scale}")
        self.scale, self.in_chans, self.img_range = scale, in_chans, img_range
        mean = RGB_MEAN if in_chans == 3 else (0.0,) * in_chans
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)

    def upscaled(self, x: Tensor) -> Tensor:
        """What lies between the removal of the mean and its return."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) float in 0..1 -> (B, C, scale * H, scale * W), not clipped.

        Raises:
            ValueError: other channels, or integers.
        """
        if x.dim() != 4 or x.shape[1] != self.in_chans or not x.is_floating_point():
            raise ValueError(
                f"x must be (batch, {self.in_chans}, height, width) float in 0..1, got "
                f"{tuple(x.shape)} {x.dtype}"
            )
        out = self.upscaled((x - self.mean) * self.img_range)
        return out / self.img_range + self.mean


def conv3x3(in_chans: int, out_chans: int) -> nn.Conv2d:
    """3x3, keeping the size."""
    return nn.Conv2d(in_chans, out_chans, 3, padding=1)


def upsample_layers(scale: int, channels: int) -> nn.Sequential:
    """Convolution and pixel shuffle by 3 or, as often as it takes, by 2; the channels stay."""
    layers: list[nn.Module] = []
    factor = 3 if scale == 3 else 2
    while scale > 1:
        layers += [conv3x3(channels, factor**2 * channels), nn.PixelShuffle(factor)]
        scale //= factor
    return nn.Sequential(*layers)
