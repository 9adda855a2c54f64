"""The fused operators between capture and lowering, each defined by plain torch.

Passes rewrite ATen into these, so a graph can be run and compared after every pass.
All of them compute y = act(op(x) + bias (+ residual)).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# The names are those of aerogel.kernels. Each may work in place: it only sees fresh tensors.
IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": torch.relu_,
    "relu6": lambda y: y.clamp_(0.0, 6.0),
    "hardswish": lambda y: F.hardswish(y, inplace=True),
    "silu": lambda y: F.silu(y, inplace=True),
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "sigmoid": torch.sigmoid_,
}
OUT_OF_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": torch.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "sigmoid": torch.sigmoid,
}


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """`F.conv2d` with the epilogue of the module docstring. x: (batch, channels, height, width)."""
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return _epilogue(y, activation, residual)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """`F.linear` with the epilogue of the module docstring. x: (..., in), weight: (out, in)."""
    return _epilogue(F.linear(x, weight, bias), activation, residual)


def activation(x: Tensor, kind: str) -> Tensor:
    """An activation that no layer could absorb."""
    return OUT_OF_PLACE[kind](x)


def _epilogue(y: Tensor, kind: str, residual: Tensor | None) -> Tensor:
    if residual is not None:
        y = y.add_(residual)
    return IN_PLACE[kind](y)
