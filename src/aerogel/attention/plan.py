"""Plans: how a selector says which keys each query attends to.

A plan is a frozen choice of (query, key) pairs in a form that kernels can follow without ever
holding an L x L mask. Batch and head dimensions may be 1 (shared); heads may also be the number of
key heads (shared by a group of query heads).
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from aerogel.attention.lowering import TileStream, count_pairs, lower
from aerogel.attention.ranges import KeyRanges, Pass
from aerogel.attention.shape import AttentionShape

PlanT = TypeVar("PlanT", bound="Plan")


@dataclass(frozen=True)
class PlanStats:
    """What a plan costs.

    Attributes:
        density: kept pairs divided by the pairs of dense (causal, if asked) attention.
        min_row, max_row: fewest and most keys that one query row reads.
        kv_bytes: bytes of K and V that the query tiles (or groups) of all query heads read, for one
            batch element; a key counts once for each tile that reads it.
    """

    density: float
    min_row: int
    max_row: int
    kv_bytes: int


class Plan(abc.ABC):
    """Common face of all plans."""

    @property
    @abc.abstractmethod
    def dims(self) -> tuple[int, int]:
        """Batch and head dimension, each possibly 1."""

    @property
    def is_causal(self) -> bool:
        """Whether the plan's meaning includes the causal rule."""
        return False

    @property
    def device(self) -> torch.device:
        """Where the plan's tensors are."""
        tensors = [t for f in fields(self) if isinstance(t := getattr(self, f.name), Tensor)]  # type: ignore[arg-type]
        return tensors[0].device if tensors else torch.device("cpu")

    def validate(self, shape: AttentionShape) -> None:
        """Raises ValueError if the plan does not describe attention of this shape."""
        check_dims(self, shape)

    @abc.abstractmethod
    def passes(self, shape: AttentionShape) -> list[Pass]:
        """The key ranges of every query tile; several passes share one softmax by `merge`."""

    def streams(self, shape: AttentionShape, window: int | None = None) -> list[TileStream]:
        """The tiles that kernels read, under a further window in tokens; `merge` unites streams."""
        return lower(self.passes(shape), self.shaped(shape), window)

    @abc.abstractmethod
    def _mask(self, shape: AttentionShape) -> Tensor:
        """(Bp, Hp, q_len, k_len) bool: the plan's own choice."""

    def shaped(self, shape: AttentionShape) -> AttentionShape:
        """`shape`, causal if the plan is."""
        return replace(shape, causal=True) if self.is_causal else shape

    def to_dense_mask(self, shape: AttentionShape) -> Tensor:
        """(Bp, Hp, q_len, k_len) bool: allowed pairs, the causal rule of `shape` included."""
        return self._mask(shape) & self.shaped(shape).causal_mask(self.device)

    def row_counts(self, shape: AttentionShape) -> Tensor:
        """Keys that each query row reads: (Bp, Hp, q_len) int64."""
        return count_pairs(self.passes(shape), self.shaped(shape))

    def density(self, shape: AttentionShape) -> float:
        """Kept pairs divided by the pairs of dense attention, averaged over batch and heads."""
        allowed = shape.pairs() * self.dims[0] * self.dims[1]
        return float(self.row_counts(shape).sum()) / allowed if allowed else 0.0

    def stats(self, shape: AttentionShape, *, head_dim: int, item_bytes: int = 4) -> PlanStats:
        """What the plan costs for heads of `head_dim` with elements of `item_bytes`."""
        counts = self.row_counts(shape)
        allowed = shape.pairs() * self.dims[0] * self.dims[1]
        return PlanStats(
            float(counts.sum()) / allowed if allowed else 0.0,
            int(counts.min()) if counts.numel() else 0,
            int(counts.max()) if counts.numel() else 0,
            round(2 * item_bytes * head_dim * self.keys_read(shape) * shape.q_heads),
        )

    def keys_read(self, shape: AttentionShape) -> float:
        """Keys that the query tiles of a head read together, mean over the plan's heads and batch.

        Keys that no row of a tile may see do not count.
        """
        streams = lower(self.passes(shape), self.shaped(shape))
        read = sum(int(stream.length.sum()) for stream in streams)
        return read / max(1, self.dims[0] * self.dims[1])

    def to(self: PlanT, device: torch.device | str) -> PlanT:
        """The plan with its tensors on `device`."""
        moved: dict[str, Any] = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                moved[field.name] = value.to(device)
        return replace(self, **moved) if moved else self  # type: ignore[type-var]

    def bias(self, shape: AttentionShape) -> Tensor | None:
        """Additive logits (Bp, Hp, q_len, k_len), differentiable, or None."""
        return None


