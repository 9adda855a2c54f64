"""`BlockPlan`: per query tile a list of key tiles, at any token offset, and single keys."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aerogel.attention.block_build import BlockConstructors
from aerogel.attention.plan import (
    Plan,
    check_dims,
    check_ragged,
    flat_pointers,
    head_pointers,
)
from aerogel.attention.ragged import count_rows, row_numbers
from aerogel.attention.ranges import KeyRanges, Pass
from aerogel.attention.shape import AttentionShape


@dataclass(frozen=True, eq=False)
class BlockPlan(BlockConstructors, Plan):
    """CSR of key tiles per query tile.

    Args:
        block_q: query rows per tile.
        block_k: keys per tile, where `tile_len` does not say otherwise.
        row_ptr: (Bp, Hp, nQ + 1) int64, joined over batch and heads; nQ = ceil(q_len / block_q).
        col: (nnz,) int32, key block, or first key if `col_is_offset`; ascending in a row.
        col_is_offset: `col` counts keys, not blocks: a tile may begin anywhere.
        tile_len: (nnz,) int32 keys of each tile.
        extra_ptr, extra_idx: single keys per query tile, as `row_ptr` and `col`; int32, outside
            the tiles.
        q_perm, k_perm: (L,) int64, token at each place of the plan's own order of tokens.
        tile_bias: (nnz,) float32 added to the logits of each tile; differentiable.
    """

    block_q: int
    block_k: int
    row_ptr: Tensor
    col: Tensor
    col_is_offset: bool = False
    tile_len: Tensor | None = None
    extra_ptr: Tensor | None = None
    extra_idx: Tensor | None = None
    q_perm: Tensor | None = None
    k_perm: Tensor | None = None
    tile_bias: Tensor | None = None

    @property
    def dims(self) -> tuple[int, int]:
        return self.row_ptr.shape[0], self.row_ptr.shape[1]

    def tile_ranges(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query tile, first key and number of keys of every key tile: (nnz,) int64 each."""
        row = row_numbers(flat_pointers(self.row_ptr))
        col = self.col.long()
        start = col if self.col_is_offset else col * self.block_k
        if self.tile_len is None:
            return row, start, torch.full_like(start, self.block_k)
        return row, start, self.tile_len.long()

    def extras(self) -> tuple[Tensor, Tensor]:
        """Query tile and key of every single key: (m,) int64 each."""
        if self.extra_ptr is None or self.extra_idx is None:
            none = torch.empty(0, dtype=torch.int64, device=self.device)
            return none, none
        return row_numbers(flat_pointers(self.extra_ptr)), self.extra_idx.long()

    def validate(self, shape: AttentionShape) -> None:
        check_dims(self, shape)
        if min(self.block_q, self.block_k) < 1:
            raise ValueError(f"block_q={self.block_q}, block_k={self.block_k}: expected at least 1")
        rows = (*self.dims, shape.tiles(self.block_q))
        check_ragged("row_ptr", self.row_ptr, self.col.numel(), rows)
        _check_keys("col", self.col)
        row, start, length = self.tile_ranges()
        _check_order("col", row, start, start + length, shape.k_len)
        if self.tile_bias is not None and self.tile_bias.shape != self.col.shape:
            raise ValueError(
                f"tile_bias: shape {tuple(self.tile_bias.shape)}, expected {tuple(self.col.shape)}"
            )
        if (self.extra_ptr is None) != (self.extra_idx is None):
            raise ValueError("extra_ptr and extra_idx: expected both or neither")
        if self.extra_ptr is not None and self.extra_idx is not None:
            check_ragged("extra_ptr", self.extra_ptr, self.extra_idx.numel(), rows)
            _check_keys("extra_idx", self.extra_idx)
            extra_row, key = self.extras()
            _check_order("extra_idx", extra_row, key, key + 1, shape.k_len)
            _check_outside(extra_row, key, row, start, start + length, shape.k_len)
        _check_permutation("q_perm", self.q_perm, shape.q_len)
        _check_permutation("k_perm", self.k_perm, shape.k_len)

    def passes(self, shape: AttentionShape) -> list[Pass]:
        row, start, length = self.tile_ranges()
        source = None
        if self.tile_bias is not None:
            source = torch.arange(row.numel(), device=row.device)
        tiles = self.row_ptr.shape[-1] - 1
        ranges = KeyRanges.of(
            *self.dims, self.block_q, tiles, row, start, length, self.extras(), source,
            self.tile_bias,
        )  # fmt: skip
        return [Pass(ranges)]

    def _tile_matrix(self, shape: AttentionShape, values: Tensor | None) -> Tensor:
        """(Bp, Hp, nQ, k_len + 1): per key, how many tiles hold it, or the sum of their values."""
        row, start, length = self.tile_ranges()
        end = (start + length).clamp(max=shape.k_len)
        plane = (*self.dims, self.row_ptr.shape[-1] - 1)
        flat = torch.zeros(math.prod(plane), shape.k_len + 1, device=row.device)
        if values is None:
            values = torch.ones(row.numel(), device=row.device)
        flat = flat.to(values.dtype).index_put((row, start.clamp(max=shape.k_len)), values, True)
        flat = flat.index_put((row, torch.maximum(end, start)), -values, True)
        return flat.cumsum(-1).view(*plane, -1)[..., :-1]

    def _mask(self, shape: AttentionShape) -> Tensor:
        mask = self._tile_matrix(shape, None) > 0.5
        row, key = self.extras()
        if row.numel():
            mask.view(-1, shape.k_len)[row, key] = True
        return self._to_rows(mask, shape)

    def bias(self, shape: AttentionShape) -> Tensor | None:
        if self.tile_bias is None:
            return None
        return self._to_rows(self._tile_matrix(shape, self.tile_bias), shape)

    def _to_rows(self, tiles: Tensor, shape: AttentionShape) -> Tensor:
        """(Bp, Hp, nQ, k_len) to (Bp, Hp, q_len, k_len), permutations undone."""
        rows = tiles.repeat_interleave(self.block_q, 2)[:, :, : shape.q_len]
        if self.q_perm is not None:
            rows = rows[:, :, torch.argsort(self.q_perm)]
        if self.k_perm is not None:
            rows = rows[..., torch.argsort(self.k_perm)]
        return rows

    def union(self, other: BlockPlan, k_len: int | None = None) -> BlockPlan:
        """The keys of both plans.

        Args:
            other: same query tiles and dimensions, no bias, no permutation.
            k_len: keys; needed only to cut tiles that pass the end.

        Raises:
            ValueError: the plans do not have the same query tiles, or one has a bias.
        """
        same = (self.block_q, self.row_ptr.shape) == (other.block_q, other.row_ptr.shape)
        special = any(
            t is not None
            for plan in (self, other)
            for t in (plan.tile_bias, plan.q_perm, plan.k_perm)
        )
        if not same or special:
            raise ValueError(
                f"union: plans of {tuple(self.row_ptr.shape)} x {self.block_q} and "
                f"{tuple(other.row_ptr.shape)} x {other.block_q} query rows; expected the same, "
                "without bias or permutation"
            )
        parts = [
            part
            for plan in (self, other)
            for part in (plan.tile_ranges(), (*plan.extras(), torch.ones_like(plan.extras()[0])))
        ]
        row, start, length = (torch.cat(column) for column in zip(*parts, strict=True))
        end = start + length if k_len is None else (start + length).clamp(max=k_len)
        plane = (*self.dims, self.row_ptr.shape[-1] - 1)
        return BlockPlan.from_rows(row, start, end, plane, self.block_q, self.block_k)

    def intersect_causal(self, q_offset: int = 0) -> BlockPlan:
        """Without the tiles and single keys that lie behind every query of their tile."""
        tiles = self.row_ptr.shape[-1] - 1
        row, start, _ = self.tile_ranges()
        keep = start < q_offset + (row % tiles + 1) * self.block_q
        plan = replace(
            self,
            row_ptr=_pointers(row[keep], self.row_ptr),
            col=self.col[keep],
            tile_len=None if self.tile_len is None else self.tile_len[keep],
            tile_bias=None if self.tile_bias is None else self.tile_bias[keep],
        )
        if self.extra_idx is None or self.extra_ptr is None:
            return plan
        row, key = self.extras()
        keep = key < q_offset + (row % tiles + 1) * self.block_q
        return replace(
            plan,
            extra_ptr=_pointers(row[keep], self.extra_ptr),
            extra_idx=self.extra_idx[keep],
        )


