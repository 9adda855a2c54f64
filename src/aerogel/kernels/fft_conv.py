"""Convolutions whose filters are as long as their sequences, by Fourier transforms.

`y[b, h, i] = sum over j of k[h, j] * u[b, h, i - j]` (causal), or the same with indices modulo n.

Native for float32 on the CPU (csrc/fft_conv.h): a right-angle convolution, which computes modulo
z^n - i and so needs no padding, with gates multiplied on the way in and out; sequences much longer
than the filter go through in segments; blocks of frequencies that a mask leaves out are skipped.
Everything else takes `torch.fft`.

Reference: Fu, Kumbong, Nguyen, Ré, FlashFFTConv: Efficient Convolutions for Long Sequences with
Tensor Cores, arXiv 2311.05908 (gates, partial and frequency-sparse convolutions). Bernstein,
Multidigit multiplication for mathematicians, 2001 (the right-angle convolution).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from aerogel.kernels._library import native, native_in_use
from aerogel.kernels.fft_conv_plan import FrequencyMask, Route, find_route, native_plan

Rows = tuple[int, int, int]
NO_ROWS: Rows = (0, 0, 0)


@dataclasses.dataclass(frozen=True)
class ConvSpec:
    """What is computed, apart from the tensors.

    Attributes:
        n: length of the transform; only a mask, or a circular convolution, depends on it.
        causal: whether y is the first part of the linear convolution (n too long to wrap around).
        mask: frequencies of the filter that are kept; None for all.
    """

    n: int
    causal: bool = True
    mask: FrequencyMask | None = None


def check_conv(
    u: Tensor,
    k: Tensor,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    n: int | None,
    causal: bool,
    mask: FrequencyMask | None,
) -> ConvSpec:
    """The convolution's description; ValueError if the arguments do not fit."""
    if u.dim() != 3:
        raise ValueError(f"u: shape {tuple(u.shape)}, expected (batch, channels, length)")
    if k.dim() != 2 or k.shape[0] != u.shape[1] or k.shape[1] < 1:
        raise ValueError(f"k: shape {tuple(k.shape)}, expected ({u.shape[1]}, taps)")
    for name, each in (("u", u), ("k", k), ("pre_gate", pre_gate), ("post_gate", post_gate)):
        if each is None:
            continue
        if not each.dtype.is_floating_point:
            raise ValueError(f"{name}: {each.dtype}, expected a real floating dtype")
        if each.dtype is torch.float16 and each.is_cpu:
            raise ValueError(f"{name}: float16 on the CPU, expected float32 or bfloat16")
        if "gate" in name and each.shape != u.shape:
            raise ValueError(
                f"{name}: shape {tuple(each.shape)}, expected that of u, {(*u.shape,)}"
            )
    length, taps = u.shape[2], k.shape[1]
    if causal:
        needed = length + taps - 1
        n = max(2 * length, needed) if n is None else n
        if n < needed:
            raise ValueError(f"n={n}: expected at least {needed} for {length} values, {taps} taps")
    else:
        n = length if n is None else n
        if n < max(length, taps):
            raise ValueError(f"n={n}: expected at least {max(length, taps)}")
    if mask is not None:
        mask.check(n)
    return ConvSpec(n, causal, mask)


