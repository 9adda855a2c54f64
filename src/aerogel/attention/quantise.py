"""Keys and values in few bits: by channel, and by token after the channels are made alike.

Paper: He, Zhang, Wu, Liu, Zhou and Zhuang, "ZipCache: Accurate and Efficient KV Cache Quantization
with Salient Token Identification", 2024, arXiv 2405.14256.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BITS = (2, 4, 8, 16)
_HALF_LIMIT = 6e4  # numbers beyond are kept in float32


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes (..., n) uint8 below ``2 ** bits`` in bytes: (..., n * bits / 8), first code lowest.

    Raises:
        ValueError: n is no multiple of the codes in a byte.
    """
    per_byte = 8 // bits
    if codes.shape[-1] % per_byte:
        raise ValueError(
            f"head_dim={codes.shape[-1]}: expected a multiple of {per_byte} with {bits} bits"
        )
    parts = codes.unflatten(-1, (-1, per_byte))
    packed = parts[..., 0].clone()
    for lane in range(1, per_byte):
        packed |= parts[..., lane] << (lane * bits)
    return packed


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """Undoes `pack_bits`: (..., n) uint8."""
    shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
    mask = (1 << bits) - 1
    return ((packed[..., None] >> shifts) & mask).flatten(-2)


@dataclass(frozen=True, eq=False)
class Quantised:
    """Codes with ``x = (code * step + low) * channel``.

    Attributes:
        codes: packed along the last dimension, uint8.
        bits: of a code.
        low: smallest number of each group.
        step: distance of two codes.
        channel: factor of each channel, or None.
    """

    codes: Tensor
    bits: int
    low: Tensor
    step: Tensor
    channel: Tensor | None = None

    def dequantised(self, tokens: slice = slice(None)) -> Tensor:
        """(B, H, n, D) float32, of some tokens."""
        low, step = (t if t.shape[2] == 1 else t[:, :, tokens] for t in (self.low, self.step))
        x = unpack_bits(self.codes[:, :, tokens], self.bits).float() * step.float() + low.float()
        return x if self.channel is None else x * self.channel.float()

    def parts(self) -> list[Tensor]:
        """What it stores."""
        channel = [] if self.channel is None else [self.channel]
        return [self.codes, self.low, self.step, *channel]

    def select(self, index: Tensor) -> Quantised:
        """Some batch elements."""
        channel = None if self.channel is None else self.channel[index]
        return Quantised(self.codes[index], self.bits, self.low[index], self.step[index], channel)


def quantise_keys(
    k: Tensor, bits: int, real: Tensor | None = None, scales: torch.dtype = torch.float16
) -> Quantised:
    """Keys (B, H, n, D) with one range per channel, over the real tokens (B, n) bool.

    The error of an entry is at most half its step; the range is widened to what `scales` can say.
    """
    return _coded(k.float(), bits, (2,), real, scales)


def value_channels(
    v: Tensor, real: Tensor | None = None, scales: torch.dtype = torch.float16
) -> Tensor:
    """Root of the largest number of each channel of values (B, H, n, D): (B, H, 1, D)."""
    size = v.float().abs()
    if real is not None:
        size = size * real[:, None, :, None]
    root = size.amax(2, keepdim=True).sqrt()
    return _fitting(torch.where(root > 1e-4, root, 1), scales)


def quantise_values(
    v: Tensor,
    bits: int,
    channel: Tensor,
    real: Tensor | None = None,
    scales: torch.dtype = torch.float16,
) -> Quantised:
    """Values (B, H, n, D) with one range per token, after division by `channel`.

    The error of an entry is at most half the token's step times the channel's factor.
    """
    plain = _coded(v.float() / channel.float(), bits, (1, 3), real, scales)
    return Quantised(plain.codes, bits, plain.low, plain.step, channel)


def _coded(
    x: Tensor, bits: int, over: tuple[int, ...], real: Tensor | None, scales: torch.dtype
) -> Quantised:
    kept = torch.ones((), dtype=torch.bool) if real is None else real[:, None, :, None]
    kept = kept.to(x.device)
    low = torch.where(kept, x, torch.inf).amin(over, keepdim=True)
    high = torch.where(kept, x, -torch.inf).amax(over, keepdim=True)
    empty = low > high
    low, high = torch.where(empty, 0, low), torch.where(empty, 0, high)
    low = _rounded(low, scales, down=True)
    levels = (1 << bits) - 1
    step = (high - low.float()) / levels
    step = _rounded(torch.where(step > 0, step, 1), scales, down=False)
    codes = ((x - low.float()) / step.float()).round().clamp(0, levels)
    return Quantised(pack_bits(codes.to(torch.uint8), bits), bits, low, step)


def _fitting(x: Tensor, scales: torch.dtype) -> Tensor:
    """`x` in the type of scales, or as it is if that is too narrow."""
    narrow = scales == torch.float16 and bool((x.abs() > _HALF_LIMIT).any())
    return x if narrow else x.to(scales)


def _rounded(x: Tensor, scales: torch.dtype, down: bool) -> Tensor:
    """`x` in the type of scales, never above (down) or never below it."""
    near = _fitting(x, scales)
    wrong = near.float() > x if down else near.float() < x
    limit = torch.tensor(-torch.inf if down else torch.inf, dtype=near.dtype, device=x.device)
    return torch.where(wrong, torch.nextafter(near, limit), near)
