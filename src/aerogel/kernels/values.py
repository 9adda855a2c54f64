"""How the values of a weight are stored: float32, bfloat16, or int8 with a scale for every output.

Memory-bound products are as fast as their weights are small. Activations and sums stay float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Codes of csrc/stored_values.h.
VALUE_TYPES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


def quantize_rows(weight: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Rounds every row to multiples of its largest magnitude / 127.

    Args:
        weight: (rows, columns) floating point.
        bits: 2 to 8; with fewer than 8 the multiples are of the largest / (2^(bits - 1) - 1).

    Returns:
        int8 values of the weight's shape, and float32 scales (rows,): value * scale is the weight
        to within half a scale. A row of zeros has scale 1.

    Raises:
        ValueError: the weight has infinite values or NaN, or bits outside 2 to 8.
    """
    top = largest_level(bits)
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight: has infinite values or NaN, which int8 cannot hold")
    largest = weight.float().abs().amax(1) if weight.shape[1] else weight.new_zeros(len(weight))
    scales = torch.where(largest > 0, largest.float() / top, 1.0)
    # The smallest denormals divide to zero; then everything in the row is.
    scales = torch.where(scales > 0, scales, 1.0)
    levels = (weight.float() / scales[:, None]).round().clamp(-top, top)
    return levels.to(torch.int8), scales


def largest_level(bits: int) -> int:
    """The largest integer of a symmetric range of so many bits: 127 for 8, 7 for 4."""
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits}: expected 2 to 8")
    return 2 ** (bits - 1) - 1


def check_scales(dtype: torch.dtype, scales: Tensor | None, rows: int) -> None:
    """ValueError unless int8 values, and only they, have a float32 scale for every output."""
    if dtype is not torch.int8:
        if scales is not None:
            raise ValueError(f"scales: expected None for values in {dtype}")
        return
    if scales is None:
        raise ValueError(f"scales: expected float32 ({rows},) for values in int8, got None")
    if tuple(scales.shape) != (rows,) or scales.dtype != torch.float32:
        raise ValueError(
            f"scales: {scales.dtype} of shape {tuple(scales.shape)}, expected float32 ({rows},)"
        )
