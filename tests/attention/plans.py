"""Random tensors and random plans of every kind, for the tests of the engine."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from aerogel.attention import (
    AttentionShape,
    BlockPlan,
    DensePlan,
    GroupPlan,
    HeadMixPlan,
    KeyListPlan,
    Plan,
    SpanPlan,
    TokenPlan,
)


def tensors(
    shape: AttentionShape,
    dim: int = 16,
    value_dim: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of a shape."""
    draw = torch.Generator().manual_seed(seed)
    value_dim = dim if value_dim is None else value_dim
    sizes = (
        (shape.batch, shape.q_heads, shape.q_len, dim),
        (shape.batch, shape.kv_heads, shape.k_len, dim),
        (shape.batch, shape.kv_heads, shape.k_len, value_dim),
    )
    q, k, v = (torch.randn(*size, generator=draw).to(dtype) for size in sizes)
    return q, k, v


def coin(draw: torch.Generator, share: float, *size: int) -> Tensor:
    return torch.rand(*size, generator=draw) < share


def random_block(shape: AttentionShape, draw: torch.Generator, bp: int, hp: int) -> BlockPlan:
    n_q, n_k = shape.tiles(16), -(-shape.k_len // 32)
    return BlockPlan.from_mask(coin(draw, 0.4, bp, hp, n_q, n_k), 16, 32)


def random_offsets(shape: AttentionShape, draw: torch.Generator, bp: int, hp: int) -> BlockPlan:
    """Ranges anywhere plus single keys outside them."""
    n_q = shape.tiles(64)
    start = torch.randint(0, shape.k_len, (bp, hp, n_q, 3), generator=draw)
    length = torch.randint(0, 90, (bp, hp, n_q, 3), generator=draw)
    plan = BlockPlan.from_ranges(start, length)
    free = ~plan._tile_matrix(shape, None).bool()
    keep = free & coin(draw, 0.3, bp, hp, n_q, shape.k_len)
    lists = KeyListPlan.from_bitmask(keep)
    return BlockPlan(64, 64, plan.row_ptr, plan.col, True, plan.tile_len, lists.ptr, lists.idx)


def random_list(shape: AttentionShape, draw: torch.Generator, bp: int, hp: int) -> KeyListPlan:
    mask = coin(draw, 0.3, bp, hp, shape.q_len, shape.k_len)
    mask[..., : shape.k_len // 3] |= coin(draw, 0.5, bp, hp, shape.q_len, 1)  # long runs
    return KeyListPlan.from_bitmask(mask)


def random_span(
    shape: AttentionShape, draw: torch.Generator, hp: int, granularity: str
) -> SpanPlan:
    high = 60 if granularity == "token" else 4
    sizes = [torch.randint(0, high, (hp,), generator=draw).int() for _ in range(2)]
    stride = torch.randint(0, 4, (hp,), generator=draw).int()
    phase = torch.randint(0, 4, (hp,), generator=draw).int()
    dense = coin(draw, 0.2, hp)
    return SpanPlan(*sizes, stride, phase, dense, 16, granularity)


def random_groups(
    shape: AttentionShape, draw: torch.Generator, bp: int, hp: int, reduce: str
) -> GroupPlan:
    """Groups that partition the queries ("scatter") or overlap, with empty slots."""
    n = min(4, shape.q_len)
    width = shape.q_len // n
    order = torch.rand(bp, hp, shape.q_len, generator=draw).argsort(-1)[..., : n * width]
    q_idx = order.view(bp, hp, n, width).int()
    if reduce != "scatter":
        q_idx = torch.rand(bp, hp, n, shape.q_len, generator=draw).argsort(-1)[..., :width].int()
    kv = torch.rand(bp, hp, n, shape.k_len, generator=draw).argsort(-1)[..., : shape.k_len // 2 + 1]
    kv_idx = torch.where(coin(draw, 0.2, *kv.shape), -1, kv).int()
    return GroupPlan(q_idx, kv_idx, reduce)


def random_tokens(
    shape: AttentionShape, draw: torch.Generator, side: str, per_head: bool = False
) -> TokenPlan:
    heads = (shape.kv_heads,) * per_head
    return TokenPlan.from_mask(coin(draw, 0.5, shape.batch, *heads, shape.k_len), side)


def random_mix(shape: AttentionShape, draw: torch.Generator) -> HeadMixPlan:
    heads = list(range(shape.q_heads))
    parts: dict[tuple[int, ...], Plan] = {
        tuple(heads[::2]): random_offsets(shape, draw, 1, len(heads[::2])),
        tuple(heads[1::4]): random_span(shape, draw, 1, "token"),
        tuple(heads[3::4]): DensePlan(),
    }
    return HeadMixPlan.of({heads: plan for heads, plan in parts.items() if heads})


def masked_plans(shape: AttentionShape, seed: int = 0) -> dict[str, Plan]:
    """One random plan of every kind that a dense mask describes and tiles can run."""
    draw = torch.Generator().manual_seed(seed)
    plans: dict[str, Plan] = {
        "dense": DensePlan(),
        "block": random_block(shape, draw, 1, 1),
        "block per head": random_block(shape, draw, shape.batch, shape.q_heads),
        "offsets": random_offsets(shape, draw, 1, shape.kv_heads),
        "offsets per head": random_offsets(shape, draw, shape.batch, shape.q_heads),
        "list": random_list(shape, draw, shape.batch, shape.kv_heads),
    }
    if shape.causal:
        plans["token span"] = random_span(shape, draw, shape.q_heads, "token")
        plans["block span"] = random_span(shape, draw, shape.kv_heads, "block")
        plans["shifted span"] = replace(
            random_span(shape, draw, shape.q_heads, "token"),
            first=torch.randint(0, shape.k_len, (shape.batch,), generator=draw).int(),
        )
        plans["mix"] = random_mix(shape, draw)
    else:
        plan = random_block(shape, draw, 1, shape.q_heads)
        bias = torch.randn(plan.col.numel(), generator=draw)
        plans["bias"] = BlockPlan(16, 32, plan.row_ptr, plan.col, tile_bias=bias)
    return plans
