"""The few layers that several vision models share."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from torch import nn

Activation = str | Callable[[], nn.Module]

ACTIVATIONS: dict[str, Callable[..., nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
}


def make_activation(act_layer: Activation) -> nn.Module:
    """An activation from its name or class.

    Raises:
        ValueError: unknown name (the known ones are listed).
    """
    if callable(act_layer):
        return act_layer()
    if act_layer not in ACTIVATIONS:
        near = difflib.get_close_matches(act_layer, ACTIVATIONS, n=5, cutoff=0.0)
        raise ValueError(f"unknown act_layer {act_layer!r}; nearest names: {', '.join(near)}")
    layer = ACTIVATIONS[act_layer]
    return layer(inplace=True) if act_layer.startswith(("relu", "silu", "hard")) else layer()


def conv_norm_act(
    in_chs: int,
    out_chs: int,
    kernel_size: int = 1,
    stride: int = 1,
    groups: int = 1,
    act_layer: Activation = "relu6",
) -> nn.Sequential:
    """Convolution without bias, batch norm, activation; names `0`, `1`, `2` as in torchvision."""
    padding = (kernel_size - 1) // 2
    return nn.Sequential(
        nn.Conv2d(in_chs, out_chs, kernel_size, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(out_chs),
        make_activation(act_layer),
    )


def make_divisible(value: float, divisor: int = 8) -> int:
    """Round to a multiple of `divisor` without losing more than 10 % (the MobileNet papers)."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * value else rounded + divisor
