"""The mathematics of the engine: masked softmax attention, merging, sinks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Type of logits and sums: float32, or float64 for float64 tensors."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax attention over the true entries of `mask`; leading dimensions broadcast.

    Args:
        q: (..., Lq, D).
        k: (..., Lk, D).
        v: (..., Lk, Dv).
        mask: (..., Lq, Lk) bool.
        scale: factor of the logits.
        softcap: logits s become ``softcap * tanh(s / softcap)``.
        bias: added to the logits, before the cap.
        keep: factors of the probabilities (dropout).

    Returns:
        o (..., Lq, Dv) and lse (..., Lq) in the accumulator's type, and the probabilities. A row
        without keys has o = 0 and lse = -inf.
    """
    kind = accumulator(q.dtype)
    s = torch.matmul(q.to(kind), k.to(kind).transpose(-1, -2)) * scale
    if bias is not None:
        s = s + bias.to(kind)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    s = s.masked_fill(~mask, -torch.inf)
    filled = mask.any(-1).expand(s.shape[:-1])
    m = torch.where(filled, s.detach().amax(-1), 0) if s.shape[-1] else s.new_zeros(s.shape[:-1])
    p = torch.exp(s - m[..., None])
    total = torch.where(filled, p.sum(-1), 1)
    p = p / total[..., None]
    lse = torch.where(filled, m + torch.log(total), -torch.inf)
    o = torch.matmul(p if keep is None else p * keep, v.to(kind))
    return o, lse, p


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One softmax out of several over disjoint keys; exact, differentiable in both.

    Args:
        parts: (o, lse) pairs with o (..., Lq, Dv) and natural lse (..., Lq); lse may be -inf.

    Returns:
        o in the type of the first, lse in its accumulator's type.

    Raises:
        ValueError: there is no part.
    """
    if not parts:
        raise ValueError("parts: expected at least one (o, lse)")
    kind = accumulator(parts[0][1].dtype)
    lses = torch.stack([lse.to(kind) for _, lse in parts])
    m = lses.detach().amax(0)
    m = torch.where(torch.isinf(m), 0, m)
    weights = torch.exp(lses - m)
    total = weights.sum(0)
    filled = total > 0
    safe = torch.where(filled, total, 1)
    o = torch.zeros((), dtype=kind, device=m.device)
    for (part, _), weight in zip(parts, weights, strict=True):
        o = o + part.to(kind) * (weight / safe)[..., None]
    lse = torch.where(filled, m + torch.log(safe), -torch.inf)
    return o.to(parts[0][0].dtype), lse


def apply_sink(o: Tensor, lse: Tensor, sink_logit: Tensor) -> tuple[Tensor, Tensor]:
    """A learned logit per head (Hq,) that takes weight and gives nothing."""
    sink = sink_logit.to(lse.dtype).view(1, -1, 1).expand_as(lse)
    return merge([(o, lse), (torch.zeros_like(o), sink)])
