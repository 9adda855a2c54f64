"""The sizes of one attention call: everything a plan needs to know about the tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of q (batch, q_heads, q_len, D) and k (batch, kv_heads, k_len, D).

    Query row i sits at position ``q_offset + i``, key j at position j.

    Args:
        offset: position of the first query row; default ``k_len - q_len`` (the last rows).
        causal: whether a query may read only keys at or before its own position.

    Raises:
        ValueError: a size is negative, or the heads do not divide.
    """

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    k_len: int
    offset: int | None = None
    causal: bool = False

    def __post_init__(self) -> None:
        sizes = (self.batch, self.q_heads, self.kv_heads, self.q_len, self.k_len)
        if min(sizes) < 0:
            raise ValueError(f"AttentionShape{sizes}: expected no negative size")
        if self.kv_heads < 1 or self.q_heads % self.kv_heads:
            raise ValueError(
                f"q_heads={self.q_heads}, kv_heads={self.kv_heads}: expected a multiple"
            )

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, *, causal: bool = False, offset: int | None = None
    ) -> AttentionShape:
        """The shape of these tensors."""
        return cls(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], offset, causal)

    @property
    def q_offset(self) -> int:
        """Position of the first query row."""
        return self.k_len - self.q_len if self.offset is None else self.offset

    def tiles(self, block_q: int) -> int:
        """Query tiles of `block_q` rows per head."""
        return -(-self.q_len // block_q)

    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """Positions of the query rows: (q_len,) int64."""
        return torch.arange(self.q_offset, self.q_offset + self.q_len, device=device)

    def causal_mask(self, device: torch.device | str = "cpu") -> Tensor:
        """Which keys each row may read by position alone: (q_len, k_len) bool."""
        keys = torch.arange(self.k_len, device=device)
        if not self.causal:
            return torch.ones(self.q_len, self.k_len, dtype=torch.bool, device=device)
        return keys[None] <= self.positions(device)[:, None]

    def pairs(self) -> int:
        """(query, key) pairs of one head that the causal rule, if any, allows."""
        if not self.causal:
            return self.q_len * self.k_len
        reach = (self.positions() + 1).clamp(0, self.k_len)
        return int(reach.sum())
