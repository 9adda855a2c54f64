"""Positive random features of the softmax kernel, and linear attention over them.

Papers: Choromanski et al., "Rethinking Attention with Performers", 2020, arXiv 2009.14794 (the
features, used alone); Chen et al., arXiv 2110.15343 (their scales kept as logarithms).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from aerogel.arguments import check_choice, check_count, check_number
from aerogel.attention.softmax import accumulator

_CHUNK = 128  # rows between two kept prefix sums
_SCANNED = 64  # the same where one sum is carried along: its tensors then stay in the second cache


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
        eps: ``eps / sqrt(num_features)`` is added to every scaled feature, so that none is 0.
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
        check_count("dim", dim)
        if num_features is None:
            num_features = max(2, int(dim * math.log(dim)) // 2 * 2)
        check_count("num_features", num_features, 2)
        check_choice("norm", norm, ("gaussian", "sqrt_d"))
        check_number("eps", eps, "[0, inf)")
        if softmax_scale is not None:
            check_number("softmax_scale", softmax_scale, "(0, inf)")
        if num_features % 2:
            raise ValueError(f"num_features={num_features}: expected an even number of at least 2")
        self.dim, self.num_features, self.eps = dim, num_features, eps
        self.softmax_scale = dim**-0.5 if softmax_scale is None else softmax_scale
        rows = _rows(num_features // 2, dim, orthogonal, norm, generator)
        self.register_buffer("projection", rows)

    def queries(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features of x (..., L, dim): (..., L, m), and the log scale of each row (..., L, 1)."""
        u, half_norm = self._projected(x)
        top = u.detach().amax(-1, keepdim=True)
        return self._shifted(u, top), top - half_norm - math.log(self.num_features) / 2

    def keys(self, x: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features of x (..., L, dim): (..., L, m), and one log scale for all rows (..., 1, 1).

        Args:
            x: (..., L, dim).
            real: (..., L) bool, broadcast; other rows get features of 0.
        """
        u, half_norm = self._projected(x)
        if real is not None:
            u = u.masked_fill(~real[..., None], -torch.inf)
            half_norm = half_norm.masked_fill(~real[..., None], 0)
        top = (u.detach().amax(-1, keepdim=True) - half_norm.detach()).amax((-2, -1), keepdim=True)
        top = torch.where(torch.isinf(top), 0, top)
        phi = self._shifted(u, half_norm + top)
        if real is not None and self.eps:
            phi = phi * real[..., None]
        return phi, top - math.log(self.num_features) / 2

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Projections of scaled x on both directions of each row, and half the squared norm."""
        kind = accumulator(x.dtype)
        x = x.to(kind)
        rows = self.projection.to(kind) * math.sqrt(self.softmax_scale)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x @ torch.cat([rows, -rows]).T, norm.square() * (self.softmax_scale / 2)

    def _shifted(self, u: Tensor, shift: Tensor) -> Tensor:
        """Features from their logarithms, in the place of `u`, which is large."""
        phi = u.sub_(shift).exp_()
        return phi + self.eps / math.sqrt(self.num_features) if self.eps else phi


def linear_attention(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, causal: bool = False, lag: int = 0
) -> tuple[Tensor, Tensor]:
    """Sums of ``phi_q[i] . phi_k[j]`` over the keys, with and without v, in linear memory.

    Args:
        phi_q: (B, Hq, Lq, m).
        phi_k: (B, Hkv, Lk, m); query head h uses key head ``h * Hkv // Hq``.
        v: (B, Hkv, Lk, Dv).
        causal: row i sums over keys j <= i - `lag`; needs Lq = Lk.
        lag: of causal sums, at least 0.

    Returns:
        numerator (B, Hq, Lq, Dv) and denominator (B, Hq, Lq), in the type of `phi_q`.

    Raises:
        ValueError: shapes that do not fit, causal with other lengths, or a lag below 0 or without
            `causal`.
    """
    check_count("lag", lag, 0)
    shapes = [tuple(t.shape) for t in (phi_q, phi_k, v)]
    fits = all(len(shape) == 4 for shape in shapes) and (
        shapes[1][:3] == shapes[2][:3]
        and shapes[0][0] == shapes[1][0]
        and shapes[0][3] == shapes[1][3]
        and shapes[0][1] % max(1, shapes[1][1]) == 0
    )
    if not fits:
        raise ValueError(
            "phi_q {}, phi_k {}, v {}: expected (B, Hq, Lq, m), (B, Hkv, Lk, m), "
            "(B, Hkv, Lk, Dv)".format(*shapes)
        )
    if lag and not causal:
        raise ValueError(f"lag={lag}, causal={causal}: expected 0, or at least 0 if causal")
    heads = phi_k.shape[1]
    q, v = phi_q.unflatten(1, (heads, -1)), v.to(phi_q.dtype)  # q: [B, Hkv, G, Lq, m]
    if not causal:
        state, total = phi_k.transpose(-1, -2) @ v, phi_k.sum(-2)
        sums = q @ state[:, :, None], (q @ total[:, :, None, :, None])[..., 0]
    elif phi_q.shape[2] != phi_k.shape[2]:
        raise ValueError(
            f"causal: {phi_q.shape[2]} queries and {phi_k.shape[2]} keys, expected as many"
        )
    else:
        tracked = torch.is_grad_enabled() and any(t.requires_grad for t in (q, phi_k, v))
        carried = q.is_cpu and not tracked and not torch.compiler.is_compiling()
        sums = (_scan if carried else _prefix_sums)(q, phi_k, v, lag)
    return sums[0].flatten(1, 2), sums[1].flatten(1, 2)


def _scan(q: Tensor, phi_k: Tensor, v: Tensor, lag: int) -> tuple[Tensor, Tensor]:
    """Causal sums chunk by chunk, with the one state that is needed at a time; no gradients."""
    batch, heads, group, length, width = q.shape
    q, phi_k, v = q.flatten(0, 1), phi_k.flatten(0, 1), v.flatten(0, 1)
    sums = q.new_zeros(batch * heads, group, length, v.shape[-1])
    weights = q.new_zeros(batch * heads, group, length)
    state, total = v.new_zeros(len(v), width, v.shape[-1]), v.new_zeros(len(v), width, 1)
    for begin in range(0, length, _SCANNED):
        rows = min(_SCANNED, length - begin)
        first = max(0, begin - lag)  # of this chunk's last keys; those before are in the state
        if begin + rows <= lag:
            continue
        here = slice(first, begin + rows - lag)
        keys, values, queries = phi_k[:, here], v[:, here], q[:, :, begin : begin + rows]
        flat = queries.flatten(1, 2)  # [B * Hkv, G * rows, m]
        pairs = torch.bmm(flat, keys.transpose(1, 2))
        pairs.view(-1, group, rows, pairs.shape[-1]).tril_(begin - lag - first)
        chunk = torch.bmm(flat, state).baddbmm_(pairs, values)
        sums[:, :, begin : begin + rows] = chunk.view(-1, group, rows, v.shape[-1])
        weight = torch.bmm(flat, total)[..., 0] + pairs.sum(-1)
        weights[:, :, begin : begin + rows] = weight.view(-1, group, rows)
        state.baddbmm_(keys.transpose(1, 2), values)
        total += keys.sum(1)[..., None]
    return sums.unflatten(0, (batch, heads)), weights.unflatten(0, (batch, heads))


def _prefix_sums(q: Tensor, phi_k: Tensor, v: Tensor, lag: int) -> tuple[Tensor, Tensor]:
    """Causal sums, from one m x Dv state per chunk and the pairs inside a chunk."""
    length = q.shape[-2]
    short = -length % _CHUNK
    values = torch.cat([v, v.new_ones(*v.shape[:-1], 1)], -1)
    if lag:  # row i then reads the keys of row i - lag
        phi_k, values = (
            nn.functional.pad(t, (0, 0, lag, 0))[..., :length, :] for t in (phi_k, values)
        )
    q, phi_k, values = (
        nn.functional.pad(t, (0, 0, 0, short)).unflatten(-2, (-1, _CHUNK))
        for t in (q, phi_k, values)
    )
    state = phi_k.transpose(-1, -2) @ values  # [B, Hkv, n, m, Dv + 1]
    before = state.cumsum(2) - state
    inside = (q @ phi_k.transpose(-1, -2)[:, :, None]).tril()
    sums = q @ before[:, :, None] + inside @ values[:, :, None]
    sums = sums.flatten(-3, -2)[..., :length, :]
    return sums[..., :-1], sums[..., -1]


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
