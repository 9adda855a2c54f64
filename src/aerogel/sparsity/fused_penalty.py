"""mean(ln(1 + A^2)) of attention probabilities that are never stored."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Scores held at a time, over all heads: 16 MB of float32.
_CHUNK = 1 << 22


def attention_log_penalty(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """mean(ln(1 + A^2)) with A = softmax(q k^T * scale), by pieces of the queries.

    Forward and backward hold only some rows of A at a time and remember one number for each row;
    the backward pass computes the rows again.

    Args:
        q: (batch, heads, queries, channels), floating point.
        k: (batch, heads, keys, channels).
        scale: of the scores.

    Returns:
        Scalar with gradient, float32 or wider.

    Raises:
        ValueError: tensors that are not such a pair.

    Reference: Prasetyo, Yudistira, Widodo, arXiv 2307.11988, equation 4.
    """
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "q and k must be (batch, heads, tokens, channels) and agree but for the tokens, "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if q.dtype in (torch.float16, torch.bfloat16):
        q, k = q.float(), k.float()
    result: Tensor = _AttentionLog.apply(q, k, scale)[0]
    return result


class _AttentionLog(torch.autograd.Function):
    @staticmethod
    def forward(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        log_sums = q.new_empty(q.shape[:3])
        total = q.new_zeros(())
        for rows in _pieces(q, k):
            scores = _scores(q, k, scale, rows)
            log_sums[:, :, rows] = scores.logsumexp(-1)
            p = scores.sub_(log_sums[:, :, rows, None]).exp_()
            total += p.square_().log1p_().sum()
        return total / _numel(q, k), log_sums

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        q, k, ctx.scale = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(q, k, output[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient, _):  # type: ignore[no-untyped-def]
        q, k, log_sums = ctx.saved_tensors
        factor = 2.0 * gradient / _numel(q, k)
        dq, dk = torch.empty_like(q), torch.zeros_like(k)
        for rows in _pieces(q, k):
            p = _scores(q, k, ctx.scale, rows).sub_(log_sums[:, :, rows, None]).exp_()
            weighted = p.square()
            weighted.div_(weighted + 1.0)  # p * g / factor, with g = 2p / (1 + p^2)
            d_scores = weighted - p * weighted.sum(-1, keepdim=True)
            d_scores *= factor * ctx.scale
            dq[:, :, rows] = d_scores @ k
            dk += d_scores.transpose(-2, -1) @ q[:, :, rows]
        return dq, dk, None


def _scores(q: Tensor, k: Tensor, scale: float, rows: slice) -> Tensor:
    return (q[:, :, rows] @ k.transpose(-2, -1)).mul_(scale)


def _numel(q: Tensor, k: Tensor) -> int:
    return q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]


def _pieces(q: Tensor, k: Tensor) -> Iterator[slice]:
    rows = max(1, _CHUNK // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    for start in range(0, q.shape[2], rows):
        yield slice(start, min(start + rows, q.shape[2]))
