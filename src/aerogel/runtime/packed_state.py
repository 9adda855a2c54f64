"""Packed weights among the tensors of a checkpoint, under the names other tools expect.

A `BlockRowWeight` becomes its dense values, whose zeros the file stores as bits, and a mask of what
is stored. int8 values have their scales beside them as `compressed-tensors` names and shapes those
of its int-quantized weights: `fc.weight` (int8) and `fc.weight_scale` (float32, (out, 1)).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from aerogel.kernels import BlockRowWeight

_SCALE = "_scale"


def spread_packed(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The state with packed weights as tensors, and the masks of those.

    Raises:
        ValueError: the name that a weight's scales would take is taken.
    """
    spread: dict[str, Any] = {}
    masks: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(value, BlockRowWeight):
            spread[name] = value
            continue
        value.check()
        spread[name], masks[name] = value.stored()
        if value.scales is not None:
            if name + _SCALE in state:
                raise ValueError(f"obj has the key {name + _SCALE!r}, which {name!r} needs")
            spread[name + _SCALE] = value.scales[:, None]
    return spread, masks


def gather_packed(
    state: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> dict[str, Tensor | BlockRowWeight]:
    """The inverse: matrices with a mask become packed weights, and take their scales with them.

    An int8 matrix without scales, and what is no matrix or 1x1 kernel, stays a tensor.
    """
    gathered: dict[str, Tensor | BlockRowWeight] = dict(state)
    for name, mask in masks.items():
        tensor = state[name]
        scales = state.get(name + _SCALE) if tensor.dtype is torch.int8 else None
        matrix = tensor.dim() >= 2 and all(n == 1 for n in tensor.shape[2:])
        if not matrix or not (tensor.is_floating_point() or _fit(scales, tensor)):
            continue
        gathered[name] = BlockRowWeight.pack(tensor, scales=scales, mask=mask)
        if scales is not None:
            del gathered[name + _SCALE]
    return gathered


def _fit(scales: Tensor | None, tensor: Tensor) -> bool:
    """Whether there is a float32 scale for every output."""
    return (
        scales is not None
        and scales.dtype is torch.float32
        and tuple(scales.shape) in ((len(tensor),), (len(tensor), 1))
    )
