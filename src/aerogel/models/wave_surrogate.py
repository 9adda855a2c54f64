"""A decoder from a few physical parameters to a field over time and space.

Reference: after Boukraichi et al., arXiv 2304.04964 (sizes not given there).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

BLOCKS = 2
_SCALE = 2**BLOCKS


class WaveSurrogate(nn.Module):
    """Perceptron, then two blocks of upsampling by 2 and two 3x3x3 convolutions, then a 1x1x1 one.

    Args:
        num_params: physical parameters of a sample.
        channels: of every map.
        out_shape: frames, height and width of the field; multiples of 4.
        conv: makes the convolutions: `nn.Conv3d` or `aerogel.nn.OneWayConv3d`; called as
            `conv(channels, channels, 3, padding="same")`.
        hidden: width of the perceptron.

    Raises:
        ValueError: a size below 1, or `out_shape` that is no multiple of 4.
    """

    def __init__(
        self,
        num_params: int = 3,
        channels: int = 16,
        out_shape: tuple[int, int, int] = (16, 16, 16),
        conv: Callable[..., nn.Module] = nn.Conv3d,
        *,
        hidden: int = 64,
    ) -> None:
        super().__init__()
        if min(num_params, channels, hidden) < 1:
            raise ValueError(
                f"num_params={num_params}, channels={channels}, hidden={hidden}: expected at "
                "least 1"
            )
        if len(out_shape) != 3 or any(n < _SCALE or n % _SCALE for n in out_shape):
            raise ValueError(f"out_shape={out_shape}: expected three multiples of {_SCALE}")
        self.num_params, self.out_shape = num_params, tuple(out_shape)
        start = tuple(n // _SCALE for n in out_shape)
        self.encoder = nn.Sequential(
            nn.Linear(num_params, hidden),
            nn.ReLU(),
            nn.Linear(hidden, channels * math.prod(start)),
            nn.ReLU(),
            nn.Unflatten(1, (channels, *start)),
        )
        layers: list[nn.Module] = []
        for _ in range(BLOCKS):
            layers.append(nn.Upsample(scale_factor=2))
            for _ in range(2):
                layers += [_kaiming(conv(channels, channels, 3, padding="same")), nn.ReLU()]
        self.decoder = nn.Sequential(*layers)
        self.head = nn.Conv3d(channels, 1, 1)

    def forward(self, params: Tensor) -> Tensor:
        """params: (B, num_params), scaled to about [-1, 1] -> (B, frames, height, width)."""
        if params.dim() != 2 or params.shape[1] != self.num_params:
            raise ValueError(
                f"params: shape {tuple(params.shape)}, expected (batch, {self.num_params})"
            )
        return self.head(self.decoder(self.encoder(params))).squeeze(1)

    @property
    def num_conv_parameters(self) -> int:
        """Parameters of the convolutions, biases and the last one included."""
        parts: tuple[Any, ...] = (self.decoder, self.head)
        return sum(p.numel() for part in parts for p in part.parameters())


def _kaiming(conv: nn.Module) -> nn.Module:
    """Plain layers start with the variance that one-way layers start with."""
    if isinstance(conv, nn.Conv3d):
        nn.init.kaiming_uniform_(conv.weight, nonlinearity="relu")
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
    return conv