def _pointers(row: Tensor, like: Tensor) -> Tensor:
    rows = like[..., :-1].numel()
    return head_pointers(count_rows(row, rows).view(like[..., :-1].shape))


def _check_keys(name: str, index: Tensor) -> None:
    if index.dtype != torch.int32 or index.dim() != 1:
        raise ValueError(f"{name}: {index.dtype} {tuple(index.shape)}, expected a list of int32")


def _check_order(name: str, row: Tensor, start: Tensor, end: Tensor, k_len: int) -> None:
    """Ascending, disjoint, non-empty and inside the keys, row by row."""
    if row.numel() == 0:
        return
    if int(start.min()) < 0 or int(start.max()) >= k_len:
        raise ValueError(
            f"{name}: first keys {int(start.min())} to {int(start.max())}, "
            f"expected 0 to {k_len - 1}"
        )
    same = row[1:] == row[:-1]
    if bool((same & (start[1:] < end[:-1])).any()) or bool((end <= start).any()):
        raise ValueError(f"{name}: expected ascending, disjoint and non-empty tiles in every row")


def _check_outside(
    row: Tensor, key: Tensor, tile_row: Tensor, start: Tensor, end: Tensor, k_len: int
) -> None:
    """Raises ValueError if a single key lies in a tile of its row."""
    if row.numel() == 0 or tile_row.numel() == 0:
        return
    span = k_len + 1
    before = torch.searchsorted(tile_row * span + start, row * span + key, right=True) - 1
    hit = before.clamp(min=0)
    if bool(((before >= 0) & (tile_row[hit] == row) & (end[hit] > key)).any()):
        raise ValueError("extra_idx: expected keys outside the tiles of their row")


def _check_permutation(name: str, perm: Tensor | None, size: int) -> None:
    if perm is None:
        return
    whole = torch.arange(size, device=perm.device)
    if perm.shape != (size,) or not torch.equal(perm.sort().values, whole):
        raise ValueError(f"{name}: expected a permutation of {size} tokens")
