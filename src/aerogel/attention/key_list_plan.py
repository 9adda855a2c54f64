"""`KeyListPlan`: per query row a list of single keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aerogel.attention.plan import (
    Plan,
    check_dims,
    check_ragged,
    flat_pointers,
    head_pointers,
)
from aerogel.attention.ragged import row_numbers
from aerogel.attention.ranges import KeyRanges, Pass
from aerogel.attention.shape import AttentionShape
from aerogel.attention.topk import stable_topk

_SHORTEST_RANGE = 16  # keys: shorter runs are gathered, longer ones read in place


@dataclass(frozen=True, eq=False)
class KeyListPlan(Plan):
    """CSR of single keys per query row.

    Args:
        ptr: (Bp, Hp, q_len + 1) int64, joined over batch and heads.
        idx: (nnz,) int32 keys, ascending in a row.
    """

    ptr: Tensor
    idx: Tensor

    @property
    def dims(self) -> tuple[int, int]:
        return self.ptr.shape[0], self.ptr.shape[1]

    @classmethod
    def from_bitmask(cls, mask: Tensor) -> KeyListPlan:
        """Keeps the pairs where `mask` (Bp, Hp, q_len, k_len) bool is true."""
        if mask.dtype != torch.bool or mask.dim() != 4:
            raise ValueError(f"mask: {mask.dtype} {tuple(mask.shape)}, expected bool, 4 dimensions")
        return cls(head_pointers(mask.sum(-1)), mask.nonzero()[:, 3].int())

    @classmethod
    def from_found(cls, keys: Tensor, found: Tensor) -> KeyListPlan:
        """What `kernels.choose_by_labels` found.

        Args:
            keys: (B, h, q_len, n) ints, ascending as far as they count.
            found: (B, h, q_len) int64, how many of a row count.
        """
        kept = torch.arange(keys.shape[-1], device=keys.device) < found[..., None]
        return cls(head_pointers(found), keys[kept].int())

    @classmethod
    def from_index(
        cls, index: Tensor, *, dense_prefix_rows: int = 0, k_len: int | None = None
    ) -> KeyListPlan:
        """Keys of every row as a list.

        Args:
            index: (B, h, q_len, b) ints in any order; -1 is no key, repeated keys count once.
            dense_prefix_rows: the first rows read all `k_len` keys (class tokens).
            k_len: keys; needed with `dense_prefix_rows`.
        """
        rows = torch.arange(index.shape[2], device=index.device)
        ordered = index.long().sort(-1).values
        keep = ordered >= 0
        keep[..., 1:] &= ordered[..., 1:] != ordered[..., :-1]
        if dense_prefix_rows:
            if k_len is None:
                raise ValueError(f"dense_prefix_rows={dense_prefix_rows}: expected k_len with it")
            wide = torch.arange(k_len, device=index.device).expand(*index.shape[:3], k_len)
            width = index.shape[-1]
            prefix = (rows < dense_prefix_rows)[:, None]
            listed = torch.nn.functional.pad(ordered, (0, max(0, k_len - width)))
            kept = torch.nn.functional.pad(keep, (0, max(0, k_len - width)))
            whole = torch.nn.functional.pad(wide, (0, max(0, width - k_len)))
            inside = torch.arange(whole.shape[-1], device=index.device) < k_len
            ordered = torch.where(prefix, whole, listed)
            keep = torch.where(prefix, inside, kept)
        return cls(head_pointers(keep.sum(-1)), ordered[keep].int())

    @classmethod
    def from_topk(
        cls, scores: Tensor, k: int, *, causal: bool = False, q_offset: int = 0
    ) -> KeyListPlan:
        """The k best keys of every row of `scores` (Bp, Hp, q_len, k_len); ties: lowest key.

        Keys of score -inf, and with `causal` keys behind the query, are never taken.
        """
        ranked = scores.float()
        if causal:
            position = q_offset + torch.arange(scores.shape[2], device=scores.device)
            late = torch.arange(scores.shape[3], device=scores.device) > position[:, None]
            ranked = ranked.masked_fill(late, -torch.inf)
        best = stable_topk(ranked, min(k, scores.shape[3]))
        kept = ranked.gather(-1, best) > -torch.inf
        return cls(head_pointers(kept.sum(-1)), best[kept].int())

    def validate(self, shape: AttentionShape) -> None:
        check_dims(self, shape)
        check_ragged("ptr", self.ptr, self.idx.numel(), (*self.dims, shape.q_len))
        if self.idx.dtype != torch.int32:
            raise ValueError(f"idx: {self.idx.dtype}, expected int32")
        if self.idx.numel() == 0:
            return
        low, high = int(self.idx.min()), int(self.idx.max())
        if low < 0 or high >= shape.k_len:
            raise ValueError(f"idx: keys {low} to {high}, expected 0 to {shape.k_len - 1}")
        row = row_numbers(flat_pointers(self.ptr))
        if bool(((row[1:] == row[:-1]) & (self.idx[1:] <= self.idx[:-1])).any()):
            raise ValueError("idx: expected ascending keys without repeats in every row")

    def passes(self, shape: AttentionShape) -> list[Pass]:
        row, key = row_numbers(flat_pointers(self.ptr)), self.idx.long()
        ahead = _SHORTEST_RANGE - 1
        runs = (key[ahead:] - key[:-ahead] == ahead) & (row[ahead:] == row[:-ahead])
        if not bool(runs.any()):
            none = row.new_empty(0)
            single = KeyRanges.of(*self.dims, 1, shape.q_len, none, none, none, (row, key))
            return [Pass(single)]
        begins = torch.ones_like(key, dtype=torch.bool)
        begins[1:] = (row[1:] != row[:-1]) | (key[1:] != key[:-1] + 1)
        heads = begins.nonzero().flatten()
        length = torch.diff(heads, append=heads.new_tensor([key.numel()]))
        long = length >= _SHORTEST_RANGE
        rest = ~torch.repeat_interleave(long, length)
        ranges = KeyRanges.of(
            *self.dims, 1, shape.q_len, row[heads][long], key[heads][long], length[long],
            (row[rest], key[rest]),
        )  # fmt: skip
        return [Pass(ranges)]

    def _mask(self, shape: AttentionShape) -> Tensor:
        row = row_numbers(flat_pointers(self.ptr))
        mask = torch.zeros(
            *self.dims, shape.q_len, shape.k_len, dtype=torch.bool, device=row.device
        )
        mask.view(-1, shape.k_len)[row, self.idx.long()] = True
        return mask

    def union(self, other: KeyListPlan, k_len: int | None = None) -> KeyListPlan:
        """The keys of both plans, which have the same rows."""
        if self.ptr.shape != other.ptr.shape:
            raise ValueError(
                f"union: rows {tuple(self.ptr.shape)} and {tuple(other.ptr.shape)}, expected equal"
            )
        span = 1 + max((int(p.idx.max()) for p in (self, other) if p.idx.numel()), default=0)
        keys = [row_numbers(flat_pointers(p.ptr)) * span + p.idx for p in (self, other)]
        return self._from_keys(torch.cat(keys).unique(), span)

    def intersect_causal(self, q_offset: int = 0) -> KeyListPlan:
        """Without keys behind their query."""
        row = row_numbers(flat_pointers(self.ptr))
        keep = self.idx <= q_offset + row % (self.ptr.shape[-1] - 1)
        span = 1 + (int(self.idx.max()) if self.idx.numel() else 0)
        return self._from_keys((row * span + self.idx)[keep], span)

    def _from_keys(self, keys: Tensor, span: int) -> KeyListPlan:
        plane = self.ptr[..., :-1]
        counts = torch.bincount(keys // span, minlength=plane.numel()).view(plane.shape)
        return KeyListPlan(head_pointers(counts), (keys % span).int())
