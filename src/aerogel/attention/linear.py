"""Positive random features of the softmax kernel, and linear attention over them.

Papers: Choromanski et al., "Rethinking Attention with Performers", 2020, arXiv 2009.14794 (the
features, used alone); Chen et al., arXiv 2110.15343 (their scales kept as logarithms).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from aerogel.attention.softmax import accumulator

_CHUNK = 128  # rows between two kept prefix sums


class PositiveRandomFeatures(nn.Module):
    """Features with ``E[phi(q) . phi(k)] = exp(scale * q . k)``, all positive.

    The projection is drawn once, is part of the state and is never redrawn. Features are float32
    (float64 for float64 tensors) whatever the input, and come with the logarithm of their scale.

    Args:
        dim: size of q and k.
        num_features: even; default ``dim * ln(dim)`` rounded down to an even number.
        orthogonal: rows of the projection are orthogonal in groups of `dim`.
        norm: length of a row: that of a "gaussian" vector, or "sqrt_d" always.
        softmax_scale: factor of the logits, default ``dim ** -0.5``.
        eps: added to every scaled feature, so that none is 0.
        generator: draws the projection; default torch's own.

    Raises:
        ValueError: `num_features` is odd or below 2, `norm` is unknown, or `eps` is negative.

    Reference:
        The hyperbolic features of Choromanski et al., arXiv 2009.14794.
    """

    projection: Tensor

    def __init__(
        self,
        dim: int,
        num_features: int | None = None,
        orthogonal: bool = True,
        norm: Literal["gaussian", "sqrt_d"] = "gaussian",
        softmax_scale: float | None = None,
        eps: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if num_features is None:
            num_features = max(2, int(dim * math.log(dim)) // 2 * 2)
        if num_features < 2 or num_features % 2:
            raise ValueError(f"num_features={num_features}: expected an even number of at least 2")
        if norm not in ("gaussian", "sqrt_d"):
            raise ValueError(f"norm={norm!r}: expected 'gaussian' or 'sqrt_d'")
        if eps < 0:
            raise ValueError(f"eps={eps}: expected at least 0")
        self.dim, self.num_features, self.eps = dim, num_features, eps
        self.softmax_scale = dim**-0.5 if softmax_scale is None else softmax_scale
        rows = _rows(num_features // 2, dim, orthogonal, norm, generator)
        self.register_buffer("projection", rows)

    def queries(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features of x (..., L, dim): (..., L, m), and the log scale of each row (..., L, 1)."""
        u, half_norm = self._projected(x)
        top = u.detach().abs().amax(-1, keepdim=True)
        phi = torch.cat([torch.exp(u - top), torch.exp(-u - top)], -1) + self.eps
        return phi, top - half_norm - math.log(self.num_features) / 2

    def keys(self, x: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features of x (..., L, dim): (..., L, m), and one log scale for all rows (..., 1, 1).

        Args:
            x: (..., L, dim).
            real: (..., L) bool, broadcast; other rows get features of 0.
        """
        u, half_norm = self._projected(x)
        exponent = torch.cat([u, -u], -1) - half_norm - math.log(self.num_features) / 2
        seen = exponent.detach()
        if real is not None:
            seen = seen.masked_fill(~real[..., None], -torch.inf)
        top = seen.amax((-2, -1), keepdim=True)
        top = torch.where(torch.isinf(top), 0, top)
        if real is not None:
            exponent = torch.where(real[..., None], exponent, top)
        phi = torch.exp(exponent - top) + self.eps
        return (phi if real is None else phi * real[..., None]), top

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kind = accumulator(x.dtype)
        x = x.to(kind) * math.sqrt(self.softmax_scale)
        return x @ self.projection.to(kind).T, x.square().sum(-1, keepdim=True) / 2


def linear_attention(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Sums of ``phi_q[i] . phi_k[j]`` over the keys, with and without v, in linear memory.

    Args:
        phi_q: (B, Hq, Lq, m).
        phi_k: (B, Hkv, Lk, m); query head h uses key head ``h * Hkv // Hq``.
        v: (B, Hkv, Lk, Dv).
        causal: row i sums over keys j <= i; needs Lq = Lk.

    Returns:
        numerator (B, Hq, Lq, Dv) and denominator (B, Hq, Lq), in the type of `phi_q`.

    Raises:
        ValueError: causal with other lengths.
    """
    heads = phi_k.shape[1]
    q = phi_q.unflatten(1, (heads, -1))  # [B, Hkv, G, Lq, m]
    ones = v.new_ones(*v.shape[:-1], 1)
    values = torch.cat([v, ones], -1).to(phi_q.dtype)
    if not causal:
        sums = q @ (phi_k.transpose(-1, -2) @ values)[:, :, None]
    elif phi_q.shape[2] != phi_k.shape[2]:
        raise ValueError(
            f"causal: {phi_q.shape[2]} queries and {phi_k.shape[2]} keys, expected as many"
        )
    else:
        sums = _prefix_sums(q, phi_k, values)
    sums = sums.flatten(1, 2)
    return sums[..., :-1], sums[..., -1]


def _prefix_sums(q: Tensor, phi_k: Tensor, values: Tensor) -> Tensor:
    """Causal sums, from one m x Dv state per chunk and the pairs inside a chunk."""
    length = q.shape[-2]
    short = -length % _CHUNK
    q, phi_k, values = (
        nn.functional.pad(t, (0, 0, 0, short)).unflatten(-2, (-1, _CHUNK))
        for t in (q, phi_k, values)
    )
    state = phi_k.transpose(-1, -2) @ values  # [B, Hkv, n, m, Dv + 1]
    before = state.cumsum(2) - state
    inside = (q @ phi_k.transpose(-1, -2)[:, :, None]).tril()
    sums = q @ before[:, :, None] + inside @ values[:, :, None]
    return sums.flatten(-3, -2)[..., :length, :]


def _rows(
    count: int,
    dim: int,
    orthogonal: bool,
    norm: str,
    generator: torch.Generator | None,
) -> Tensor:
    """The projection (count, dim)."""
    if not orthogonal:
        rows = torch.randn(count, dim, generator=generator)
        directions = rows / rows.norm(dim=1, keepdim=True)
    else:
        blocks = []
        for _ in range(-(-count // dim)):
            q, r = torch.linalg.qr(torch.randn(dim, dim, generator=generator))
            blocks.append((q * r.diagonal().sign()).T)  # the sign makes q uniform (Haar)
        rows = torch.cat(blocks)[:count]
        directions = rows
    if norm == "sqrt_d":
        return directions * math.sqrt(dim)
    if not orthogonal:
        return rows
    return directions * torch.randn(count, dim, generator=generator).norm(dim=1, keepdim=True)
