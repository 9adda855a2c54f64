"""`BankPlan`: several banks of keys under one softmax, such as raw tokens and summaries."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from aerogel.arguments import check_count
from aerogel.attention.key_list_plan import KeyListPlan
from aerogel.attention.plan import Plan, head_pointers
from aerogel.attention.ragged import within
from aerogel.attention.ranges import Pass
from aerogel.attention.shape import AttentionShape


@dataclass(frozen=True, eq=False)
class Bank:
    """One bank of keys and values.

    Args:
        plan: the choice among this bank's keys.
        k, v: (B, Hkv or Hq, n, D), the bank; None for the keys and values of the call.
        causal_rule: "token": the rule of the call; "none": all keys (the plan says which).
        padding: (B, n) bool, True at keys of the bank that exist, or None.
    """

    plan: Plan
    k: Tensor | None = None
    v: Tensor | None = None
    causal_rule: Literal["token", "none"] = "token"
    padding: Tensor | None = None

    def shape(self, shape: AttentionShape) -> AttentionShape:
        """The shape of attention on this bank, with the positions of the call."""
        if self.k is None:
            return shape
        return replace(
            shape,
            kv_heads=self.k.shape[1],
            k_len=self.k.shape[2],
            offset=shape.q_offset,
            causal=shape.causal and self.causal_rule == "token",
        )


@dataclass(frozen=True, eq=False)
class BankPlan(Plan):
    """Banks that are normalised by one softmax. `row_counts` counts the keys of all banks."""

    banks: tuple[Bank, ...]

    @property
    def dims(self) -> tuple[int, int]:
        sizes = [bank.plan.dims for bank in self.banks]
        return max(size[0] for size in sizes), max(size[1] for size in sizes)

    def validate(self, shape: AttentionShape) -> None:
        if not self.banks:
            raise ValueError("banks: expected at least one")
        for bank in self.banks:
            if (bank.k is None) != (bank.v is None):
                raise ValueError("bank: expected both k and v, or neither")
            bank.plan.validate(bank.shape(shape))

    def passes(self, shape: AttentionShape) -> list[Pass]:
        raise ValueError("plan: a BankPlan has no key ranges of its own, its banks have")

    def row_counts(self, shape: AttentionShape) -> Tensor:
        total = torch.zeros(*self.dims, shape.q_len, dtype=torch.int64)
        for bank in self.banks:
            total = total + bank.plan.row_counts(bank.shape(shape))
        return total

    def keys_read(self, shape: AttentionShape) -> float:
        return sum(bank.plan.keys_read(bank.shape(shape)) for bank in self.banks)

    def _mask(self, shape: AttentionShape) -> Tensor:
        raise ValueError("plan: a BankPlan has no mask over the call's keys, its banks have")

    def to(self, device: torch.device | str) -> BankPlan:
        moved = (
            replace(
                bank,
                plan=bank.plan.to(device),
                k=None if bank.k is None else bank.k.to(device),
                v=None if bank.v is None else bank.v.to(device),
                padding=None if bank.padding is None else bank.padding.to(device),
            )
            for bank in self.banks
        )
        return BankPlan(tuple(moved))


def past_summaries(shape: AttentionShape, block: int, summaries: int) -> KeyListPlan:
    """Every query reads the summaries of the blocks before its own.

    Args:
        shape: of the call; positions say which block a query is in.
        block: tokens that one summary stands for.
        summaries: summaries there are.

    Raises:
        ValueError: a size is out of range.
    """
    check_count("block", block)
    check_count("summaries", summaries, 0)
    counts = (shape.positions() // block).clamp(0, summaries)
    _, number = within(counts)
    return KeyListPlan(head_pointers(counts.view(1, 1, -1)), number.int())
