"""`GroupPlan`: groups of gathered queries that attend to groups of gathered keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from aerogel.attention.plan import Plan, check_dims
from aerogel.attention.ranges import Pass
from aerogel.attention.shape import AttentionShape


@dataclass(frozen=True, eq=False)
class GroupPlan(Plan):
    """Attention inside gathered groups; causality compares the tokens' original positions.

    Args:
        q_idx: (Bp, Hp, N, Wq) int32 query rows of each group, -1 = empty slot.
        kv_idx: (Bp, Hp, N, Wk) int32 keys of each group, -1 = empty slot, no repeats in a group.
        reduce: what a query in several groups gets: "scatter" (the group that owns it), "mean" of
            its groups' outputs, or "lse" (one softmax over all its groups).
        uncovered: queries in no group get "zero", or are an "error".
        mask_self: a query reads the key of its own position only if it may read no other of its
            group.
        owner_slot: (Bp, Hp, q_len) int32, for "scatter": the slot ``n * Wq + w`` that writes row
            i; -1 = none. Default: the last slot that holds the row.
        q_rank: (Bp, Hp, N, Wq) int64, with the two tables below: the slot among its group's keys at
            which each query stands. A key in slot b is at the distance ``b - q_rank``.
        rank_keys: (2 m + 1, D), learned, added to a group's keys by their distance from the query,
            which counts as at most m to either side.
        rank_values: (2 m + 1, Dv), the same for values.
    """

    q_idx: Tensor
    kv_idx: Tensor
    reduce: Literal["scatter", "mean", "lse"] = "scatter"
    uncovered: Literal["zero", "error"] = "zero"
    mask_self: bool = False
    owner_slot: Tensor | None = None
    q_rank: Tensor | None = None
    rank_keys: Tensor | None = None
    rank_values: Tensor | None = None

    @property
    def dims(self) -> tuple[int, int]:
        return self.q_idx.shape[0], self.q_idx.shape[1]

    def validate(self, shape: AttentionShape) -> None:
        check_dims(self, shape)
        if self.q_idx.shape[:3] != self.kv_idx.shape[:3]:
            raise ValueError(
                f"q_idx {tuple(self.q_idx.shape)}, kv_idx {tuple(self.kv_idx.shape)}: "
                "expected the same batch, heads and groups"
            )
        for name, index, size in (
            ("q_idx", self.q_idx, shape.q_len),
            ("kv_idx", self.kv_idx, shape.k_len),
        ):
            if index.dtype != torch.int32:
                raise ValueError(f"{name}: {index.dtype}, expected int32")
            if index.numel() and (int(index.min()) < -1 or int(index.max()) >= size):
                raise ValueError(f"{name}: expected -1 to {size - 1}, got up to {int(index.max())}")
        ordered = self.kv_idx.sort(-1).values
        if bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()):
            raise ValueError("kv_idx: expected no key twice in a group")
        ranks = (self.q_rank, self.rank_keys, self.rank_values)
        if any(t is None for t in ranks) and any(t is not None for t in ranks):
            raise ValueError("q_rank, rank_keys, rank_values: expected all of them, or none")
        if self.q_rank is not None and self.q_rank.shape != self.q_idx.shape:
            raise ValueError(
                f"q_rank: shape {tuple(self.q_rank.shape)}, expected {tuple(self.q_idx.shape)}"
            )
        if self.uncovered == "error" and not bool(self.covered(shape).all()):
            raise ValueError("q_idx: some query rows are in no group, and uncovered='error'")
        for field, value, names in (
            ("reduce", self.reduce, ("scatter", "mean", "lse")),
            ("uncovered", self.uncovered, ("zero", "error")),
        ):
            if value not in names:
                raise ValueError(f"{field}={value!r}: expected one of {names}")

    def covered(self, shape: AttentionShape) -> Tensor:
        """(Bp, Hp, q_len) bool: rows that some group holds."""
        return self._slots(shape) > 0

    def _slots(self, shape: AttentionShape) -> Tensor:
        flat = self.q_idx.flatten(2).long()
        counts = torch.zeros(*self.dims, shape.q_len + 1, device=flat.device)
        place = torch.where(flat < 0, shape.q_len, flat)
        return counts.scatter_add(2, place, torch.ones_like(flat, dtype=counts.dtype))[..., :-1]

    def owners(self, shape: AttentionShape) -> Tensor:
        """(Bp, Hp, q_len) int64: the slot that writes each row, -1 = none."""
        if self.owner_slot is not None:
            return self.owner_slot.long()
        flat = self.q_idx.flatten(2).long()
        slots = torch.arange(flat.shape[2], device=flat.device).expand_as(flat)
        none = torch.full((*self.dims, shape.q_len + 1), -1, device=flat.device)
        place = torch.where(flat < 0, shape.q_len, flat)
        return none.scatter_reduce(2, place, slots, "amax")[..., :-1]

    def group_mask(self, shape: AttentionShape) -> Tensor:
        """(Bp, Hp, N, Wq, Wk) bool: which slots read which."""
        q, kv = self.q_idx[..., :, None].long(), self.kv_idx[..., None, :].long()
        mask = (q >= 0) & (kv >= 0)
        if shape.causal:
            mask &= kv <= q + shape.q_offset
        if self.mask_self:
            own = kv == q + shape.q_offset
            others = mask & ~own
            mask = others | (mask & own & ~others.any(-1, keepdim=True))
        return mask

    def passes(self, shape: AttentionShape) -> list[Pass]:
        raise ValueError("plan: a GroupPlan runs on gathered groups and has no key ranges")

    def keys_read(self, shape: AttentionShape) -> float:
        return int((self.kv_idx >= 0).sum()) / max(1, self.dims[0] * self.dims[1])

    def row_counts(self, shape: AttentionShape) -> Tensor:
        flat = self.q_idx.flatten(2).long()
        slots = self.group_mask(shape).sum(-1).flatten(2)
        if flat.shape[2] == 0:
            return slots.new_zeros(*self.dims, shape.q_len)
        if self.reduce == "scatter":
            owner = self.owners(shape)
            return torch.where(owner >= 0, slots.gather(2, owner.clamp(min=0)), 0)
        place = torch.where(flat < 0, shape.q_len, flat)
        counts = slots.new_zeros(*self.dims, shape.q_len + 1)
        return counts.scatter_add(2, place, slots)[..., :-1]

    def _mask(self, shape: AttentionShape) -> Tensor:
        mask = torch.zeros(*self.dims, shape.q_len + 1, shape.k_len + 1, device=self.device)
        keep = self.group_mask(shape)
        if self.reduce == "scatter":
            keep = keep & self.owned(shape)[..., None]
        q = torch.where(self.q_idx < 0, shape.q_len, self.q_idx).long()[..., :, None]
        kv = torch.where(self.kv_idx < 0, shape.k_len, self.kv_idx).long()[..., None, :]
        place = (q * (shape.k_len + 1) + kv).flatten(2)
        hits = mask.flatten(2).scatter_add(2, place, keep.float().flatten(2)).view_as(mask)
        return hits[..., :-1, :-1] > 0

    def owned(self, shape: AttentionShape) -> Tensor:
        """(Bp, Hp, N, Wq) bool: slots that write back."""
        owner = self.owners(shape)
        flat = self.q_idx.flatten(2).long()
        slots = torch.arange(flat.shape[2], device=flat.device)
        mine = owner.gather(2, flat.clamp(min=0)) == slots
        return ((flat >= 0) & mine).view_as(self.q_idx)
