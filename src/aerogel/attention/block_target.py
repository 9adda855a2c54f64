"""Which blocks of an attention map hold a large weight: what block gates learn, and an oracle.

Paper: Gao et al., SeerAttention, arXiv 2410.13276.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from aerogel.attention.block_plan import BlockPlan
from aerogel.attention.engine import Attended, attend
from aerogel.attention.plan import DensePlan, Plan
from aerogel.attention.seer_gate import BLOCKS, real_blocks
from aerogel.attention.selector import AttentionContext, Selector
from aerogel.attention.topk import share_over_group, stable_topk
from aerogel.kernels.attention_select import choose_blocks

Method = Literal["threshold", "ratio"]
_ROWS = 64  # of a map at a time
_TINY = 1e-9


@dataclass(frozen=True)
class BlockRule:
    """How scores of blocks become a choice.

    Args:
        method: "threshold" keeps blocks whose probability among the row's blocks is above
            `threshold`; "ratio" keeps so many of each row's best that `ratio` of the causal area
            stays.
        threshold: in [0, 1).
        ratio: in (0, 1].
        last_block_dense: the last two rows of blocks keep everything.
        force_diagonal: every row keeps its own block; it counts among the best of its row.

    Raises:
        ValueError: a value is out of range.
    """

    method: Method = "threshold"
    threshold: float = 5e-4
    ratio: float | None = None
    last_block_dense: bool = True
    force_diagonal: bool = True

    def __post_init__(self) -> None:
        if self.method not in ("threshold", "ratio"):
            raise ValueError(f"method={self.method!r}: expected 'threshold' or 'ratio'")
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold={self.threshold}: expected a probability in [0, 1)")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio}: expected a share in (0, 1]")
        if self.method == "ratio" and self.ratio is None:
            raise ValueError("ratio=None: expected a share in (0, 1] with method='ratio'")

    def plan(self, scores: Tensor, rows: Tensor | None, block: int) -> BlockPlan:
        """The blocks of `block` tokens that are kept; other arguments as `choose`."""
        if self.method == "threshold":
            return BlockPlan.from_mask(self.choose(scores, rows), block, block)
        dense_from = None
        if self.last_block_dense:
            dense_from = _last_row(scores, rows) - 1
        row_ptr, col = choose_blocks(
            scores, self._count(scores), own=self.force_diagonal, dense_from=dense_from
        )
        return BlockPlan(block, block, row_ptr, col)

    def choose(self, scores: Tensor, rows: Tensor | None = None) -> Tensor:
        """Blocks that are kept: (B, H, n, n) bool.

        Args:
            scores: (B, H, n, n), -inf where nothing may be kept.
            rows: (B, n) bool, blocks with a real token; the last rows are the last of these.
        """
        n = scores.shape[-1]
        allowed = scores > -torch.inf
        own = torch.eye(n, dtype=torch.bool, device=scores.device)
        if self.method == "threshold":
            kept = torch.softmax(scores, -1).nan_to_num() > self.threshold
            kept = kept | allowed if self.threshold == 0 else kept
        else:
            ranked = scores.masked_fill(own & allowed, torch.inf) if self.force_diagonal else scores
            best = stable_topk(ranked, self._count(scores))
            kept = torch.zeros_like(allowed).scatter(-1, best, True)
        if self.force_diagonal:
            kept = kept | own
        if self.last_block_dense:
            number = torch.arange(n, device=scores.device)
            kept = kept | (number > _last_row(scores, rows)[:, None] - 2)[:, None, :, None]
        return kept & allowed

    def _count(self, scores: Tensor) -> int:
        """Blocks per row whose causal area is `ratio` of all."""
        return max(1, int((1 - (1 - float(self.ratio or 0)) ** 0.5) * scores.shape[-1]))


def _last_row(scores: Tensor, rows: Tensor | None) -> Tensor:
    """(B,) the last row of blocks, or the last with a real token."""
    n = scores.shape[-1]
    if rows is None:
        return torch.full((scores.shape[0],), n - 1, device=scores.device)
    return torch.where(rows, torch.arange(n, device=scores.device), -1).amax(-1)


@torch.no_grad()
def block_target(ctx: AttentionContext, block: int) -> Tensor:
    """Largest weight of each block of a prompt's map, rows of blocks normalised: (B, Hq, n, n).

    The map is never held as a whole.
    """
    result = attend(
        ctx.q,
        ctx.k,
        ctx.v,
        causal=ctx.shape.causal,
        key_padding=ctx.key_padding,
        scale=ctx.scale,
        window=ctx.window,
        pool_blocks=block,
    )
    assert isinstance(result, Attended)
    assert result.pooled is not None
    pooled = result.pooled.float()
    if ctx.key_padding is not None:  # rows of padding attend too, but mean nothing
        pooled = pooled * real_blocks(ctx.key_padding, block)[:, None, :, None]
    return pooled / pooled.sum(-1, keepdim=True).clamp(min=_TINY)


@torch.no_grad()
def row_target(ctx: AttentionContext, block: int, first_row: int) -> Tensor:
    """Largest weight that a group's rows give each key block, normalised: (B, Hkv, rows, n).

    Rows from `first_row` on; a strip of rows at a time.
    """
    shape = ctx.shape
    result = attend(
        ctx.q, ctx.k, ctx.v, causal=True, key_padding=ctx.key_padding, scale=ctx.scale,
        window=ctx.window, return_lse=True,
    )  # fmt: skip
    assert isinstance(result, Attended)
    assert result.lse is not None
    strips = []
    j = torch.arange(shape.k_len, device=ctx.q.device)
    for begin in range(first_row, shape.q_len, _ROWS):
        rows = slice(begin, min(begin + _ROWS, shape.q_len))
        q = ctx.q[:, :, rows].float().unflatten(1, (shape.kv_heads, -1))
        logits = (q @ ctx.k[:, :, None].float().transpose(-1, -2)).flatten(1, 2) * ctx.scale
        row = shape.q_offset + torch.arange(rows.start, rows.stop, device=j.device)[:, None]
        mask = (j <= row)[None, None]
        if ctx.key_padding is not None:
            mask = mask & ctx.key_padding[:, None, None]
        if ctx.window is not None:
            mask = mask & (row - j < ctx.window)
        lse = result.lse[:, :, rows, None].nan_to_num(neginf=0.0)
        weight = torch.exp(logits - lse).masked_fill(~mask, 0)
        padded = torch.nn.functional.pad(weight, (0, -shape.k_len % block))
        pooled = padded.unflatten(-1, (-1, block)).amax(-1)
        strips.append(share_over_group(pooled, shape.kv_heads, "max"))
    target = torch.cat(strips, 2)
    return target / (target.sum(-1, keepdim=True) + _TINY)


def divergence(scores: Tensor, target: Tensor) -> Tensor:
    """Mean over all elements of the divergence of softmax(scores) from a target.

    Args:
        scores: (..., n); -inf where nothing may be kept.
        target: (..., n), rows that sum to 1, or to 0 where there is nothing to learn.
    """
    reachable = (scores > -torch.inf).any(-1, keepdim=True)
    log_p = torch.log_softmax(scores.masked_fill(~reachable, 0), -1)
    counted = (target > 0) & (scores > -torch.inf)
    gap = torch.log(target.clamp(min=torch.finfo(target.dtype).tiny)) - log_p
    return torch.where(counted, target * gap.masked_fill(~counted, 0), 0.0).mean()


class OracleSelector(Selector):
    """Chooses blocks by the very map that it spares: what a perfect gate would do, for reports.

    Args:
        block: tokens of a block.
        rule: how weights become a choice; options of `BlockRule` as a dictionary will do.
    """

    slug = "block-oracle"

    def __init__(self, block: int = 64, rule: BlockRule | dict[str, Any] | None = None) -> None:
        super().__init__()
        if block not in BLOCKS:
            raise ValueError(f"block={block}: expected one of {BLOCKS}")
        self.block = block
        self.rule = BlockRule(**rule) if isinstance(rule, dict) else rule or BlockRule()

    def plan_prefill(self, ctx: AttentionContext) -> Plan:
        if ctx.shape.q_offset or ctx.shape.q_len <= self.block:
            return DensePlan()
        target = block_target(ctx, self.block)
        scores = torch.where(
            target > 0, torch.log(target.clamp(min=torch.finfo(torch.float32).tiny)), -torch.inf
        )
        return self.rule.plan(scores, blocks_of(ctx, self.block), self.block)


def blocks_of(ctx: AttentionContext, block: int) -> Tensor | None:
    """(B, n) bool, blocks with a real token; None without padding."""
    return None if ctx.key_padding is None else real_blocks(ctx.key_padding, block)
