"""Labels: a few channels of every key, in full precision or packed to 8, 4 or 2 bits.

Quantisation is asymmetric, per token and head over the label's channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aerogel import kernels

LABEL_BITS = (2, 4, 8, 16)


class PackedLabels(NamedTuple):
    """Labels of few bits.

    Attributes:
        codes: (..., L, r * bits / 8) uint8, the first channel in the lowest bits.
        span: (..., L, 2) float32, the smallest value and the step of each label.
    """

    codes: Tensor
    span: Tensor


def gather_channels(x: Tensor, channels: Tensor) -> Tensor:
    """A few channels of every head.

    Args:
        x: (B, H, L, D).
        channels: (Hlab, r) int64; Hlab is H, or a multiple of it (key heads read by their group).

    Returns:
        (B, Hlab, L, r), contiguous.
    """
    batch, heads, length, _ = x.shape
    groups = channels.shape[0] // heads
    index = channels.reshape(1, heads, 1, -1)
    if batch != 1 or length != 1:
        index = index.expand(batch, -1, length, -1)
    taken = x.gather(-1, index)
    if groups == 1:
        return taken
    return taken.unflatten(-1, (groups, -1)).transpose(2, 3).flatten(1, 2).contiguous()


def pack_labels(x: Tensor, bits: int) -> PackedLabels:
    """Quantises labels (..., r).

    Raises:
        ValueError: `bits` is not 2, 4 or 8, or r codes do not fill whole bytes.
    """
    return PackedLabels(*kernels.pack_codes(x, bits))


def unpack_codes(codes: Tensor, bits: int) -> Tensor:
    """(..., n) bytes to (..., n * 8 / bits) uint8 codes."""
    mask = (1 << bits) - 1
    parts = [(codes >> shift) & mask for shift in range(0, 8, bits)]
    return torch.stack(parts, -1).flatten(-2)


def unpack_labels(packed: PackedLabels, bits: int) -> Tensor:
    """The labels (..., r) float32 that the codes stand for."""
    codes = unpack_codes(packed.codes, bits).float()
    return codes * packed.span[..., 1:] + packed.span[..., :1]


def label_scores(q: Tensor, labels: Tensor | PackedLabels, bits: int = 16) -> Tensor:
    """Approximate logits of all keys from their labels alone.

    Args:
        q: (B, Hq, Lq, r) the queries' same channels.
        labels: (B, Hlab, L, r), or packed; Hlab is Hq or divides it.
        bits: of packed labels.

    Returns:
        (B, Hq, Lq, L) float32, scaled by ``r ** -0.5``.
    """
    if isinstance(labels, PackedLabels):
        return kernels.label_scores(q, labels.codes, labels.span, bits=bits)
    return kernels.label_scores(q, labels)