def check_dims(plan: Plan, shape: AttentionShape) -> None:
    """Raises ValueError unless the plan's batch and heads fit the tensors."""
    batch, heads = plan.dims
    name = type(plan).__name__
    if batch not in (1, shape.batch):
        raise ValueError(f"{name}: batch dimension {batch}, expected 1 or {shape.batch}")
    if heads not in (1, shape.kv_heads, shape.q_heads):
        raise ValueError(
            f"{name}: {heads} heads, expected 1, {shape.kv_heads} (key heads) or "
            f"{shape.q_heads} (query heads)"
        )


def check_ragged(name: str, ptr: Tensor, entries: int, rows: tuple[int, ...]) -> None:
    """Raises ValueError unless `ptr` (Bp, Hp, rows + 1) cuts `entries` entries into rows."""
    if ptr.dtype != torch.int64 or ptr.shape != (*rows[:-1], rows[-1] + 1):
        raise ValueError(
            f"{name}: {ptr.dtype} {tuple(ptr.shape)}, expected int64 {(*rows[:-1], rows[-1] + 1)}"
        )
    flat = ptr.reshape(-1, ptr.shape[-1])
    joined = bool((flat[1:, 0] == flat[:-1, -1]).all())
    ends = (int(flat[0, 0]), int(flat[-1, -1]))
    if ends != (0, entries) or not joined or bool((flat.diff(dim=-1) < 0).any()):
        raise ValueError(f"{name}: expected ascending row starts from 0 to {entries}, got {ends}")


def flat_pointers(ptr: Tensor) -> Tensor:
    """(Bp, Hp, n + 1) row starts of a joined ragged array as one (Bp * Hp * n + 1,)."""
    rows = ptr[..., :-1].flatten()
    return torch.cat([rows, ptr.flatten()[-1:]])


def head_pointers(counts: Tensor) -> Tensor:
    """Row lengths (Bp, Hp, n) to row starts (Bp, Hp, n + 1), joined over batch and heads."""
    flat = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts.flatten(), 0, out=flat[1:])
    starts = flat[:-1].view(counts.shape)
    ends = flat[1:].view(counts.shape)[..., -1:]
    return torch.cat([starts, ends], -1)


@dataclass(frozen=True, eq=False)
class DensePlan(Plan):
    """All keys. Runs on `torch.nn.functional.scaled_dot_product_attention` where that fits."""

    @property
    def dims(self) -> tuple[int, int]:
        return 1, 1

    def _mask(self, shape: AttentionShape) -> Tensor:
        return torch.ones(1, 1, shape.q_len, shape.k_len, dtype=torch.bool)

    def row_counts(self, shape: AttentionShape) -> Tensor:
        if not shape.causal:
            return torch.full((1, 1, shape.q_len), shape.k_len)
        return (shape.positions() + 1).clamp(0, shape.k_len).view(1, 1, -1)

    def passes(self, shape: AttentionShape) -> list[Pass]:
        tiles = shape.tiles(64)
        row = torch.arange(tiles)
        start = torch.zeros_like(row)
        return [Pass(KeyRanges.of(1, 1, 64, tiles, row, start, start + shape.k_len))]
