"""A priori compression as recipes and the arena run it.

The system is `aerogel.nn.a_priori_compression`. Here a sparsity is the share of a kernel's numbers
that its one-way filters do without: it decides the channels between them, layer by layer. Nothing
is zero; the network trains as any other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from aerogel.nn.a_priori_compression import compress_a_priori
from aerogel.nn.oneway_conv import OneWayConv
from aerogel.pruning.method import Goal, RewritingMethod, Unpruned

_CONVS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def chain_rank(conv: Any, density: float) -> int:
    """Channels between the one-way filters at which they have this share of the kernel's numbers.

    Args:
        conv: a plain convolution with kernel k_1 x .. x k_d, d = 2 or 3.
        density: share of the kernel's numbers, in (0, 1].

    Returns:
        The largest rank m with ``m * (in * k_1 + out * k_d) + (d - 2) * m^2 * k_2`` numbers within
        the share, at least 1.
    """
    first, *inner, last = conv.kernel_size
    budget = density * conv.weight.numel()
    linear = conv.in_channels * first + conv.out_channels * last
    square = sum(inner)
    if not square:
        return max(1, math.floor(budget / linear))
    return max(1, math.floor((math.sqrt(linear**2 + 4 * square * budget) - linear) / (2 * square)))


def _replaced(model: nn.Module) -> dict[str, nn.Module]:
    """Convolutions with one-way filters, but the first: by name."""
    found = [(name, each) for name, each in model.named_modules() if type(each) in _CONVS]
    return {name: conv for name, conv in found[1:] if _factors(conv)}


def _factors(conv: Any) -> bool:
    return conv.groups == 1 and sum(side > 1 for side in conv.kernel_size) > 1


def _unfit(model: nn.Module) -> str | None:
    found = _replaced(model)
    return None if found else "it has no convolution, beside the first, that one-way filters divide"


def _rewrite(model: nn.Module, weights: Sequence[str], sparsity: float) -> nn.Module:
    named = {name.rpartition(".")[0] for name in weights}
    layers = [name for name, conv in model.named_modules() if name in named and _is_plain(conv)]
    others = [n for n, each in model.named_modules() if type(each) in _CONVS and n not in layers]
    return compress_a_priori(
        model, rank=lambda _, conv: chain_rank(conv, 1.0 - sparsity), skip=others
    )


def _is_plain(module: nn.Module) -> bool:
    return type(module) in _CONVS and _factors(module)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, goal: Goal) -> Unpruned:
    if not any(isinstance(module, OneWayConv) for module in model.modules()):
        raise ValueError("model: it has no one-way filters; train what METHOD.rewrite gives")
    return Unpruned(optimizer)


METHOD = RewritingMethod(
    slug="a-priori-compression",
    build=_train,
    patterns=("unstructured",),
    proposes=lambda model: tuple(f"{name}.weight" for name in _replaced(model)),
    unfit=_unfit,
    rewrite=_rewrite,
    saves="fewer weights",
)
