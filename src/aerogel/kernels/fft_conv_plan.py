"""Which way a long convolution takes through the native kernels, and which frequencies it keeps."""

from __future__ import annotations

import atexit
import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aerogel.kernels._library import native

TILE = 256  # complex values of the smallest native block
GROUP = 16  # complex values whose real parts, then imaginary parts, lie together
_INPUTS = (1, 2, 3, 4, 5, 6, 7, 8, 16)  # segments that the outer step is compiled for
_SEGMENT = 2048  # fastest length of a segment for filters above one tile (measured)


class FrequencyMask(NamedTuple):
    """The frequencies of a filter that are kept; the others are zero.

    Attributes:
        factors: (N1, ..., Np) with product n: bin m = m1 + N1 * (m2 + N2 * (...)).
        zeros: (z1, ..., zp): of each m_i the last z_i values are zero.
        lowpass: the fraction of the lowest frequencies that is kept, in (0, 1].

    The kept bins need not be symmetric; what counts is the real part of the output, that is the
    filter (K[m] + conj K[-m]) / 2 with K zero outside.
    """

    factors: tuple[int, ...] = ()
    zeros: tuple[int, ...] = ()
    lowpass: float = 1.0

    def check(self, n: int) -> None:
        """Raises ValueError unless this is a mask of n frequencies."""
        if not 0.0 < self.lowpass <= 1.0:
            raise ValueError(f"freq_keep={self.lowpass}: expected a fraction in (0, 1]")
        if self.factors and math.prod(self.factors) != n:
            raise ValueError(f"factors={self.factors}: expected a product of n={n}")
        if len(self.zeros) != len(self.factors):
            raise ValueError(f"zeros={self.zeros}: expected one for each of factors={self.factors}")
        for zeros, factor in zip(self.zeros, self.factors, strict=True):
            if not 0 <= zeros < factor:
                raise ValueError(
                    f"zeros={self.zeros}: expected each in [0, {factor}) of its factor"
                )

    @property
    def sparsity(self) -> float:
        """The fraction of zero frequencies."""
        kept = math.prod(1 - z / f for z, f in zip(self.zeros, self.factors, strict=True))
        return 1.0 - kept * self.lowpass

    def kept(self, n: int) -> Tensor:
        """(n,) bool: the bins of the whole spectrum that are kept."""
        bins = torch.arange(n)
        kept = torch.minimum(bins, n - bins) < round(self.lowpass * (n / 2))
        kept |= self.lowpass >= 1.0
        rest = bins
        for factor, zeros in zip(self.factors, self.zeros, strict=True):
            kept &= rest % factor < factor - zeros
            rest = rest // factor
        return kept

    def weights(self, n: int) -> Tensor:
        """(n,) float64: of each bin, 1, 1/2 (only its mirror image or only itself is kept) or 0."""
        kept = self.kept(n).double()
        return (kept + kept.flip(0).roll(1)) / 2


class Route(NamedTuple):
    """How the native kernels are used; see csrc/fft_conv.h."""

    n: int
    outer: int
    blocks: int
    inputs: int
    right_angle: bool
    circular: bool
    mirrored: bool
    mask: FrequencyMask | None  # what remains to be multiplied into spectra


def find_route(
    n: int, length: int, taps: int, causal: bool, mask: FrequencyMask | None
) -> Route | None:
    """The fastest native way, or None where only torch knows one."""
    if mask is not None:
        longest = max(length, taps)
        return _skipping(n, longest, mask) or _circular(n, longest, mask)
    if not causal:
        outer = _outer(n)
        if outer is None or length > n:
            return None
        return Route(n, outer, outer, outer, True, True, False, None)
    size = grid_size(length)
    if 2 * taps <= length:
        least = TILE if taps <= TILE else max(1 << (taps - 1).bit_length(), _SEGMENT)
        size = min(size, least)
    outer = _outer(size)
    assert outer is not None
    return Route(size, outer, outer, outer, True, False, False, None)


def grid_size(length: int) -> int:
    """The smallest size of a native right-angle convolution that holds `length` values."""
    for size in (TILE, 2 * TILE, 3 * TILE):
        if length <= size:
            return size
    part = TILE
    while 7 * part < length:
        part *= 2
    return next(size for size in (4 * part, 5 * part, 6 * part, 7 * part) if length <= size)


def _outer(n: int) -> int | None:
    """Parts of the outer step for a size that is one of `grid_size`, else None."""
    if n < 1 or grid_size(n) != n:
        return None
    odd = n // (n & -n)
    if odd == 1:
        return min(4, n // TILE)
    return odd if odd > 3 or n == 3 * TILE else 6


def _is_part(size: int) -> bool:
    return size >= TILE and size & (size - 1) == 0


def _inputs(length: int, part: int, outer: int) -> int | None:
    needed = -(-length // part)
    return next((i for i in _INPUTS if needed <= i <= outer), None)


def _skipping(n: int, length: int, mask: FrequencyMask) -> Route | None:
    """Only the outer blocks that the mask keeps, where that is at most half of them."""
    if not mask.factors:
        return None
    outer = mask.factors[0]
    blocks, part = outer - mask.zeros[0], n // outer
    inputs = _inputs(length, part, outer)
    if 2 * blocks > outer or not _is_part(part) or inputs is None:
        return None
    inner = any(mask.zeros[1:]) or mask.lowpass < 1.0
    return Route(n, outer, blocks, inputs, False, False, False, mask if inner else None)


def _circular(n: int, length: int, mask: FrequencyMask) -> Route | None:
    """All frequencies of the first half, masked."""
    for outer in (16, 8, 4, 2):
        inputs = _inputs(length, n // outer, outer)
        if n % outer == 0 and _is_part(n // outer) and inputs is not None:
            return Route(n, outer, outer // 2 + 1, inputs, False, False, True, mask)
    return None


@functools.lru_cache(maxsize=32)
def native_plan(route: Route) -> tuple[Any, Tensor | None]:
    """The native plan, and the weights of its spectra: (blocks, n / outer / 16, 2, 16) or None."""
    plan = native().fft_conv_plan(*route[:-1])
    if route.mask is None:
        return plan, None
    bins = torch.empty(plan.spectrum_floats // 2, dtype=torch.int64, device="cpu")
    plan.bins(bins.data_ptr())
    weights = route.mask.weights(route.n) if route.mirrored else route.mask.kept(route.n)
    spread = weights.float()[bins].view(route.blocks, -1, 1, GROUP)
    return plan, spread.expand(-1, -1, 2, -1).contiguous()


atexit.register(native_plan.cache_clear)  # before the native module goes
