"""Small selectors for the tests of the engine, one per kind of plan."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad

from aerogel.attention import (
    SELECTORS,
    AttentionContext,
    BlockPlan,
    DensePlan,
    KeyListPlan,
    Plan,
    Selector,
    SpanPlan,
    add_selector,
    register,
)


class Dense(Selector):
    """All keys, by the tiles."""

    slug = "test-dense"

    def plan_prefill(self, ctx: AttentionContext) -> Plan:
        n_q, n_k = ctx.shape.tiles(64), -(-ctx.shape.k_len // 64)
        return BlockPlan.from_mask(torch.ones(1, 1, n_q, n_k, dtype=torch.bool))

    def plan_decode(self, ctx: AttentionContext) -> Plan:
        mask = torch.ones(1, 1, ctx.shape.q_len, ctx.shape.k_len, dtype=torch.bool)
        return KeyListPlan.from_bitmask(mask)


class Blocks(Selector):
    """The key blocks with the largest mean key, in the direction of the first key."""

    slug = "test-blocks"

    def __init__(self, top_k: int = 2, block: int = 16) -> None:
        super().__init__()
        self.top_k, self.block = top_k, block

    def options(self) -> dict[str, Any]:
        return {"top_k": self.top_k, "block": self.block}

    def plan_prefill(self, ctx: AttentionContext) -> Plan:
        n_k = -(-ctx.shape.k_len // self.block)
        size = n_k * self.block
        scores = pad(ctx.k.float().sum(-1), (0, size - ctx.shape.k_len))
        scores = scores.unflatten(2, (n_k, self.block))[..., 0]
        tiles = ctx.shape.tiles(self.block)
        scores = scores[:, :, None].expand(-1, -1, tiles, -1)
        return BlockPlan.from_topk(
            scores, self.top_k, q_offset=ctx.shape.q_offset, block_q=self.block, block_k=self.block
        )

    plan_decode = plan_prefill


class Lists(Selector):
    """The best keys of every row by their dot product, of the group's first head."""

    slug = "test-lists"

    def __init__(self, top_k: int = 8) -> None:
        super().__init__()
        self.top_k = top_k

    def plan_prefill(self, ctx: AttentionContext) -> Plan:
        q = ctx.q.unflatten(1, (ctx.shape.kv_heads, -1))[:, :, 0]
        scores = q.float() @ ctx.k.float().transpose(-1, -2)
        if ctx.key_padding is not None:
            scores = scores.masked_fill(~ctx.key_padding[:, None, None], -torch.inf)
        return KeyListPlan.from_topk(scores, self.top_k, causal=True, q_offset=ctx.shape.q_offset)

    plan_decode = plan_prefill


class Spans(Selector):
    """A few sinks and a window that differs by head."""

    slug = "test-spans"

    def __init__(self, sink: int = 2, window: int = 10, granularity: str = "token") -> None:
        super().__init__()
        self.sink, self.window, self.granularity = sink, window, granularity

    def span(self, heads: int) -> SpanPlan:
        plan = SpanPlan.uniform(self.sink, self.window, heads=heads, block=4)
        window = plan.window + torch.arange(heads).int()
        zeros = torch.zeros_like(plan.sink)
        return SpanPlan(plan.sink, window, zeros, zeros, plan.dense, 4, self.granularity)

    def plan_prefill(self, ctx: AttentionContext) -> Plan:
        span = self.span(ctx.shape.kv_heads)
        return SpanPlan(
            span.sink, span.window, span.stride, span.phase, span.dense, 4, self.granularity,
            ctx.first_keys(),
        )  # fmt: skip

    plan_decode = plan_prefill

    def cache_layer(self, layer_idx: int, kv_heads: int) -> Any:
        from aerogel.attention.cache import SpanCacheLayer

        return SpanCacheLayer(self.span(kv_heads), kv_heads)


class Cached(Selector):
    """Dense, but keeps the mean of every key before RoPE beside the cache, and checks it."""

    slug = "test-cached"
    needs = frozenset({"cache", "pre_rope"})

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] = []

    def on_append(self, ctx: AttentionContext) -> None:
        assert ctx.k_pre is not None
        means = ctx.cache_layer.append_side("mean", ctx.k_pre.mean(-1, keepdim=True))
        assert means.shape[2] == ctx.k.shape[2]
        if ctx.layer_idx == 0:
            self.lengths.append(means.shape[2])

    def plan_prefill(self, ctx: AttentionContext) -> Plan:
        return DensePlan()


for kind in (Dense, Blocks, Lists, Spans, Cached):
    if kind.slug not in SELECTORS:
        add_selector(kind)
register()
