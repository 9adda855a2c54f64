"""Fourier transforms as small dense matrix products (Monarch), in plain torch, for any device.

N = N1 * N2, input index j = j1 * N2 + j2, output index m = m1 + N1 * m2:
`Y[m1, m2] = sum_j2 F2[j2, m2] exp(-2 pi i m1 j2 / N) sum_j1 F1[m1, j1] x[j1, j2]`; the sum over j2
is again a transform, of the remaining factors. The spectrum is left as [m1, m2, ...]: what
multiplies it is laid out the same way, so nothing is reordered.

Matrix units make this the fast form on GPUs. On CPUs it does many times the work of a plain
transform and is slower than one; it is here as that form, and as a second reference. Where only a
few m1 are kept, `hybrid` computes those rows by matrix products and the rest by `torch.fft`.

Reference: Fu et al., FlashFFTConv, arXiv 2311.05908. Dao et al., Monarch, arXiv 2204.00595.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from aerogel.kernels.fft_conv import compute_dtype
from aerogel.kernels.fft_conv_plan import FrequencyMask

MAX_FACTOR = 128


def monarch_factors(n: int, order: int = 2) -> tuple[int, ...]:
    """`order` or more factors of n, each at most 128, as equal as they get.

    Raises:
        ValueError: n has a prime factor above 128.
    """
    factors: list[int] = []
    left = n
    for remaining in range(max(order, math.ceil(math.log(max(n, 2), MAX_FACTOR))), 0, -1):
        root = left ** (1 / remaining)
        choices = [d for d in range(1, MAX_FACTOR + 1) if left % d == 0]
        factors.append(min(choices, key=lambda d: abs(math.log(d / root))))
        left //= factors[-1]
    while left > 1:
        choices = [d for d in range(2, MAX_FACTOR + 1) if left % d == 0]
        if not choices:
            raise ValueError(f"n={n}: expected a product of factors up to {MAX_FACTOR}")
        factors.append(choices[-1])
        left //= choices[-1]
    return tuple(factors)


class FFTConvPlan:
    """Matrices and twiddles of one transform, made once.

    Args:
        n: length of the transform.
        factors: (N1, ..., Np) with product n, each at most 128. If the product only divides n, what
            is left is one more dimension of the spectrum, transformed by `torch.fft`.
        dtype: float32 or float64.
        device: where they lie.

    Raises:
        ValueError: the factors' product does not divide n, or one is not in [1, 128].
    """

    def __init__(
        self,
        n: int,
        factors: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if not factors or not all(1 <= f <= MAX_FACTOR for f in factors):
            raise ValueError(f"factors={factors}: expected some, each in [1, {MAX_FACTOR}]")
        if n % math.prod(factors):
            raise ValueError(f"factors={factors}: expected a product that divides n={n}")
        self.n, self.factors = n, tuple(factors)
        self.rest = n // math.prod(factors)
        self.matrices: list[Tensor] = []
        self.twiddles: list[Tensor] = []
        size = n
        for factor in factors:
            self.matrices.append(_turns(factor, factor, factor, dtype, device))
            self.twiddles.append(_turns(factor, size // factor, size, dtype, device))
            size //= factor

    def forward(self, x: Tensor, kept: tuple[int, ...] | None = None) -> Tensor:
        """The spectrum of (..., length <= n) values, zero beyond: (..., kept1, ..., keptp[, rest]).

        Args:
            x: real or complex.
            kept: how many of each m_i to compute, the first ones; default all.
        """
        return self._down(x, self.factors if kept is None else kept, 0, self.n)

    def _down(self, x: Tensor, kept: tuple[int, ...], level: int, size: int) -> Tensor:
        if level == len(self.factors):
            return torch.fft.fft(x, n=size)
        rest = size // self.factors[level]
        rows = -(-x.shape[-1] // rest)  # the others are zero
        if rest == 1:
            return x.to(self.matrices[0].dtype) @ self.matrices[level][: kept[level], :rows].t()
        x = torch.nn.functional.pad(x, (0, rows * rest - x.shape[-1]))
        x = x.unflatten(-1, (rows, rest)).to(self.matrices[0].dtype)
        x = self.matrices[level][: kept[level], :rows] @ x
        return self._down(x * self.twiddles[level][: kept[level]], kept, level + 1, rest)

    def inverse(self, y: Tensor, length: int) -> Tensor:
        """The first `length` values, complex, of a spectrum as `forward` returns it."""
        return self._up(y, 0, self.n, length) / math.prod(self.factors)

    def _up(self, y: Tensor, level: int, size: int, length: int) -> Tensor:
        if level == len(self.factors):
            return torch.fft.ifft(y)[..., :length]
        rest = size // self.factors[level]
        rows = -(-length // rest)
        if rest == 1:
            return y @ self.matrices[level][: y.shape[-1], :rows].conj()
        inner = self._up(y, level + 1, rest, rest)
        kept = inner.shape[-2]
        x = inner * self.twiddles[level][:kept].conj()
        x = self.matrices[level][:kept, :rows].conj().transpose(0, 1) @ x
        return x.flatten(-2)[..., :length]


def _turns(
    rows: int, cols: int, period: int, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """exp(-2 pi i row col / period)."""
    product = torch.outer(torch.arange(rows), torch.arange(cols)) % period
    angle = -2 * math.pi * product.double() / period
    complex_dtype = torch.complex128 if dtype is torch.float64 else torch.complex64
    return torch.polar(torch.ones_like(angle), angle).to(device=device, dtype=complex_dtype)


@functools.lru_cache(maxsize=16)
def _plan(
    n: int, factors: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> FFTConvPlan:
    return FFTConvPlan(n, factors, dtype, device)


def monarch_conv(
    u: Tensor, k: Tensor, n: int, mask: FrequencyMask | None = None, *, hybrid: bool = False
) -> Tensor:
    """The first values of the circular convolution of length n, differentiable.

    Args:
        u: (batch, channels, length).
        k: (channels, taps), real.
        n: length of the transform.
        mask: kept frequencies; left-out blocks of its factors are not computed.
        hybrid: the first factor by matrix products, the others by `torch.fft`.

    Returns:
        (batch, channels, length), u's dtype.

    Raises:
        ValueError: n has no factors up to 128.
    """
    mask = mask or FrequencyMask()
    whole = _small_factors(mask) if mask.factors else tuple((f, f) for f in monarch_factors(n))
    factors, kept = zip(*(whole[:1] if hybrid else whole), strict=True)
    dtype = compute_dtype(u)
    plan = _plan(n, factors, dtype, u.device)
    spectrum = plan.forward(k.to(dtype), kept)
    if mask.sparsity > 0:
        shape = (*factors, plan.rest) if plan.rest > 1 else factors
        spectrum = spectrum * _laid_out(mask.kept(n), shape, kept).to(u.device)
    y = plan.inverse(plan.forward(u.to(dtype), kept) * spectrum, u.shape[-1])
    return y.real.to(u.dtype)


def _small_factors(mask: FrequencyMask) -> tuple[tuple[int, int], ...]:
    """(factor, kept) of each step; a factor above 128 becomes several, all of which are kept."""
    steps: list[tuple[int, int]] = []
    for factor, zeros in zip(mask.factors, mask.zeros, strict=True):
        if factor <= MAX_FACTOR:
            steps.append((factor, factor - zeros))
        else:
            steps += [(each, each) for each in monarch_factors(factor)]
    return tuple(steps)


def _laid_out(bins: Tensor, factors: tuple[int, ...], kept: tuple[int, ...]) -> Tensor:
    """(n,) values by frequency -> (kept1, ..., keptp[, rest])."""
    spread = bins.view(*reversed(factors)).permute(*reversed(range(len(factors))))
    return spread[tuple(slice(each) for each in kept)]
