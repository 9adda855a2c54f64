"""Training as if weights and activations were integers: rounded forward, straight through backward.

Weights are symmetric per output, their scales computed anew from the weight that stands before the
quantiser: behind a mask that is the masked weight, so that zeros stay zero. Activations are
symmetric per tensor, with a range that follows the data in training and stands still in evaluation.

    attach_weight_quantiser(ref, bits=8)     # after the mask, if there is one
    quantise_input(module, bits=8)           # of a layer with one tensor as input
    QuantisedAttention(core)                 # both operands of both products of an attention

Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", arXiv 1712.05877.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from aerogel.arguments import check_number
from aerogel.kernels import largest_level, quantize_rows
from aerogel.sparsity.blocks import ForwardFn, run_batch
from aerogel.sparsity.select import ParamRef

RANGE_MOMENTUM = 0.9
# Attention's products keep 8 bits whatever the layers have.
ATTENTION_BITS = 8
INPUT_QUANTISER = "input_quantiser"


class _RoundRows(torch.autograd.Function):
    """levels * scales of every output forward; the gradient as it is (nothing is clipped)."""

    @staticmethod
    def forward(weight: Tensor, bits: int) -> Tensor:
        levels, scales = quantize_rows(weight.detach().flatten(1), bits)
        return (levels * scales[:, None]).to(weight.dtype).reshape(weight.shape)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        pass

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return gradient, None


class _RoundTensor(torch.autograd.Function):
    """Rounded and clipped forward; the gradient where nothing was clipped."""

    @staticmethod
    def forward(x: Tensor, scale: Tensor, top: int) -> Tensor:
        return (x / scale).round().clamp(-top, top) * scale

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        x, scale, top = inputs
        ctx.save_for_backward(x.abs() <= scale * top)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None


class FakeQuantize(nn.Module):
    """Parametrization W -> the nearest weight of so many bits, a scale for every output.

    Args:
        bits: 2 to 8; the levels are the whole numbers up to 2^(bits - 1) - 1 either way.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        largest_level(bits)
        self.bits, self.enabled = bits, True

    def forward(self, weight: Tensor) -> Tensor:
        """weight: (out, ...) -> the same shape."""
        return _RoundRows.apply(weight, self.bits) if self.enabled else weight

    def extra_repr(self) -> str:
        """The bits."""
        return f"bits={self.bits}"


class ActivationQuantiser(nn.Module):
    """x -> the nearest tensor of so many bits, one scale for all of it.

    The range is a moving average of the largest magnitude; it moves in training (and under
    `observing`) only.

    Args:
        bits: 2 to 8.
        percentile: take this percentile of the magnitudes (for example 99.99) in place of the
            largest; what is beyond it is clipped.
        momentum: of the moving average.
    """

    largest: Tensor

    def __init__(
        self, bits: int, percentile: float | None = None, momentum: float = RANGE_MOMENTUM
    ) -> None:
        super().__init__()
        if percentile is not None:
            check_number("percentile", percentile, "(0, 100]")
        check_number("momentum", momentum, "[0, 1)")
        self.bits, self.percentile, self.momentum = bits, percentile, momentum
        self.top = largest_level(bits)
        self.enabled, self.observes = True, False
        # NaN: nothing seen yet.
        self.register_buffer("largest", torch.tensor(math.nan))

    def forward(self, x: Tensor) -> Tensor:
        """x: any shape.

        Raises:
            RuntimeError: in evaluation, before any tensor was seen.
        """
        if not self.enabled:
            return x
        if self.training or self.observes:
            self._observe(x.detach())
        elif bool(self.largest.isnan()):
            raise RuntimeError("an activation quantiser has no range yet: train or calibrate first")
        return _RoundTensor.apply(x, self.scale.to(x.dtype), self.top)

    @property
    def scale(self) -> Tensor:
        """What one level is worth (0-dim)."""
        return torch.where(self.largest > 0, self.largest / self.top, torch.ones_like(self.largest))

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        if x.numel() == 0:
            return
        magnitude = x.abs().float()
        if self.percentile is None:
            seen = magnitude.max()
        else:
            rank = math.ceil(self.percentile / 100.0 * magnitude.numel())
            seen = magnitude.flatten().kthvalue(rank).values
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(seen, torch.distributed.ReduceOp.MAX)
        first = self.largest.isnan()
        moved = torch.lerp(seen, self.largest, self.momentum)
        self.largest.copy_(torch.where(first, seen, moved))

    def extra_repr(self) -> str:
        """Bits and percentile."""
        return f"bits={self.bits}, percentile={self.percentile}"


