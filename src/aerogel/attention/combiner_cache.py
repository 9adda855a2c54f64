"""What Combiner's layers remember while decoding: one block of raw tokens, and summaries.

Reference: Ren et al., arXiv 2107.05768.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aerogel.attention.bank_plan import Bank, BankPlan
from aerogel.attention.combiner import CombinerSelector
from aerogel.attention.engine import attend
from aerogel.attention.plan import DensePlan
from aerogel.attention.summaries import Summaries


class CombinerCache:
    """State of one layer between steps of decoding.

    "fixed" keeps the raw queries, keys and values of the current block only, and one summary of
    every finished block. The other variants keep all raw tensors and the layer's input.

    Attributes:
        variant: of the layer that filled it, None before.
        tokens: tokens seen.
        raw: tensors whose second-last dimension is the token.
        finished: summaries of finished blocks.
    """

    def __init__(self) -> None:
        self.variant: tuple[str, int] | None = None
        self.tokens = 0
        self.raw: tuple[Tensor, ...] = ()
        self.finished: Summaries | None = None

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


def attend_by_blocks(
    selector: CombinerSelector, cache: CombinerCache, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> Tensor:
    """New tokens of the variant "fixed", block by block; a block that is full becomes a summary.

    Args:
        selector: of the layer.
        cache: of the layer; the new tokens are added to it.
        q: (B, Hq, n, D) new queries.
        k: (B, Hkv, n, D) new keys.
        v: (B, Hkv, n, Dv) new values.
        scale: factor of the logits.

    Returns:
        (B, Hq, n, Dv).
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
        out = attend(q[:, :, rows], block[1], block[2], plan=plan, scale=scale, causal=True)
        assert isinstance(out, Tensor)
        parts.append(out)
        if block[0].shape[2] == size:
            cache.finish(selector.summarise(block[0], block[1], block[2], size, scale))
        begin = rows.stop
    return torch.cat(parts, 2)
