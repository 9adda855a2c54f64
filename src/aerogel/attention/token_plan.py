"""`TokenPlan`: a subset of the tokens, as queries, as keys or as both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from aerogel.attention.group_plan import GroupPlan
from aerogel.attention.plan import Plan
from aerogel.attention.ranges import Pass
from aerogel.attention.shape import AttentionShape


@dataclass(frozen=True, eq=False)
class TokenPlan(Plan):
    """A ragged subset of the tokens; runs as one group per batch element, or per key head of it.

    Queries that are left out get zeros.

    Args:
        index: (B, most) or (B, Hkv, most) int32 tokens, ascending; entries past `count` are
            ignored.
        count: (B,) or (B, Hkv) int64 tokens of each list.
        side: which tokens are restricted: "keys", "queries" or "both".
    """

    index: Tensor
    count: Tensor
    side: Literal["keys", "queries", "both"] = "keys"

    @classmethod
    def from_mask(
        cls, mask: Tensor, side: Literal["keys", "queries", "both"] = "keys"
    ) -> TokenPlan:
        """The tokens where `mask` (B, L) or (B, Hkv, L) bool is true."""
        count = mask.sum(-1)
        most = max(1, int(count.max())) if mask.shape[0] else 0
        order = torch.argsort((~mask).to(torch.uint8), dim=-1, stable=True)[..., :most]
        return cls(order.int(), count, side)

    @property
    def dims(self) -> tuple[int, int]:
        return self.index.shape[0], self.index.shape[1] if self.index.dim() == 3 else 1

    def slots(self) -> Tensor:
        """(B, 1 or Hkv, most) int32: the tokens, -1 past each count."""
        inside = torch.arange(self.index.shape[-1], device=self.device) < self.count[..., None]
        return torch.where(inside, self.index, -1).view(*self.dims, -1)

    def groups(self, shape: AttentionShape) -> GroupPlan:
        """The same choice as groups."""
        chosen = self.slots()[:, :, None]
        full = [
            torch.arange(n, dtype=torch.int32, device=self.device).expand(*self.dims, 1, n)
            for n in (shape.q_len, shape.k_len)
        ]
        return GroupPlan(
            full[0] if self.side == "keys" else chosen,
            full[1] if self.side == "queries" else chosen,
        )

    def validate(self, shape: AttentionShape) -> None:
        if self.side not in ("keys", "queries", "both"):
            raise ValueError(f"side={self.side!r}: expected 'keys', 'queries' or 'both'")
        most = self.index.shape[-1]
        if self.count.shape != self.index.shape[:-1] or int(self.count.max()) > most:
            raise ValueError(
                f"count: {self.count.tolist()}, expected {tuple(self.index.shape[:-1])} of at most "
                f"{most}"
            )
        if self.dims[1] not in (1, shape.kv_heads):
            raise ValueError(f"index: {self.dims[1]} heads, expected 1 or {shape.kv_heads}")
        slots = self.slots()
        if bool(((slots[..., 1:] >= 0) & (slots[..., 1:] <= slots[..., :-1])).any()):
            raise ValueError("index: expected ascending tokens")
        self.groups(shape).validate(shape)

    def passes(self, shape: AttentionShape) -> list[Pass]:
        return self.groups(shape).passes(shape)

    def row_counts(self, shape: AttentionShape) -> Tensor:
        return self.groups(shape).row_counts(shape)

    def keys_read(self, shape: AttentionShape) -> float:
        return self.groups(shape).keys_read(shape)

    def _mask(self, shape: AttentionShape) -> Tensor:
        return self.groups(shape)._mask(shape)


def heads_as_batch(x: Tensor, heads: int) -> Tensor:
    """(B, H, ...) to (B * heads, H / heads, ...): each of `heads` parts a batch element."""
    return x if heads == 1 else x.unflatten(1, (heads, -1)).flatten(0, 1)


def batch_as_heads(x: Tensor, heads: int) -> Tensor:
    """Undoes `heads_as_batch`."""
    return x if heads == 1 else x.unflatten(0, (-1, heads)).flatten(1, 2)


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Chosen tokens of `x` (B, H, L, D): index (B or 1, h, n) -> (B, H, n, D); -1 gives zeros.

    h divides H: head j of x takes the list of head ``j * h // H``.
    """
    batch, heads, _, dim = x.shape
    index = _per_head(index, batch, heads)
    taken = x.gather(2, index.clamp(min=0)[..., None].expand(-1, -1, -1, dim))
    return taken * (index >= 0)[..., None] if bool((index < 0).any()) else taken


def scatter_tokens(x: Tensor, index: Tensor, length: int) -> Tensor:
    """Adds tokens (B, H, n, D) to their places: -> (B, H, length, D); -1 is nowhere."""
    batch, heads, _, dim = x.shape
    index = _per_head(index, batch, heads)
    place = torch.where(index < 0, length, index)[..., None].expand(-1, -1, -1, dim)
    out = x.new_zeros(batch, heads, length + 1, dim)
    return out.scatter_add(2, place, x)[:, :, :-1]


def _per_head(index: Tensor, batch: int, heads: int) -> Tensor:
    index = index.long().expand(batch, -1, -1)
    return index.repeat_interleave(heads // index.shape[1], 1)
