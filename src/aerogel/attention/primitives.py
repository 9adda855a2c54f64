"""The parts of attention one by one, on the pairs of a plan, with gradients.

For weights that are not a plain softmax: signed corrections, ReLU attention. Values are one per
allowed (batch, query head, query, key) pair, in that order; memory grows with the pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aerogel.attention.group_plan import GroupPlan
from aerogel.attention.lowering import lower
from aerogel.attention.plan import Plan
from aerogel.attention.shape import AttentionShape
from aerogel.attention.softmax import accumulator
from aerogel.attention.token_plan import TokenPlan

_CHUNK = 1 << 22  # gathered floats held at a time


@dataclass(frozen=True, eq=False)
class PairList:
    """The pairs of a plan for given tensors.

    Attributes:
        shape: sizes and causal rule.
        row: (nnz,) int64 query rows, numbered over (batch, q_heads, q_len), ascending.
        key: (nnz,) int64 keys, numbered over (batch, kv_heads, k_len).
    """

    shape: AttentionShape
    row: Tensor
    key: Tensor

    @property
    def rows(self) -> int:
        """Query rows over batch and heads."""
        return self.shape.batch * self.shape.q_heads * self.shape.q_len


def plan_pairs(plan: Plan, shape: AttentionShape, key_padding: Tensor | None = None) -> PairList:
    """Lists the pairs that `plan` allows.

    Args:
        plan: any plan with a mask; groups are read as their union of pairs.
        shape: sizes and causal rule.
        key_padding: (batch, k_len) bool, True at real keys.
    """
    if isinstance(plan, (GroupPlan, TokenPlan)):
        where = plan.to_dense_mask(shape).nonzero()
        planes, row, key = where[:, 0] * plan.dims[1] + where[:, 1], where[:, 2], where[:, 3]
    else:
        shape = plan.shaped(shape)
        rows, keys = [], []
        for stream in lower(plan.passes(shape), shape):
            r, j, _ = stream.tile_pairs(shape)
            rows.append(r)
            keys.append(j)
        joined, key = torch.cat(rows), torch.cat(keys)
        planes = joined // max(1, shape.q_len)
        row = joined % max(1, shape.q_len)
    batch, heads = plan.dims
    places = [
        (b, h, (planes == (b % batch) * heads + h * heads // shape.q_heads))
        for b in range(shape.batch)
        for h in range(shape.q_heads)
    ]
    group = shape.q_heads // shape.kv_heads
    q_rows, k_rows = [], []
    for b, h, mine in places:
        r, j = row[mine], key[mine]
        if key_padding is not None:
            real = key_padding[b][j]
            r, j = r[real], j[real]
        order = torch.argsort(r * (shape.k_len + 1) + j)
        q_rows.append((b * shape.q_heads + h) * shape.q_len + r[order])
        k_rows.append((b * shape.kv_heads + h // group) * shape.k_len + j[order])
    return PairList(shape, torch.cat(q_rows), torch.cat(k_rows))


def sddmm(q: Tensor, k: Tensor, pairs: PairList) -> Tensor:
    """``q[i] . k[j]`` of every pair: (nnz,) in the accumulator's type, unscaled."""
    kind = accumulator(q.dtype)
    flat_q, flat_k = q.reshape(-1, q.shape[-1]).to(kind), k.reshape(-1, k.shape[-1]).to(kind)
    return _Sddmm.apply(flat_q, flat_k, pairs.row, pairs.key)


def spmm(values: Tensor, v: Tensor, pairs: PairList) -> Tensor:
    """``out[i] = sum of values[i, j] * v[j]``: (B, Hq, Lq, Dv) in the accumulator's type."""
    flat = v.reshape(-1, v.shape[-1]).to(values.dtype)
    out: Tensor = _Spmm.apply(values, flat, pairs.row, pairs.key, pairs.rows)
    shape = pairs.shape
    return out.view(shape.batch, shape.q_heads, shape.q_len, v.shape[-1])


def plan_logsumexp(values: Tensor, pairs: PairList) -> Tensor:
    """Natural log-sum-exp of every row's values: (B, Hq, Lq); -inf for a row without pairs."""
    top = values.new_full((pairs.rows,), -torch.inf)
    top = top.scatter_reduce(0, pairs.row, values.detach(), "amax")
    top = torch.where(torch.isinf(top), 0, top)
    zeros = torch.zeros_like(top)
    total = zeros.index_add(0, pairs.row, torch.exp(values - top[pairs.row]))
    filled = total > 0
    lse = torch.where(filled, top + torch.log(torch.where(filled, total, 1)), -torch.inf)
    return lse.view(pairs.shape.batch, pairs.shape.q_heads, pairs.shape.q_len)


def plan_softmax(values: Tensor, pairs: PairList) -> Tensor:
    """Softmax of every row's values: (nnz,)."""
    return torch.exp(values - plan_logsumexp(values, pairs).flatten()[pairs.row])


def _chunks(count: int, width: int) -> list[slice]:
    step = max(1, _CHUNK // max(1, width))
    return [slice(begin, begin + step) for begin in range(0, count, step)]


def _dot(a: Tensor, b: Tensor, i: Tensor, j: Tensor) -> Tensor:
    out = a.new_empty(i.numel())
    for part in _chunks(i.numel(), a.shape[1]):
        out[part] = (a[i[part]] * b[j[part]]).sum(-1)
    return out


def _add(values: Tensor, b: Tensor, i: Tensor, j: Tensor, rows: int) -> Tensor:
    out = b.new_zeros(rows, b.shape[1])
    for part in _chunks(i.numel(), b.shape[1]):
        out.index_add_(0, i[part], values[part, None] * b[j[part]])
    return out


class _Sddmm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, row: Tensor, key: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, row, key)
        return _dot(q, k, row, key)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        q, k, row, key = ctx.saved_tensors
        grad = grads[0]
        dq = _add(grad, k, row, key, q.shape[0])
        return dq, _add(grad, q, key, row, k.shape[0]), None, None


class _Spmm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, v: Tensor, row: Tensor, key: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(values, v, row, key)
        return _add(values, v, row, key, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        values, v, row, key = ctx.saved_tensors
        grad = grads[0].contiguous()
        dv = _add(values, grad, key, row, v.shape[0])
        return _dot(grad, v, row, key), dv, None, None, None
