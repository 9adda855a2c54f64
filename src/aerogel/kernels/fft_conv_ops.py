"""`torch.ops.aerogel.fft_conv` and its gradient: what training, export and compilation call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aerogel.kernels._calls import needs_grad
from aerogel.kernels.fft_conv import (
    ConvSpec,
    Filters,
    check_conv,
    fft_conv,
    fft_conv_reference,
    native_correlate,
    native_route,
    used_taps,
)
from aerogel.kernels.fft_conv_plan import FrequencyMask


def _mask(factors: list[int], zeros: list[int], lowpass: float) -> FrequencyMask | None:
    if not factors and lowpass >= 1.0:
        return None
    return FrequencyMask(tuple(factors), tuple(zeros), lowpass)


@torch.library.custom_op("aerogel::fft_conv", mutates_args=())
def fft_conv_op(
    u: Tensor,
    k: Tensor,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    n: int,
    causal: bool,
    factors: list[int],
    zeros: list[int],
    lowpass: float,
) -> Tensor:
    """`aerogel.kernels.fft_conv` with a mask in parts; differentiable once."""
    mask = _mask(factors, zeros, lowpass)
    return fft_conv(u, k, pre_gate, post_gate, n=n, causal=causal, mask=mask)


@fft_conv_op.register_fake
def _(
    u: Tensor,
    k: Tensor,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    n: int,
    causal: bool,
    factors: list[int],
    zeros: list[int],
    lowpass: float,
) -> Tensor:
    return torch.empty_like(u, memory_format=torch.contiguous_format)


@torch.library.custom_op("aerogel::fft_conv_backward", mutates_args=())
def fft_conv_backward_op(
    dy: Tensor,
    u: Tensor,
    k: Tensor,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    n: int,
    causal: bool,
    factors: list[int],
    zeros: list[int],
    lowpass: float,
    wanted: list[bool],
) -> list[Tensor]:
    """The gradients of u, k, pre_gate, post_gate; empty where not wanted."""
    spec = ConvSpec(n, causal, _mask(factors, zeros, lowpass))
    if native_route(u, k, spec) is None:
        return _reference_gradients(dy, (u, k, pre_gate, post_gate), spec, wanted)
    return _native_gradients(dy, u, k, pre_gate, post_gate, spec, wanted)


@fft_conv_backward_op.register_fake
def _(
    dy: Tensor,
    u: Tensor,
    k: Tensor,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    n: int,
    causal: bool,
    factors: list[int],
    zeros: list[int],
    lowpass: float,
    wanted: list[bool],
) -> list[Tensor]:
    likes = (u, k, u, u)
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if want else t.new_empty(0)
        for t, want in zip(likes, wanted, strict=True)
    ]


def _reference_gradients(
    dy: Tensor, inputs: tuple[Tensor | None, ...], spec: ConvSpec, wanted: list[bool]
) -> list[Tensor]:
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
        u, k, pre_gate, post_gate = leaves
        assert u is not None
        assert k is not None
        y = fft_conv_reference(
            u, k, pre_gate, post_gate, n=spec.n, causal=spec.causal, mask=spec.mask
        )
        chosen = [t for t, want in zip(leaves, wanted, strict=True) if want and t is not None]
        found = iter(torch.autograd.grad(y, chosen, dy))
    # A view of the input's storage may not leave an operator.
    return [next(found).contiguous().clone() if want else dy.new_empty(0) for want in wanted]


def _native_gradients(
    dy: Tensor,
    u: Tensor,
    k: Tensor,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    spec: ConvSpec,
    wanted: list[bool],
) -> list[Tensor]:
    route = native_route(u, k, spec)
    assert route is not None
    taps, threads = used_taps(u, k, spec), torch.get_num_threads()
    of_u, of_k, of_pre, of_post = (dy.new_empty(0) for _ in range(4))
    filters = Filters(k, route, taps)
    if wanted[0] and not wanted[2]:
        of_u = filters.convolve(dy, post_gate, pre_gate, threads, adjoint=True)
    elif wanted[2]:
        assert pre_gate is not None
        product = filters.convolve(dy, post_gate, None, threads, adjoint=True)
        of_pre = product * u
        of_u = product * pre_gate if wanted[0] else of_u
    if wanted[1]:
        of_k = native_correlate(u, pre_gate, dy, post_gate, route, taps, threads).to(k.dtype)
        of_k = torch.nn.functional.pad(of_k, (0, k.shape[1] - taps)) if taps < k.shape[1] else of_k
    if wanted[3]:  # the convolution is computed again rather than kept
        of_post = filters.convolve(u, pre_gate, dy, threads)
    return [of_u, of_k, of_pre, of_post]


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.settings = inputs[4:]


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:4])
    found = torch.ops.aerogel.fft_conv_backward(dy, *ctx.saved_tensors, *ctx.settings, wanted)
    gradients = [g if want else None for g, want in zip(found, wanted, strict=True)]
    return (*gradients, *(None,) * 5)


fft_conv_op.register_autograd(_backward, setup_context=_context)


def fft_conv_trainable(
    u: Tensor,
    k: Tensor,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    *,
    n: int | None = None,
    causal: bool = True,
    mask: FrequencyMask | None = None,
) -> Tensor:
    """`fft_conv`, differentiable; arguments and errors are the same.

    Only inputs, gates and filters are kept for the backward pass.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and not needs_grad((u, k, pre_gate, post_gate)):
        return fft_conv(u, k, pre_gate, post_gate, n=n, causal=causal, mask=mask)
    spec = check_conv(u, k, pre_gate, post_gate, n, causal, mask)
    if not compiling and native_route(u, k, spec) is None:  # differentiable any number of times
        return fft_conv_reference(u, k, pre_gate, post_gate, n=n, causal=causal, mask=mask)
    parts = mask or FrequencyMask()
    settings = (spec.n, causal, list(parts.factors), list(parts.zeros), parts.lowpass)
    return torch.ops.aerogel.fft_conv(u, k, pre_gate, post_gate, *settings)
