"""Keys and values in few bits: by channel, and by token after the channels are made alike.

Paper: He, Zhang, Wu, Liu, Zhou and Zhuang, "ZipCache: Accurate and Efficient KV Cache Quantization
with Salient Token Identification", 2024, arXiv 2405.14256.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from aerogel.kernels.attention_codes import TILE_TOKENS, TokenCodes, pack_tokens

BITS = (2, 4, 8, 16)
_HALF_LIMIT = 6e4  # numbers beyond are kept in float32


def quantise_keys(
    k: Tensor, bits: int, real: Tensor | None = None, scales: torch.dtype = torch.float16
) -> TokenCodes:
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
) -> TokenCodes:
    """Values (B, H, n, D) with one range per token, after division by `channel`.

    The error of an entry is at most half the token's step times the channel's factor.
    """
    plain = _coded(v.float() / channel.float(), bits, (1, 3), real, scales)
    short = -v.shape[2] % TILE_TOKENS
    low, step = (nn.functional.pad(t, (0, 0, 0, short)) for t in (plain.low, plain.step))
    return replace(plain, low=low, step=step, channel=channel)


def _coded(
    x: Tensor, bits: int, over: tuple[int, ...], real: Tensor | None, scales: torch.dtype
) -> TokenCodes:
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
    packed = pack_tokens(codes.to(torch.uint8), bits)
    return TokenCodes(packed, bits, x.shape[2], low.contiguous(), step.contiguous())


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
