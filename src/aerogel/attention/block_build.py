"""Ways to write down a `BlockPlan`: masks, lists, scores, ranges, regions of a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from aerogel.attention.plan import head_pointers
from aerogel.attention.ragged import count_rows, merge_ranges, sorted_by
from aerogel.attention.topk import stable_topk

P = TypeVar("P", bound="BlockConstructors")


class BlockConstructors:
    """The constructors of `BlockPlan`."""

    if TYPE_CHECKING:

        def __init__(
            self,
            block_q: int,
            block_k: int,
            row_ptr: Tensor,
            col: Tensor,
            col_is_offset: bool = False,
            tile_len: Tensor | None = None,
            *,
            q_perm: Tensor | None = None,
            k_perm: Tensor | None = None,
        ) -> None: ...

        block_q: int
        block_k: int
        row_ptr: Tensor
        col: Tensor

    @classmethod
    def from_mask(cls: type[P], mask: Tensor, block_q: int = 64, block_k: int = 64) -> P:
        """Keeps the tiles where `mask` (Bp, Hp, nQ, nK) bool is true.

        Raises:
            ValueError: `mask` is not a four-dimensional bool tensor.
        """
        if mask.dtype != torch.bool or mask.dim() != 4:
            raise ValueError(
                f"mask: {mask.dtype} {tuple(mask.shape)}, expected bool (Bp, Hp, nQ, nK)"
            )
        col = mask.nonzero()[:, 3].int()
        return cls(block_q, block_k, head_pointers(mask.sum(-1)), col)

    @classmethod
    def from_lists(
        cls: type[P], lists: Tensor, pad: int = -1, block_q: int = 64, block_k: int = 64
    ) -> P:
        """Keeps the key blocks named in `lists` (Bp, Hp, nQ, K), in any order; `pad` names none."""
        if lists.dim() != 4 or lists.is_floating_point():
            raise ValueError(
                f"lists: {lists.dtype} {tuple(lists.shape)}, expected ints of 4 dimensions"
            )
        kept = lists != pad
        ordered = torch.where(kept, lists, torch.iinfo(torch.int32).max).sort(-1).values
        counts = kept.sum(-1)
        inside = torch.arange(lists.shape[-1], device=lists.device) < counts[..., None]
        return cls(block_q, block_k, head_pointers(counts), ordered[inside].int())

    @classmethod
    def from_topk(
        cls: type[P],
        scores: Tensor,
        k: int,
        *,
        force_diagonal: bool = True,
        causal: bool = True,
        q_offset: int = 0,
        block_q: int = 64,
        block_k: int = 64,
    ) -> P:
        """The k best key blocks of every query tile, or all of them where fewer can be reached.

        Args:
            scores: (Bp, Hp, nQ, nK) floats.
            k: key blocks per query tile.
            force_diagonal: the tile's own blocks count among the k, whatever their score.
            causal: blocks behind the tile's last query take no part.
            q_offset: position of the first query.
            block_q: query rows per tile.
            block_k: keys per block.
        """
        grid = (scores.shape[2], scores.shape[3], block_q, block_k, q_offset, scores.device)
        allowed = torch.ones_like(scores, dtype=torch.bool)
        if causal:
            allowed &= reachable_blocks(*grid)
        ranked = scores.float().masked_fill(~allowed, -torch.inf)
        if force_diagonal:
            ranked = ranked.masked_fill(own_blocks(*grid) & allowed, torch.inf)
        best = stable_topk(ranked, min(k, scores.shape[3]))
        mask = torch.zeros_like(allowed).scatter(-1, best, True) & allowed
        return cls.from_mask(mask, block_q, block_k)

    @classmethod
    def from_threshold(
        cls: type[P],
        scores: Tensor,
        threshold: float,
        *,
        force_diagonal: bool = True,
        causal: bool = True,
        q_offset: int = 0,
        block_q: int = 64,
        block_k: int = 64,
    ) -> P:
        """The key blocks with ``score >= threshold``; other arguments as `cls.from_topk`."""
        grid = (scores.shape[2], scores.shape[3], block_q, block_k, q_offset, scores.device)
        mask = scores.float() >= threshold
        if force_diagonal:
            mask |= own_blocks(*grid)
        if causal:
            mask &= reachable_blocks(*grid)
        return cls.from_mask(mask, block_q, block_k)

    @classmethod
    def from_ranges(
        cls: type[P], start: Tensor, length: Tensor, block_q: int = 64, block_k: int = 64
    ) -> P:
        """Keeps ranges of keys, of any length and beginning anywhere.

        Args:
            start: (Bp, Hp, nQ, K) ints, first keys in any order; ranges that touch or overlap
                become one.
            length: (Bp, Hp, nQ, K) ints, keys; 0 is no range.
            block_q: query rows per tile.
            block_k: keys per block of the plan.
        """
        if start.shape != length.shape or start.dim() != 4:
            raise ValueError(
                f"start {tuple(start.shape)}, length {tuple(length.shape)}: expected one shape "
                "(Bp, Hp, nQ, K)"
            )
        plane = (start.shape[0], start.shape[1], start.shape[2])
        rows = torch.arange(plane[0] * plane[1] * plane[2], device=start.device)
        row = rows.repeat_interleave(start.shape[-1])
        first = start.flatten().long()
        return cls.from_rows(row, first, first + length.flatten().long(), plane, block_q, block_k)

    @classmethod
    def from_regions(
        cls: type[P], row_blocks: int, col_index: Tensor, block_tokens: int, grid: tuple[int, int]
    ) -> P:
        """Every region of a picture attends to some regions (BiFormer).

        Args:
            row_blocks: regions along the height; P / row_blocks lie along the width.
            col_index: (B, P, k) ints, the regions that region p attends to.
            block_tokens: tokens of a region.
            grid: height and width of the picture in tokens, numbered row by row.

        Raises:
            ValueError: the regions do not tile the grid.
        """
        height, width = grid
        regions = col_index.shape[1]
        col_blocks = regions // row_blocks
        fits = row_blocks * col_blocks == regions and regions * block_tokens == height * width
        if not fits or height % row_blocks or width % col_blocks:
            raise ValueError(
                f"row_blocks={row_blocks}, {regions} regions of {block_tokens} tokens: expected to "
                f"tile {height} x {width}"
            )
        tokens = torch.arange(height * width, device=col_index.device)
        cut = tokens.view(row_blocks, height // row_blocks, col_blocks, width // col_blocks)
        order = cut.permute(0, 2, 1, 3).reshape(-1)
        lists = cls.from_lists(col_index[:, None], -1, block_tokens, block_tokens)
        return lists._permuted(order)

    def _permuted(self: P, order: Tensor) -> P:
        return type(self)(
            self.block_q, self.block_k, self.row_ptr, self.col, q_perm=order, k_perm=order
        )

    @classmethod
    def from_rows(
        cls: type[P],
        row: Tensor,
        start: Tensor,
        end: Tensor,
        plane: tuple[int, int, int],
        block_q: int,
        block_k: int,
    ) -> P:
        """Key ranges in any order; ranges that touch or overlap become one.

        Args:
            row: (n,) int64 query tile, numbered over `plane` = (Bp, Hp, nQ).
            start: (n,) int64 first key.
            end: (n,) int64 past the last key.
            plane: (Bp, Hp, nQ).
            block_q: query rows per tile.
            block_k: keys per block of the plan.
        """
        keep = end > start
        row, start, end = row[keep], start[keep], end[keep]
        limit = int(end.max()) if end.numel() else 0
        order = sorted_by(row, start, limit)
        row, start, end = merge_ranges(row[order], start[order], end[order], limit)
        counts = count_rows(row, plane[0] * plane[1] * plane[2]).view(plane)
        return cls(
            block_q,
            block_k,
            head_pointers(counts),
            start.int(),
            col_is_offset=True,
            tile_len=(end - start).int(),
        )


def reachable_blocks(
    n_q: int, n_k: int, block_q: int, block_k: int, q_offset: int, device: torch.device | str
) -> Tensor:
    """(n_q, n_k) bool: key blocks that begin at or before the tile's last query."""
    last = q_offset + (torch.arange(n_q, device=device) + 1) * block_q - 1
    return torch.arange(n_k, device=device) * block_k <= last[:, None]


def own_blocks(
    n_q: int, n_k: int, block_q: int, block_k: int, q_offset: int, device: torch.device | str
) -> Tensor:
    """(n_q, n_k) bool: key blocks that hold the position of a query of the tile."""
    first = q_offset + torch.arange(n_q, device=device) * block_q
    start = torch.arange(n_k, device=device) * block_k
    return (start < first[:, None] + block_q) & (start + block_k > first[:, None])
