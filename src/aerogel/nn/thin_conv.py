"""3-D convolutions whose kernel is longer than 1 along one axis only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def conv_along(
    x: Tensor, weight: Tensor, bias: Tensor | None, axis: int, options: Sequence[Any]
) -> Tensor:
    """A 3-D convolution that works along one axis only, as a 2-D one of the same numbers.

    In channels-last order an axis that is left alone merges with its neighbour, or with the batch,
    without a copy. torch's 3-D convolution runs kernels this thin several times slower.

    Args:
        x: (B, C, D, H, W).
        weight: (out, in / groups, k..), 1 along the other two axes.
        bias: (out,), or None.
        axis: 0, 1 or 2, of D, H, W.
        options: stride, padding and dilation of the three axes, and groups.

    Returns:
        (B, out, ..), in channels-last order.
    """
    stride, padding, dilation, groups = options
    rows = x.contiguous(memory_format=torch.channels_last_3d).movedim(1, -1)
    batch, depth, height, width, channels = rows.shape
    planes = (
        (batch, depth, height * width),
        (batch * depth, height, width),
        (batch, depth * height, width),
    )
    second = axis == 2  # whether the axis is the plane's second

    def in_plane(sizes: Sequence[int], other: int) -> list[int]:
        return [other, sizes[axis]] if second else [sizes[axis], other]

    y = F.conv2d(
        rows.reshape(*planes[axis], channels).movedim(-1, 1),
        weight.reshape(*weight.shape[:2], *in_plane(weight.shape[2:], 1)),
        bias,
        in_plane(stride, 1),
        in_plane(padding, 0),
        in_plane(dilation, 1),
        groups,
    )
    sides = [depth, height, width]
    sides[axis] = y.shape[2 + second]
    return y.movedim(1, -1).reshape(batch, *sides, y.shape[1]).movedim(-1, 1)
