"""Fixed block patterns per head: a local window and a shard of the earlier blocks, or any mask."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from aerogel.arguments import check_count
from aerogel.attention.block_plan import BlockPlan
from aerogel.attention.shape import AttentionShape
from aerogel.attention.span_plan import SpanPlan


class Coverage(NamedTuple):
    """Which earlier blocks the heads of a layer see together.

    Attributes:
        residues: residues of block numbers, modulo the stride, that some sparse head keeps.
        complete: whether every block is kept by some head, dense ones included.
    """

    residues: tuple[int, ...]
    complete: bool


@dataclass(frozen=True)
class LocalStridePattern:
    """A local window and every V-th earlier block, shifted from head to head.

    Query block i of key head h reads key blocks j <= i with ``i - j < local_blocks`` or
    ``(j + h * step + head_offset) % stride == 0``. Columns are absolute: a block that has left a
    head's window and is not on its stride is never read again, so that it need not be kept. Without
    the causal rule, windows reach to both sides and strides count blocks from the window's edges:
    with l blocks beyond the left edge and r beyond the right one, ``(l + r) % stride == 0``.

    Args:
        num_heads, num_kv_heads: query and key heads; all query heads of a key head share a pattern.
        block: tokens of a block, a power of two.
        local_blocks: blocks of the window, the own one included; without the causal rule to either
            side, or (left, right).
        stride: V; 1 keeps everything.
        dense_heads: the last so many key heads read all keys.
        head_offset: blocks by which all heads are shifted.
        step: blocks from head to head, default ``max(1, stride // num_heads)``.
        homo_head: all heads as head 0.
        causal: False for the form that reads to both sides.
        position: what the stride counts: "absolute" key blocks, or blocks "relative" to the
            window's edges, alike for all heads; default "absolute" with the causal rule, else
            "relative". Relative causal columns move with the query: no cache can drop them.

    Raises:
        ValueError: a size is out of range.

    Reference:
        Lin et al., arXiv 2407.17678.
    """

    num_heads: int
    num_kv_heads: int
    block: int = 64
    local_blocks: int | tuple[int, int] = 16
    stride: int = 8
    dense_heads: int = 0
    head_offset: int = 0
    step: int | None = None
    homo_head: bool = False
    causal: bool = True
    position: Literal["absolute", "relative"] | None = None

    def __post_init__(self) -> None:
        for name, least in (("block", 1), ("stride", 1), ("num_heads", 1), ("num_kv_heads", 1)):
            check_count(name, getattr(self, name), least)
        check_count("dense_heads", self.dense_heads, 0)
        check_count("head_offset", self.head_offset, 0)
        if self.step is not None:
            check_count("step", self.step, 0)
        if self.block & (self.block - 1):
            raise ValueError(f"block={self.block}: expected a power of two")
        self._check_window()
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}: expected a multiple"
            )
        if self.dense_heads > self.num_kv_heads:
            raise ValueError(
                f"dense_heads={self.dense_heads}: expected 0 to num_kv_heads={self.num_kv_heads}"
            )
        if self.homo_head and self.dense_heads:
            raise ValueError(f"dense_heads={self.dense_heads}: expected 0 with homo_head=True")

    def _check_window(self) -> None:
        even = not isinstance(self.local_blocks, tuple)
        for each in self.local_blocks if isinstance(self.local_blocks, tuple) else self.window:
            check_count("local_blocks", each, 0)
        if isinstance(self.local_blocks, tuple) and len(self.local_blocks) != 2:
            raise ValueError(f"local_blocks={self.local_blocks}: expected a number, or two")
        if self.causal and not even:
            raise ValueError(
                f"local_blocks={self.local_blocks}: expected a number with causal=True"
            )
        if min(self.window) < (0 if even and self.stride == 1 else 1):
            raise ValueError(f"local_blocks={self.local_blocks}: expected at least 1")
        if self.position not in (None, "absolute", "relative"):
            raise ValueError(f"position={self.position!r}: expected 'absolute' or 'relative'")

    @property
    def window(self) -> tuple[int, int]:
        """Blocks of the window to the left and to the right, the own one in both."""
        if not isinstance(self.local_blocks, tuple):
            return self.local_blocks, 1 if self.causal else self.local_blocks
        left, right = self.local_blocks
        return left, right

    @property
    def evictable(self) -> bool:
        """Whether what has left a head's window and is not on its stride is never read again."""
        return self.causal and self.position != "relative"

    @property
    def shifts(self) -> list[int]:
        """Blocks by which each key head's columns are shifted."""
        step = max(1, self.stride // self.num_heads) if self.step is None else self.step
        heads = range(self.num_kv_heads)
        return [self.head_offset + (0 if self.homo_head else h * step) for h in heads]

    @property
    def dense(self) -> list[bool]:
        """Whether each key head reads all keys."""
        first = self.num_kv_heads - self.dense_heads
        return [h >= first for h in range(self.num_kv_heads)]

    def mask(self, n_q: int, n_k: int, past: int = 0) -> Tensor:
        """(num_kv_heads, n_q, n_k) bool, for query blocks `past` to ``past + n_q - 1``."""
        i = past + torch.arange(n_q)[:, None]
        j = torch.arange(n_k)
        dense = torch.tensor(self.dense)[:, None, None]
        left, right = self.window
        absolute = self.causal if self.position is None else self.position == "absolute"
        if absolute:
            shift = torch.tensor(self.shifts)[:, None, None]
            near = (i - j < left) & (j - i < right)
            kept = near | ((j + shift) % self.stride == 0)
        else:
            beyond = (i - j - left + 1).clamp(min=0) + (j - i - right + 1).clamp(min=0)
            kept = (beyond % self.stride == 0).expand(self.num_kv_heads, -1, -1)
        kept = kept | dense
        return kept & (j <= i) if self.causal else kept

    def coverage(self) -> Coverage:
        """What the heads see together of blocks outside the window, by absolute columns."""
        sparse = [s for s, dense in zip(self.shifts, self.dense, strict=True) if not dense]
        residues = tuple(sorted({-shift % self.stride for shift in sparse}))
        return Coverage(residues, len(residues) == self.stride or self.dense_heads > 0)

    def cache_tokens(self, length: int) -> list[int]:
        """Slots that each key head's cache has after `length` tokens.

        The ring of the window, and all blocks on the stride so far; a dense head has a ring of one
        block and all blocks. A pattern whose blocks may come back keeps all.
        """
        blocks = -(-length // self.block)
        if not self.evictable:
            return [blocks * self.block] * self.num_kv_heads
        window = self.window[0]
        sizes = []
        for shift, dense in zip(self.shifts, self.dense, strict=True):
            columns = sum((j + shift) % self.stride == 0 for j in range(blocks))
            whole = 1 + blocks if dense else window + columns
            sizes.append(whole * self.block)
        return sizes

    def span(self, first: Tensor | None = None, device: torch.device | str = "cpu") -> SpanPlan:
        """The causal pattern as a plan of key heads; blocks count from the `first` real key.

        Raises:
            ValueError: the pattern is not causal, or its columns are relative.
        """
        if not self.evictable:
            raise ValueError(
                f"causal={self.causal}, position={self.position!r}: expected a causal pattern of "
                "absolute columns; `mask` has the others"
            )
        heads = self.num_kv_heads
        phase = [shift % self.stride for shift in self.shifts]

        def each(value: int | list[int]) -> Tensor:
            values = value if isinstance(value, list) else [value] * heads
            return torch.tensor(values, dtype=torch.int32, device=device)

        return SpanPlan(
            sink=each(0),
            window=each(self.window[0]),
            stride=each(self.stride),
            phase=each(phase),
            dense=torch.tensor(self.dense, device=device),
            block=self.block,
            granularity="block",
            first=first,
        )


class CustomBlockPattern:
    """Any fixed block mask per head.

    Args:
        mask: (heads, blocks, blocks) bool, one row of key blocks per query block.
        block: tokens of a block, a power of two.
        causal: whether entries above the diagonal are an error.

    Raises:
        ValueError: the mask is no such tensor, has an empty row, or entries above the diagonal.
    """

    def __init__(self, mask: Tensor, block: int = 64, causal: bool = True) -> None:
        if mask.dtype != torch.bool or mask.dim() != 3 or mask.shape[1] != mask.shape[2]:
            raise ValueError(
                f"mask: {mask.dtype} {tuple(mask.shape)}, expected bool (heads, blocks, blocks)"
            )
        check_count("block", block)
        if block & (block - 1):
            raise ValueError(f"block={block}: expected a power of two")
        if not bool(mask.any(-1).all()):
            head, row = (~mask.any(-1)).nonzero()[0].tolist()
            raise ValueError(f"mask: row {row} of head {head} is empty, expected a block in each")
        if causal and bool(mask.triu(1).any()):
            raise ValueError("mask: entries above the diagonal, expected none with causal=True")
        self.mask, self.block, self.causal = mask, block, causal
        if causal and not self.evictable():
            warnings.warn(
                "mask: a block that a row skips is read by a later row, so that a KV cache must "
                "keep it (a relative stride?)",
                stacklevel=2,
            )

    def evictable(self) -> bool:
        """Whether a block, once skipped, is never read again ("KV-efficient")."""
        reached = torch.ones(self.mask.shape[1:], dtype=torch.bool).tril()[:-1]
        again = self.mask[:, 1:] & ~self.mask[:, :-1] & reached
        return not bool(again.any())

    def plan(self, shape: AttentionShape) -> BlockPlan:
        """The rows and columns of the mask that a call needs.

        Raises:
            ValueError: the sequence is longer than the mask.
        """
        if shape.k_len > self.mask.shape[1] * self.block:
            raise ValueError(
                f"{shape.k_len} keys, expected at most {self.mask.shape[1] * self.block} "
                f"({self.mask.shape[1]} blocks of {self.block} in the mask)"
            )
        return block_mask_plan(self.mask, self.block, shape)


def block_mask_plan(mask: Tensor, block: int, shape: AttentionShape) -> BlockPlan:
    """A plan of a mask (heads, blocks, blocks) over all blocks, for rows that begin anywhere."""
    tile = math.gcd(block, shape.q_offset)
    rows = (shape.q_offset + torch.arange(shape.tiles(tile)) * tile) // block
    blocks = -(-shape.k_len // block)
    return BlockPlan.from_mask(mask[None, :, rows, :blocks].contiguous(), tile, block)
