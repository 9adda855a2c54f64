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


def to_tokens(x: Tensor) -> Tensor:
    """Planes as tokens: (batch, channels, height, width) -> (batch, height * width, channels)."""
    return x.flatten(2).transpose(1, 2)


# Where the heads of an operand lie: (how many, features of each, first feature).
Heads = tuple[int, int, int]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    heads: tuple[Heads, Heads, Heads],
    scale: float,
    empty_is_zero: bool,
) -> Tensor:
    """Softmax attention on token-major tensors, which may be parts of one.

    Args:
        q: (batch, queries, features).
        k: (batch, keys, features).
        v: (batch, keys, features).
        mask: (batch, heads or 1, queries or 1, keys), added to the scores, or None.
        heads: Of q, k and v. Those of k and v may be fewer: neighbouring heads of q share them.
        scale: Of the scores.
        empty_is_zero: A query whose mask is all -inf gives zeros, else NaN.

    Returns:
        (batch, queries, heads * features of a value).
    """
    of_q, of_k, of_v = map(_split_heads, (q, k, v), heads)
    shared = heads[0][0] // heads[1][0]
    if shared > 1:
        of_k, of_v = of_k.repeat_interleave(shared, 1), of_v.repeat_interleave(shared, 1)
    if empty_is_zero:
        y = F.scaled_dot_product_attention(of_q, of_k, of_v, mask, scale=scale)
    else:
        scores = of_q @ of_k.transpose(-1, -2) * scale
        y = (scores if mask is None else scores + mask).softmax(-1) @ of_v
    return y.transpose(1, 2).flatten(2)


def _split_heads(x: Tensor, heads: Heads) -> Tensor:
    count, size, first = heads
    return x[..., first : first + count * size].unflatten(-1, (count, size)).transpose(1, 2)


def additive_mask(mask: Tensor, fill: float, batch: int) -> Tensor:
    """A mask as `attention` takes it: (batch, heads or 1, queries or 1, keys) float32.

    Args:
        mask: Up to four dimensions. Of booleans: what a query may see, else `fill` is added. Of
            floats: what is added.
        fill: As above.
        batch: Size of the result's first dimension.
    """
    mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill_(
            ~mask, fill
        )
    return mask.expand(batch, *mask.shape[1:])


def _epilogue(y: Tensor, kind: str, residual: Tensor | None) -> Tensor:
    if residual is not None:
        y = y.add_(residual)
    return IN_PLACE[kind](y)
