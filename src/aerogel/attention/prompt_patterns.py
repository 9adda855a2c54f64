"""Patterns of attention in long prompts, each found from the prompt itself.

Columns and diagonals, first tokens and a window, or blocks: MInference gives every head one of
them (arXiv 2407.02490); other systems compare with them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aerogel.arguments import check_count
from aerogel.attention.block_plan import BlockPlan
from aerogel.attention.plan import DensePlan, Plan
from aerogel.attention.ragged import sorted_by
from aerogel.attention.ranges import KeyRanges, Pass
from aerogel.attention.selector import AttentionContext, Selector
from aerogel.attention.shape import AttentionShape
from aerogel.attention.span_plan import SpanPlan
from aerogel.attention.topk import stable_topk
from aerogel.attention.vertical_slash import diagonal_sums, vertical_slash_plan

_FEWEST_DIAGONALS = 50


class PromptSelector(Selector):
    """Selects for prompts; single tokens, and prompts of one token, read all keys."""

    def plan_prefill(self, ctx: AttentionContext) -> Plan:
        if not ctx.shape.causal:
            raise ValueError("causal: expected a causal prompt")
        if ctx.shape.q_len == 1:
            return DensePlan()
        return self.plan_heads(ctx, torch.arange(ctx.shape.q_heads, device=ctx.q.device))

    def plan_heads(self, ctx: AttentionContext, heads: Tensor) -> Plan:
        """The plan of some query heads."""
        raise NotImplementedError


def check_sizes(last_q: int, force_first: int, force_local: int, block: int) -> None:
    """Raises an error unless they are sizes of a vertical-slash pattern."""
    check_count("last_q", last_q)
    check_count("force_first", force_first, 0)
    check_count("force_local", force_local, 0)
    check_count("block", block)


class VerticalSlashSelector(PromptSelector):
    """Columns and diagonals that the last queries attend to.

    Args:
        vertical: columns per head; at least `force_first` of them are taken.
        slash: diagonals per head, at least 50.
        last_q: real queries at the prompt's end that vote.
        force_first: first real keys that are always columns.
        force_local: nearest diagonals that are always taken, as far as `slash` reaches.
        block: rows and keys of a tile; 64 for the native kernel's best speed.
        merge: how bands join, see `vertical_slash_plan`.

    Raises:
        ValueError: a size is negative.
    """

    slug = "minference-vertical-slash"

    def __init__(
        self,
        vertical: int = 1000,
        slash: int = 6096,
        last_q: int = 64,
        force_first: int = 30,
        force_local: int = 100,
        block: int = 64,
        merge: str = "official",
    ) -> None:
        super().__init__()
        check_count("vertical", vertical, 0)
        check_count("slash", slash, 0)
        check_sizes(last_q, force_first, force_local, block)
        self.vertical, self.slash, self.last_q = vertical, slash, last_q
        self.force_first, self.force_local = force_first, force_local
        self.block, self.merge = block, merge

    def plan_heads(self, ctx: AttentionContext, heads: Tensor) -> Plan:
        columns, offsets = self.estimate(ctx, heads)
        return vertical_slash_plan(
            columns,
            offsets,
            ctx.shape.k_len,
            ctx.shape.q_len,
            block=self.block,
            merge=self.merge,  # type: ignore[arg-type]
        )

    def estimate(self, ctx: AttentionContext, heads: Tensor) -> tuple[Tensor, Tensor]:
        """Columns (B, H, v) and diagonals (B, H, s) of some heads, ascending."""
        length = ctx.shape.k_len
        v = min(length, max(self.vertical, self.force_first))
        s = min(length, max(self.slash, min(_FEWEST_DIAGONALS, self.force_local), 1))
        first = ctx.first_keys()
        begin = 0 if first is None else first[:, None]
        j = torch.arange(length, device=ctx.q.device)
        forced = (j >= begin) & (j < begin + self.force_first)
        columns, slashes = [], []
        for head in heads.split(1):  # one strip of rows at a time
            weights, positions = last_attention(ctx, head, self.last_q)
            strength = weights.sum(2).masked_fill(forced.view(-1, 1, length), torch.inf)
            columns.append(stable_topk(strength, v))
            diagonals = diagonal_sums(weights, positions)
            diagonals[..., : max(1, min(self.force_local, s))] = torch.inf
            slashes.append(stable_topk(diagonals, s))
        return torch.cat(columns, 1), torch.cat(slashes, 1)


class AShapeSelector(PromptSelector):
    """The first tokens and a local window (StreamingLLM's pattern).

    Args:
        n_init: first real tokens.
        n_local: tokens of the window.
    """

    slug = "minference-a-shape"

    def __init__(self, n_init: int = 128, n_local: int = 3968) -> None:
        super().__init__()
        if min(n_init, n_local) < 0:
            raise ValueError(f"n_init={n_init}, n_local={n_local}: expected at least 0")
        self.n_init, self.n_local = n_init, n_local

    def plan_heads(self, ctx: AttentionContext, heads: Tensor) -> Plan:
        span = SpanPlan.uniform(self.n_init, self.n_local)
        first = ctx.first_keys()
        parts = (span.sink, span.window, span.stride, span.phase, span.dense)
        return SpanPlan(*parts, first=first).to(ctx.q.device)


class TriShapeSelector(AShapeSelector):
    """A-shape, and the last rows read all keys.

    Args:
        n_init: first real tokens.
        n_local: tokens of the window.
        last_rows: rows at the prompt's end that read everything.
    """

    slug = "minference-tri-shape"

    def __init__(self, n_init: int = 128, n_local: int = 3968, last_rows: int = 100) -> None:
        super().__init__(n_init, n_local)
        self.last_rows = last_rows

    def plan_heads(self, ctx: AttentionContext, heads: Tensor) -> Plan:
        span = super().plan_heads(ctx, heads)
        assert isinstance(span, SpanPlan)
        return TriShapePlan(span, self.last_rows)


@dataclass(frozen=True, eq=False)
class TriShapePlan(Plan):
    """A span of tokens whose last rows read all keys.

    Args:
        span: one head for all, without strides.
        last_rows: rows at the end of the call.
    """

    span: SpanPlan
    last_rows: int

    @property
    def dims(self) -> tuple[int, int]:
        return self.span.dims

    @property
    def is_causal(self) -> bool:
        return True

    def to(self, device: torch.device | str) -> TriShapePlan:
        return TriShapePlan(self.span.to(device), self.last_rows)

    def validate(self, shape: AttentionShape) -> None:
        self.span.validate(shape)

    def _dense_rows(self, shape: AttentionShape) -> Tensor:
        return torch.arange(max(0, shape.q_len - self.last_rows), shape.q_len)

    def _mask(self, shape: AttentionShape) -> Tensor:
        mask = self.span._mask(shape)
        mask[:, :, self._dense_rows(shape)] = True
        if self.span.first is not None:
            mask &= torch.arange(shape.k_len) >= self.span.first.view(-1, 1, 1, 1)
        return mask

    def passes(self, shape: AttentionShape) -> list[Pass]:
        """The span's, and one of single rows for what lies between sinks and window."""
        rows = self._dense_rows(shape)
        batch = self.span.dims[0]
        begin = torch.zeros(1, dtype=torch.int64)
        if self.span.first is not None:
            begin = self.span.first.long()
        start = (begin + int(self.span.sink[0]))[:, None].expand(batch, rows.numel())
        end = (shape.q_offset + rows - int(self.span.window[0]) + 1).expand_as(start)
        row = torch.arange(batch)[:, None] * shape.q_len + rows
        keep = end > start
        row, start, end = row[keep], start[keep], end[keep]
        order = sorted_by(row, start, shape.k_len)
        between = KeyRanges.of(
            batch, 1, 1, shape.q_len, row[order], start[order], (end - start)[order]
        )
        return [*self.span.passes(shape), Pass(between)]


class PooledBlockSelector(PromptSelector):
    """Key blocks whose mean is most like the query block's mean.

    Args:
        top_k: key blocks per query block.
        block: tokens of a block.
        force_diagonal: the own block is always among them; the authors' code does not see to it.
    """

    slug = "minference-blocks"

    def __init__(self, top_k: int = 100, block: int = 64, force_diagonal: bool = True) -> None:
        super().__init__()
        if min(top_k, block) < 1:
            raise ValueError(f"top_k={top_k}, block={block}: expected at least 1")
        self.top_k, self.block, self.force_diagonal = top_k, block, force_diagonal

    def plan_heads(self, ctx: AttentionContext, heads: Tensor) -> Plan:
        shared = heads * ctx.shape.kv_heads // ctx.shape.q_heads
        padding = ctx.key_padding
        own = None if padding is None else padding[:, ctx.shape.q_offset :]
        q = _block_means(ctx.q[:, heads], self.block, own)
        k = _block_means(ctx.k, self.block, padding)[:, shared]
        return BlockPlan.from_topk(
            q @ k.transpose(-1, -2),
            self.top_k,
            force_diagonal=self.force_diagonal,
            q_offset=ctx.shape.q_offset,
            block_q=self.block,
            block_k=self.block,
        )


def last_attention(ctx: AttentionContext, heads: Tensor, last_q: int) -> tuple[Tensor, Tensor]:
    """Attention of the last real queries of each batch element over all keys, in float32.

    Returns:
        weights (B, H, n, L), zero in rows that a short prompt does not fill, and the positions
        (B, n) of the rows.
    """
    shape = ctx.shape
    n = min(last_q, shape.q_len)
    rows = _last_rows(ctx, n)
    taken = rows.clamp(min=0)[..., None].expand(-1, -1, ctx.q.shape[-1])
    group = shape.q_heads // shape.kv_heads
    strips = [
        (ctx.q[:, head].gather(1, taken).float() * ctx.scale)
        @ ctx.k[:, head // group].float().transpose(-1, -2)
        for head in heads.tolist()
    ]
    logits = torch.stack(strips, 1)
    positions = rows + shape.q_offset
    j = torch.arange(shape.k_len, device=ctx.q.device)
    if ctx.key_padding is None and ctx.window is None:
        begin = max(0, shape.q_offset + shape.q_len - n + 1)  # keys that the first row cannot see
        late = j[begin:] > positions[:, :, None]
        logits[..., begin:].masked_fill_(late[:, None], -torch.inf)
        return torch.softmax(logits, -1), positions
    allowed = (j <= positions[..., None]) & (rows >= 0)[..., None]
    if ctx.key_padding is not None:
        allowed &= ctx.key_padding[:, None]
    if ctx.window is not None:
        allowed &= positions[..., None] - j < ctx.window
    logits.masked_fill_(~allowed[:, None], -torch.inf)
    # Rows that are missing have no weight: as neighbours of the others they do no harm.
    around = positions[:, -1:] - torch.arange(n - 1, -1, -1, device=j.device)
    return torch.softmax(logits, -1).nan_to_num(), torch.where(rows < 0, around, positions)


def _last_rows(ctx: AttentionContext, n: int) -> Tensor:
    """The last n real query rows of each batch element, ascending: (B, n); -1 is no row."""
    shape, device = ctx.shape, ctx.q.device
    if ctx.key_padding is None:
        last = torch.arange(shape.q_len - n, shape.q_len, device=device)
        return last.expand(shape.batch, n)
    real = ctx.key_padding[:, shape.q_offset : shape.q_offset + shape.q_len]
    row = torch.arange(shape.q_len, device=device)
    return torch.where(real, row, -1).topk(n, -1).values.flip(-1)


def _block_means(x: Tensor, block: int, real: Tensor | None) -> Tensor:
    """(B, H, L, D) to means of blocks (B, H, ceil(L / block), D); padding counts as zeros."""
    x = x.float() if real is None else x.float() * real[:, None, :, None]
    size = -(-x.shape[2] // block) * block
    x = torch.nn.functional.pad(x, (0, 0, 0, size - x.shape[2]))
    return x.unflatten(2, (-1, block)).mean(3)