def fft_conv_reference(
    u: Tensor,
    k: Tensor,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    *,
    n: int | None = None,
    causal: bool = True,
    mask: FrequencyMask | None = None,
) -> Tensor:
    """`fft_conv` by torch.fft: any floating dtype, any device, differentiable."""
    spec = check_conv(u, k, pre_gate, post_gate, n, causal, mask)
    x = u if pre_gate is None else pre_gate * u
    if u.numel() == 0:
        y = x * k.sum(1, keepdim=True).to(u.dtype)  # empty, but differentiable
        return y if post_gate is None else post_gate * y
    dtype = compute_dtype(x)
    spectrum = torch.fft.rfft(k.to(dtype), n=spec.n)
    if mask is not None:
        half = mask.weights(spec.n)[: spec.n // 2 + 1]
        spectrum = spectrum * half.to(x.device, dtype)
    y = torch.fft.irfft(torch.fft.rfft(x.to(dtype), n=spec.n) * spectrum, n=spec.n)
    y = y[..., : u.shape[2]].to(u.dtype)
    return y if post_gate is None else post_gate * y


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 stays; everything shorter is computed in float32."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def native_route(u: Tensor, k: Tensor, spec: ConvSpec) -> Route | None:
    """How the native kernels do it; None if they cannot, or must not."""
    low = (torch.float32, torch.bfloat16)
    fits = u.is_cpu and k.is_cpu and u.dtype in low and k.dtype in low and u.numel() > 0
    if not fits or native_in_use() is None:
        return None
    return find_route(spec.n, u.shape[2], used_taps(u, k, spec), spec.causal, spec.mask)


def _floats(t: Tensor) -> Tensor:
    """float32 with neighbours adjacent in the last dimension."""
    t = t.detach().float()
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _rows(t: Tensor | None) -> Rows:
    return NO_ROWS if t is None else (t.data_ptr(), t.stride(0), t.stride(1))


class Filters:
    """Filters as the native kernels take them, transformed on the way, or (`prepare`) once.

    Args:
        k: (channels, taps or more).
        route: of the convolution.
        taps: how many values of each are used.
    """

    def __init__(self, k: Tensor, route: Route, taps: int) -> None:
        self.route = route
        self.plan, self.mask = native_plan(route)
        self.k = _floats(k)
        address = 0 if self.mask is None else self.mask.data_ptr()
        self.arguments = ((self.k.data_ptr(), 0, self.k.stride(0)), taps, address)
        self.spectra: Tensor | None = None

    def prepare(self, threads: int) -> None:
        """Transforms the filters for all calls to come."""
        spectra = self.k.new_empty(self.k.shape[0], self.plan.spectrum_floats)
        native().fft_spectra(
            self.plan, self.arguments, self.k.shape[0], spectra.data_ptr(), threads
        )
        self.spectra = spectra

    def convolve(
        self,
        x: Tensor,
        gate: Tensor | None,
        out_gate: Tensor | None,
        threads: int,
        *,
        adjoint: bool = False,
    ) -> Tensor:
        """out_gate * conv(gate * x), or the correlation with the filters; of x's dtype."""
        rows = [None if t is None else _floats(t) for t in (x, gate, out_gate)]
        y = torch.empty(x.shape, dtype=torch.float32, device="cpu")
        native().fft_convolve(
            self.plan,
            *map(_rows, rows),
            self.arguments,
            0 if self.spectra is None else self.spectra.data_ptr(),
            y.data_ptr(),
            *x.shape,
            adjoint,
            threads,
        )
        return y.to(x.dtype)


def native_correlate(
    x: Tensor,
    x_gate: Tensor | None,
    dy: Tensor,
    dy_gate: Tensor | None,
    route: Route,
    taps: int,
    threads: int,
) -> Tensor:
    """(channels, taps): the gradient of the filters, float32."""
    plan, weights = native_plan(route)
    rows = [None if t is None else _floats(t) for t in (x, x_gate, dy, dy_gate)]
    dk = torch.empty(x.shape[1], taps, dtype=torch.float32, device="cpu")
    native().fft_correlate(
        plan,
        *map(_rows, rows),
        0 if weights is None else weights.data_ptr(),
        dk.data_ptr(),
        *x.shape,
        taps,
        threads,
    )
    return dk


def fft_conv(
    u: Tensor,
    k: Tensor,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    *,
    n: int | None = None,
    causal: bool = True,
    mask: FrequencyMask | None = None,
    threads: int | None = None,
) -> Tensor:
    """Convolves every channel with a filter of its own: `post_gate * conv(pre_gate * u, k)`.

    Not differentiable; `aerogel.kernels.fft_conv_op` is. A value that is not finite spreads over
    its whole sequence (natively: its segment and the next), as in every convolution by transforms.

    Args:
        u: (batch, channels, length); of any strides, the last dimension is copied unless adjacent.
        k: (channels, taps), real; taps beyond the length do not matter to a causal convolution.
        pre_gate: of u's shape, or None.
        post_gate: of u's shape, or None.
        n: length of the transform; default 2 * length (causal), or length.
        causal: False for the circular convolution of length n.
        mask: which frequencies of the n-point spectrum of the filter are kept, default all.
        threads: default `torch.get_num_threads()`; the result does not depend on it.

    Returns:
        (batch, channels, length), u's dtype. bfloat16 is computed in float32.

    Raises:
        ValueError: shapes, dtypes, n, the mask or threads do not fit.
    """
    spec = check_conv(u, k, pre_gate, post_gate, n, causal, mask)
    threads = torch.get_num_threads() if threads is None else threads
    if threads < 1:
        raise ValueError(f"threads={threads}: expected at least 1")
    route = native_route(u, k, spec)
    if route is None:
        return fft_conv_reference(
            u, k, pre_gate, post_gate, n=spec.n, causal=causal, mask=mask
        ).detach()
    filters = Filters(k, route, used_taps(u, k, spec))
    return filters.convolve(u, pre_gate, post_gate, threads)


def used_taps(u: Tensor, k: Tensor, spec: ConvSpec) -> int:
    """How many of the filter's values reach the output."""
    linear = spec.causal and spec.mask is None
    return min(k.shape[1], u.shape[2]) if linear else k.shape[1]


class PreparedFilter:
    """A filter transformed once, for many inputs of one length; not differentiable.

    Args:
        k: (channels, taps).
        length: of the sequences.
        n: as in `fft_conv`.
        causal: as in `fft_conv`.
        mask: as in `fft_conv`.

    Raises:
        ValueError: as `fft_conv`.
    """

    def __init__(
        self,
        k: Tensor,
        length: int,
        *,
        n: int | None = None,
        causal: bool = True,
        mask: FrequencyMask | None = None,
    ) -> None:
        like = k.new_empty(1, k.shape[0], length)
        self.k, self.length = k.detach(), length
        self.spec = check_conv(like, k, None, None, n, causal, mask)
        self.filters: Filters | None = None
        route = native_route(like, k, self.spec)
        if route is not None:
            self.filters = Filters(k, route, used_taps(like, k, self.spec))
            self.filters.prepare(torch.get_num_threads())

    def __call__(
        self, u: Tensor, pre_gate: Tensor | None = None, post_gate: Tensor | None = None
    ) -> Tensor:
        """The convolution of (batch, channels, length) with the prepared filter."""
        n, causal, mask = self.spec.n, self.spec.causal, self.spec.mask
        check_conv(u, self.k, pre_gate, post_gate, n, causal, mask)
        if u.shape[2] != self.length:
            raise ValueError(f"u: length {u.shape[2]}, expected {self.length}")
        if self.filters is None or native_route(u, self.k, self.spec) != self.filters.route:
            return fft_conv(u, self.k, pre_gate, post_gate, n=n, causal=causal, mask=mask)
        return self.filters.convolve(u, pre_gate, post_gate, torch.get_num_threads())
