"""Batch norm over the whole global batch, on any backend.

`torch.nn.SyncBatchNorm` runs on GPUs only. Here the mean and the variance are all-reduced with an
operation that has a gradient, so that N processes compute what one process would on the same global
batch, on CPU with gloo as well.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


class _AllReduceSum(torch.autograd.Function):
    """Sum over processes; the gradient of a sum that all of them use is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


@contextlib.contextmanager
def synchronized_batch_norm(model: nn.Module) -> Iterator[nn.Module]:
    """While active, all batch norms of `model` share their statistics over all processes.

    Parameters, buffers and state-dict names stay as they are. Without several processes nothing
    changes.
    """
    layers: list[_BatchNorm] = []
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for layer in layers:
        layer.forward = functools.partial(_forward, layer)  # type: ignore[method-assign]
    try:
        yield model
    finally:
        for layer in layers:
            del layer.forward


def _forward(layer: _BatchNorm, x: Tensor) -> Tensor:
    if not layer.training and layer.track_running_stats:
        return type(layer).forward(layer, x)
    dims = [d for d in range(x.dim()) if d != 1]
    count = torch.tensor([x.numel() / x.shape[1]], dtype=x.dtype, device=x.device)
    sums = _AllReduceSum.apply(torch.cat([x.sum(dims), count]))
    total = sums[-1].detach()
    mean = sums[:-1] / total
    shape = [1, -1] + [1] * (x.dim() - 2)
    centered = x - mean.view(shape)
    # Two passes: the mean of squares minus the squared mean loses digits in float32.
    var = _AllReduceSum.apply(centered.square().sum(dims)) / total
    if layer.training and layer.track_running_stats:
        _update_running(layer, mean.detach(), var.detach(), total)
    y = centered * torch.rsqrt(var + layer.eps).view(shape)
    if layer.affine:
        y = torch.addcmul(layer.bias.view(shape), y, layer.weight.view(shape))
    return y


@torch.no_grad()
def _update_running(layer: _BatchNorm, mean: Tensor, var: Tensor, total: Tensor) -> None:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    assert layer.num_batches_tracked is not None
    layer.num_batches_tracked += 1
    momentum = layer.momentum
    if momentum is None:  # cumulative average
        momentum = 1.0 / float(layer.num_batches_tracked)
    unbiased = var * (total / (total - 1).clamp_min(1))
    layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), momentum)
    layer.running_var.lerp_(unbiased.to(layer.running_var.dtype), momentum)
