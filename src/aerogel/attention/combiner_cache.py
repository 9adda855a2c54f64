"""What Combiner's layers remember while decoding: one block of raw tokens, and summaries.

Reference: Ren et al., arXiv 2107.05768.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aerogel.attention.bank_plan import Bank, BankPlan
from aerogel.attention.combiner_base import SummarisingSelector
from aerogel.attention.engine import attend_lse
from aerogel.attention.plan import DensePlan
from aerogel.attention.selector import AttentionContext, select
from aerogel.attention.shape import AttentionShape
from aerogel.attention.summaries import Summaries


class CombinerCache:
    """State of one layer between steps of decoding.

    "fixed" keeps the raw queries, keys and values of the current block only, and one summary of
    every finished block. The others keep all raw tensors: a longer span's value is read by a query
    of its own, and so is not made of shorter ones' (and rows, too, keep the layer's input).
    "logsparse" makes each summary once, when its span is full.

    Attributes:
        variant: of the layer that filled it, None before.
        tokens: tokens seen.
        raw: tensors whose second-last dimension is the token.
        finished: summaries of finished blocks.
        spans: by level, the summary that the next token reads.
    """

    def __init__(self) -> None:
        self.variant: tuple[str, int] | None = None
        self.tokens = 0
        self.raw: tuple[Tensor, ...] = ()
        self.finished: Summaries | None = None
        self.spans: dict[int, Summaries] = {}

    def append(self, new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Raw tensors with the new ones behind them."""
        self.tokens += new[0].shape[-2]
        if self.raw:
            new = tuple(torch.cat(pair, -2) for pair in zip(self.raw, new, strict=True))
        self.raw = new
        return new

    def finish(self, summaries: Summaries) -> None:
        """Replaces the raw block by its summary."""
        old = self.finished
        if old is not None:
            k, v = torch.cat([old.k, summaries.k], 2), torch.cat([old.v, summaries.v], 2)
            summaries = Summaries(k, v)
        self.finished, self.raw = summaries, ()

    def choose(self, index: Tensor) -> None:
        """Keeps the batch elements `index` (n,), in that order."""
        self.raw = tuple(x[index] for x in self.raw)
        if self.finished is not None:
            self.finished = Summaries(self.finished.k[index], self.finished.v[index])
        self.spans = {n: Summaries(s.k[index], s.v[index]) for n, s in self.spans.items()}


def attend_by_blocks(
    selector: SummarisingSelector,
    cache: CombinerCache,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """New tokens of the variant "fixed", block by block; a block that is full becomes a summary.

    Args:
        selector: of the layer.
        cache: of the layer; the new tokens are added to it.
        q: (B, Hq, n, D) new queries.
        k: (B, Hkv, n, D) new keys.
        v: (B, Hkv, n, Dv) new values.
        scale: factor of the logits.

    Returns:
        o (B, Hq, n, Dv) and lse (B, Hq, n).
    """
    size, parts, begin = selector.seg_len, [], 0
    while begin < q.shape[2]:
        room = size - (cache.raw[0].shape[2] if cache.raw else 0)
        rows = slice(begin, min(q.shape[2], begin + room))
        block = cache.append((q[:, :, rows], k[:, :, rows], v[:, :, rows]))
        banks = [Bank(DensePlan())]
        if cache.finished is not None:
            banks.append(cache.finished.bank(DensePlan()))
        plan = BankPlan(tuple(banks))
        new = attend_lse(q[:, :, rows], block[1], block[2], plan=plan, scale=scale, causal=True)
        parts.append(new)
        if block[0].shape[2] == size:
            cache.finish(selector.summarise(block[0], block[1], block[2], size, scale))
        begin = rows.stop
    return _side_by_side(parts)


def attend_by_spans(
    selector: SummarisingSelector,
    cache: CombinerCache,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """New tokens of the variant "logsparse": a first prompt at once, later tokens one by one.

    Token t reads itself, token t - 1 if t is odd, and of every higher bit of t the summary of the
    span before it. With each token one span becomes the next one's: that of the lowest bit that
    t + 1 has and t has not.

    Args:
        selector: of the layer.
        cache: of the layer; the new tokens are added to it.
        q: (B, Hq, n, D) new queries.
        k: (B, Hkv, n, D) new keys.
        v: (B, Hkv, n, Dv) new values.
        scale: factor of the logits.

    Returns:
        o (B, Hq, n, Dv) and lse (B, Hq, n).
    """
    if cache.tokens == 0:
        cache.append((q, k, v))
        ctx = AttentionContext(q, k, v, AttentionShape.of(q, k, causal=True), scale)
        whole = attend_lse(q, k, v, plan=select(selector, ctx), scale=scale, causal=True)
        for level in range(1, cache.tokens.bit_length()):
            if cache.tokens >> level & 1:
                _keep_span(selector, cache, level, scale)
        return whole
    parts = []
    for row in range(q.shape[2]):
        place, one = cache.tokens, slice(row, row + 1)
        raw = cache.append((q[:, :, one], k[:, :, one], v[:, :, one]))
        near = 1 + (place & 1)
        banks = [Bank(DensePlan())]
        if cache.spans:
            joined = [torch.cat([s[i] for s in cache.spans.values()], 2) for i in (0, 1)]  # type: ignore[misc]
            banks.append(Summaries(*joined).bank(DensePlan()))
        new = attend_lse(
            q[:, :, one], raw[1][:, :, -near:], raw[2][:, :, -near:], plan=BankPlan(tuple(banks)),
            scale=scale, causal=True,
        )  # fmt: skip
        parts.append(new)
        born = ((place + 1) & ~place).bit_length() - 1
        cache.spans = {level: s for level, s in cache.spans.items() if level > born}
        if born:
            _keep_span(selector, cache, born, scale)
    return _side_by_side(parts)


def _side_by_side(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(o, lse) of rows that follow each other."""
    o, lse = (torch.cat(each, 2) for each in zip(*parts, strict=True))
    return o, lse


def _keep_span(
    selector: SummarisingSelector, cache: CombinerCache, level: int, scale: float
) -> None:
    """The summary of the span of this level before the one that the next token is in."""
    end = cache.tokens >> level << level
    span = slice(end - (1 << level), end)
    q, k, v = (x[:, :, span] for x in cache.raw[:3])
    cache.spans[level] = selector.summarise(q, k, v, 1 << level, scale)