class AttentionQuantisers(nn.Module):
    """softmax(q k^T * scale + mask) v in rounded q, k, v and probabilities; scores stay exact.

    Args:
        bits: of all four operands.
        percentile: see `ActivationQuantiser`.
    """

    def __init__(self, bits: int = ATTENTION_BITS, percentile: float | None = None) -> None:
        super().__init__()
        self.query, self.key, self.value, self.probabilities = (
            ActivationQuantiser(bits, percentile) for _ in range(4)
        )

    def product(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float, mask: Tensor | None
    ) -> Tensor:
        """q, k, v: (B, heads, N, head_dim), mask added to the scores -> as q."""
        scores = self.query(q) @ self.key(k).transpose(-2, -1) * scale
        scores = scores if mask is None else scores + mask
        probabilities = F.dropout(scores.softmax(-1), dropout, self.training)
        return self.probabilities(probabilities) @ self.value(v)


class QuantisedAttention(AttentionQuantisers):
    """An attention product in rounded operands.

    Args:
        core: the attention product it stands for: a module with `scale` (and `dropout`) that is
            called with queries, keys and values.
        bits: of all four operands.
        percentile: see `ActivationQuantiser`.
    """

    def __init__(
        self, core: nn.Module, bits: int = ATTENTION_BITS, percentile: float | None = None
    ) -> None:
        super().__init__(bits, percentile)
        self.core = core
        self.scale, self.dropout = float(core.scale), float(getattr(core, "dropout", 0.0))  # type: ignore[arg-type]

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v: (B, heads, N, head_dim) -> the same shape."""
        if not self.query.enabled:
            return self.core(q, k, v)
        return self.product(q, k, v, self.scale, self.dropout, None)


def attach_weight_quantiser(ref: ParamRef, bits: int) -> FakeQuantize:
    """Put a quantiser behind whatever parametrizations the weight has."""
    quantiser = FakeQuantize(bits)
    for module, attribute in ref.places:
        parametrize.register_parametrization(module, attribute, quantiser)
    return quantiser


def quantise_input(
    module: nn.Module, bits: int, percentile: float | None = None
) -> ActivationQuantiser:
    """Round the input of a layer, which gets the quantiser as a child of its own.

    Raises:
        ValueError: its input is rounded already.
    """
    if hasattr(module, INPUT_QUANTISER):
        raise ValueError(f"the input of this {type(module).__name__} is quantised already")
    quantiser = ActivationQuantiser(bits, percentile)
    quantiser.train(module.training)
    module.add_module(INPUT_QUANTISER, quantiser)
    module.register_forward_pre_hook(_round_input)
    return quantiser


def _round_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (getattr(module, INPUT_QUANTISER)(args[0]), *args[1:])


def remove_activation_quantisers(model: nn.Module) -> None:
    """Take all of them off again: inputs as they come, attention products as they were."""
    for module in list(model.modules()):
        if INPUT_QUANTISER in module._modules:
            del module._modules[INPUT_QUANTISER]
            hooks = module._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if hook is _round_input]:
                del hooks[key]
        for name, child in list(module._modules.items()):
            if isinstance(child, QuantisedAttention):
                module._modules[name] = child.core


def quantisers(model: nn.Module) -> Iterator[FakeQuantize | ActivationQuantiser]:
    """All of weights and activations."""
    kinds = (FakeQuantize, ActivationQuantiser)
    return (module for module in model.modules() if isinstance(module, kinds))


def activation_quantisers(model: nn.Module) -> Iterator[tuple[str, ActivationQuantiser]]:
    """Those of activations, by name."""
    for name, module in model.named_modules():
        if isinstance(module, ActivationQuantiser):
            yield name, module


def enable_quantisers(model: nn.Module, enabled: bool = True) -> None:
    """Let all quantisers round, or let all pass everything through."""
    for quantiser in quantisers(model):
        quantiser.enabled = enabled


@contextmanager
def observing(model: nn.Module) -> Iterator[None]:
    """Ranges of activations move with what is seen, in evaluation too."""
    found = [quantiser for _, quantiser in activation_quantisers(model)]
    for quantiser in found:
        quantiser.observes = True
    try:
        yield
    finally:
        for quantiser in found:
            quantiser.observes = False


@torch.no_grad()
def calibrate_activations(
    model: nn.Module, batches: Iterable[Any], *, forward: ForwardFn = run_batch
) -> None:
    """Find the ranges of activations on some batches, in eval mode and without gradients.

    Args:
        model: with quantisers.
        batches: as `run_batch` takes them.
        forward: how to run one.

    Raises:
        ValueError: no batch.
    """
    mode, count = model.training, 0
    model.eval()
    try:
        with observing(model):
            for batch in batches:
                forward(model, batch)
                count += 1
    finally:
        model.train(mode)
    if count == 0:
        raise ValueError("batches is empty; calibration needs at least one batch")
