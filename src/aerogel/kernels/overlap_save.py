"""Short filters on long sequences, in plain torch: transforms of blocks that overlap.

The memory beyond input and output is that of one group of blocks, whatever the length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aerogel.kernels.fft_conv import compute_dtype

BLOCK_TAPS = 4  # a block is this many times as long as the filter, at least


def overlap_save(u: Tensor, k: Tensor, *, block: int | None = None) -> Tensor:
    """The causal convolution of (batch, channels, length) with (channels, taps), differentiable.

    Args:
        u: floating, any device.
        k: real filters.
        block: length of the transforms, more than taps - 1; default the power of two from four
            times the taps on.

    Returns:
        (batch, channels, length), u's dtype.

    Raises:
        ValueError: the block is not longer than taps - 1.
    """
    taps, length = k.shape[1], u.shape[2]
    block = 1 << (BLOCK_TAPS * taps - 1).bit_length() if block is None else block
    if block < taps:
        raise ValueError(f"block={block}: expected at least taps={taps}")
    dtype, fresh = compute_dtype(u), block - taps + 1
    spectrum = torch.fft.rfft(k.to(dtype), n=block)
    padded = torch.nn.functional.pad(u, (taps - 1, 0))
    parts = []
    for begin in range(0, length, fresh):
        part = padded[..., begin : begin + block].to(dtype)
        y = torch.fft.irfft(torch.fft.rfft(part, n=block) * spectrum, n=block)
        parts.append(y[..., taps - 1 : part.shape[-1]].to(u.dtype))
    return torch.cat(parts, -1) if parts else u * k.sum(1, keepdim=True)
