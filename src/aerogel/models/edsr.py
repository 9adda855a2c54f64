"""EDSR: residual blocks without normalisation, upsampled at the very end.

State-dict names are BasicSR's, so weights published for it load.

Reference: Lim et al., "Enhanced Deep Residual Networks for Single Image Super-Resolution", 2017,
arXiv 1707.02921.
"""

from __future__ import annotations

from torch import Tensor, nn

from aerogel.models.upscaling import UpscalingModel, conv3x3, upsample_layers


class ResidualBlock(nn.Module):
    """x + res_scale * conv(relu(conv(x)))."""

    def __init__(self, channels: int, res_scale: float) -> None:
        super().__init__()
        self.conv1, self.relu = conv3x3(channels, channels), nn.ReLU(inplace=True)
        self.conv2 = conv3x3(channels, channels)
        self.res_scale = res_scale

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, channels, H, W) -> the same shape."""
        out = self.conv2(self.relu(self.conv1(x)))
        return x + (out if self.res_scale == 1.0 else out * self.res_scale)


class EDSR(UpscalingModel):
    """A convolution, a stack of residual blocks, upsampling, a convolution.

    The defaults are EDSR-L (43 million parameters at scale 4); its baseline is 64 channels, 16
    blocks, res_scale 1.

    Args:
        scale: of both sides: 3, or a power of two.
        channels: of every map.
        blocks: residual blocks.
        res_scale: of their branches; keeps wide networks stable.
        in_chans: channels of the images, both ways.
        img_range: what an image in 0..1 is multiplied by first.

    Raises:
        ValueError: another scale, or a size below 1.
    """

    def __init__(
        self,
        scale: int = 4,
        channels: int = 256,
        blocks: int = 32,
        res_scale: float = 0.1,
        *,
        in_chans: int = 3,
        img_range: float = 255.0,
    ) -> None:
        if min(channels, blocks, in_chans) < 1:
            raise ValueError(
                f"channels={channels}, blocks={blocks}, in_chans={in_chans}: expected at least 1"
            )
        super().__init__(scale, in_chans, img_range)
        self.conv_first = conv3x3(in_chans, channels)
        self.body = nn.Sequential(*(ResidualBlock(channels, res_scale) for _ in range(blocks)))
        self.conv_after_body = conv3x3(channels, channels)
        self.upsample = upsample_layers(scale, channels)
        self.conv_last = conv3x3(channels, in_chans)

    def upscaled(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, in_chans, scale * H, scale * W)."""
        x = self.conv_first(x)
        return self.conv_last(self.upsample(self.conv_after_body(self.body(x)) + x))
