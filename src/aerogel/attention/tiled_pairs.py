"""The pairs of a support as small dense tiles: batched products instead of one pair at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from aerogel.attention.primitives import PairList, plan_logsumexp, sddmm, spmm
from aerogel.attention.shape import AttentionShape
from aerogel.attention.softmax import accumulator


class Pairs(Protocol):
    """Chosen (query, key) pairs, each once, and sums over them; differentiable."""

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """``a[i] . b[j]`` of every pair, for a (B, Hq, Lq, n) and b (B, Hkv, Lk, n)."""

    def logsumexp(self, values: Tensor) -> Tensor:
        """(B, Hq, Lq); -inf for a row without pairs."""

    def total(self, values: Tensor) -> Tensor:
        """Sum over each row: (B, Hq, Lq)."""

    def spread(self, rows: Tensor) -> Tensor:
        """A number per row (B, Hq, Lq), at each of its pairs; broadcasts against the values."""

    def weighted(self, values: Tensor, v: Tensor) -> Tensor:
        """``sum of values[i, j] * v[j]``: (B, Hq, Lq, Dv)."""


@dataclass(frozen=True, eq=False)
class ListedPairs:
    """A `PairList` with the face of `Pairs`: for keys that rows do not share."""

    pairs: PairList

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        return sddmm(a, b, self.pairs)

    def logsumexp(self, values: Tensor) -> Tensor:
        return plan_logsumexp(values, self.pairs)

    def total(self, values: Tensor) -> Tensor:
        shape = self.pairs.shape
        sums = values.new_zeros(self.pairs.rows).index_add(0, self.pairs.row, values)
        return sums.view(shape.batch, shape.q_heads, shape.q_len)

    def spread(self, rows: Tensor) -> Tensor:
        return rows.flatten()[self.pairs.row]

    def weighted(self, values: Tensor, v: Tensor) -> Tensor:
        return spmm(values, v, self.pairs)


@dataclass(frozen=True, eq=False)
class TiledPairs:
    """Tiles of rows by keys; a row may be in several tiles, a pair in one.

    Attributes:
        shape: sizes.
        row: (T, Wq) int64 query rows, numbered over (batch, q_heads, q_len).
        key: (T, Wk) int64 keys, numbered over (batch, kv_heads, k_len).
        mask: (T, Wq, Wk) bool, the pairs of each tile that count.
    """

    shape: AttentionShape
    row: Tensor
    key: Tensor
    mask: Tensor

    @classmethod
    def of(cls, shape: AttentionShape, q_idx: Tensor, kv_idx: Tensor, mask: Tensor) -> TiledPairs:
        """From index per head.

        Args:
            shape: sizes; its causal rule is applied here.
            q_idx: (b, h, N, Wq) query rows, -1 = empty, with b in {1, batch}, h in {1, q_heads}.
            kv_idx: (b, h, N, Wk) keys, -1 = empty.
            mask: broadcast to (batch, q_heads, N, Wq, Wk) bool.
        """
        batch, heads = shape.batch, shape.q_heads
        device = q_idx.device
        mask = mask & (q_idx >= 0)[..., :, None] & (kv_idx >= 0)[..., None, :]
        if shape.causal:
            mask = mask & (kv_idx[..., None, :] <= q_idx[..., :, None] + shape.q_offset)
        mask = mask.expand(batch, heads, *mask.shape[2:])
        plane = torch.arange(batch * heads, device=device).view(batch, heads, 1, 1)
        kv_plane = plane * shape.kv_heads // heads
        row = q_idx.clamp(min=0).long() + plane * shape.q_len
        key = kv_idx.clamp(min=0).long() + kv_plane * shape.k_len
        return cls(shape, row.flatten(0, 2), key.flatten(0, 2), mask.flatten(0, 2))

    @property
    def rows(self) -> int:
        """Query rows over batch and heads."""
        return self.shape.batch * self.shape.q_heads * self.shape.q_len

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        kind = accumulator(a.dtype)
        left = _taken(a.reshape(-1, a.shape[-1]).to(kind), self.row)
        right = _taken(b.reshape(-1, b.shape[-1]).to(kind), self.key)
        return torch.bmm(left, right.transpose(1, 2))

    def logsumexp(self, values: Tensor) -> Tensor:
        kept = values.masked_fill(~self.mask, -torch.inf)
        flat = self.row.flatten()
        high = kept.detach().amax(-1).flatten()
        top = values.new_full((self.rows,), -torch.inf).scatter_reduce(0, flat, high, "amax")
        top = torch.where(torch.isinf(top), 0, top)
        sums = torch.exp(kept - top[self.row][..., None]).sum(-1)
        total = values.new_zeros(self.rows).index_add(0, flat, sums.flatten())
        filled = total > 0
        lse = torch.where(filled, top + torch.log(torch.where(filled, total, 1)), -torch.inf)
        return self._by_row(lse)

    def total(self, values: Tensor) -> Tensor:
        sums = values.masked_fill(~self.mask, 0).sum(-1).flatten()
        return self._by_row(values.new_zeros(self.rows).index_add(0, self.row.flatten(), sums))

    def spread(self, rows: Tensor) -> Tensor:
        return _taken(rows.flatten(), self.row)[..., None]

    def weighted(self, values: Tensor, v: Tensor) -> Tensor:
        values = values.masked_fill(~self.mask, 0)
        out = torch.bmm(values, _taken(v.reshape(-1, v.shape[-1]).to(values.dtype), self.key))
        rows = out.new_zeros(self.rows, v.shape[-1])
        rows = rows.index_add(0, self.row.flatten(), out.flatten(0, 1))
        return rows.view(*self._by_row(rows[:, 0]).shape, v.shape[-1])

    def _by_row(self, flat: Tensor) -> Tensor:
        return flat.view(self.shape.batch, self.shape.q_heads, self.shape.q_len)


def _taken(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x at an index of two dimensions; its backward adds whole rows."""
    return x.index_select(0, index.flatten()).unflatten(0, index.shape)
