"""The few layers that several vision models share."""

from __future__ import annotations

import difflib
from collections.abc import Callable

import torch
from torch import Tensor, nn

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


class DropPath(nn.Module):
    """Stochastic depth: in training a sample's residual branch is left out with probability `rate`.

    Reference:
        Huang et al., "Deep Networks with Stochastic Depth", arXiv 1603.09382.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"rate must be in [0, 1), got {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, ...); what stays is scaled by 1 / (1 - rate)."""
        if not self.training or self.rate == 0.0:
            return x
        kept = torch.empty(x.shape[0], *(1,) * (x.dim() - 1), dtype=x.dtype, device=x.device)
        return x * kept.bernoulli_(1.0 - self.rate).div_(1.0 - self.rate)

    def extra_repr(self) -> str:
        """The rate."""
        return f"rate={self.rate:g}"


def make_divisible(value: float, divisor: int = 8) -> int:
    """Round to a multiple of `divisor` without losing more than 10 % (the MobileNet papers)."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * value else rounded + divisor
