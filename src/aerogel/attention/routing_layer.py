"""`RoutingAttention`: heads that route beside heads with a local window, for own models.

Reference: Roy et al., arXiv 2003.05997.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from aerogel.arguments import check_count, check_number
from aerogel.attention.block_plan import BlockPlan
from aerogel.attention.engine import attend
from aerogel.attention.group_plan import GroupPlan
from aerogel.attention.plan import Plan
from aerogel.attention.routing_transformer import RoutingSelector
from aerogel.attention.selector import AttentionContext
from aerogel.attention.shape import AttentionShape
from aerogel.attention.span_plan import SpanPlan

if TYPE_CHECKING:
    from aerogel.attention.cache import SelectorCacheLayer

REL_POS = ("rope", "rope_values", "cluster", "none")


class RoutingAttention(nn.Module):
    """Self-attention of local and routing heads, or cross attention of routing heads.

    Args:
        d_model: size of a token.
        num_heads: all heads; ``d_model`` is a multiple.
        num_local_heads: heads that read their own block of `local_window` tokens and the one
            before (both neighbours if not causal); the others route.
        num_clusters: clusters of a routing head.
        window: tokens per cluster; default n / c.
        local_window: tokens of a local block.
        share_qk: routing keys are the queries; default: if causal.
        num_mem_kv: learned keys and values per cluster; default 1 if causal and not shared, so
            that no row is empty.
        causal: a token reads no later token.
        rel_pos: "rope" turns queries and keys by position before they are routed, "rope_values"
            the values of routing heads too (as the PyTorch code by lucidrains). "cluster" adds
            learned vectors to the keys and values of routing heads, by how many tokens of the
            cluster lie between (as the authors' code); local heads have "rope". Or "none".
        max_relative_position: of "cluster"; what is further away counts as that far.
        scale: factor of the logits of routing heads, default ``head_dim ** -0.5``; the authors'
            code has 1.0 in effect.
        update: whether training steps move the centroids.
        bias: whether the projections to queries, keys and values have biases.
        options: further options of `RoutingSelector` (``fit``, ``mask_self``, ``norm``, ...).

    Attributes:
        auxiliary: the commitment loss of the last forward pass in training, else None.

    Raises:
        ValueError: heads or options do not fit together.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_local_heads: int,
        num_clusters: int,
        window: int | None = None,
        local_window: int = 256,
        share_qk: bool | None = None,
        num_mem_kv: int | None = None,
        causal: bool = True,
        rel_pos: Literal["rope", "rope_values", "cluster", "none"] = "rope",
        max_relative_position: int = 128,
        scale: float | None = None,
        update: bool = True,
        bias: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        check_count("d_model", d_model)
        check_count("num_heads", num_heads)
        check_count("num_local_heads", num_local_heads, 0)
        check_count("local_window", local_window)
        check_count("max_relative_position", max_relative_position)
        if num_mem_kv is not None:
            check_count("num_mem_kv", num_mem_kv, 0)
        if scale is not None:
            check_number("scale", scale)
        if d_model % num_heads:
            raise ValueError(f"d_model={d_model}: expected a multiple of num_heads={num_heads}")
        if num_local_heads > num_heads:
            raise ValueError(
                f"num_local_heads={num_local_heads}: expected 0 to num_heads={num_heads}"
            )
        if rel_pos not in REL_POS:
            raise ValueError(f"rel_pos={rel_pos!r}: expected one of {REL_POS}")
        self.head_dim = d_model // num_heads
        if rel_pos != "none" and self.head_dim % 2:
            raise ValueError(f"head size {self.head_dim}: expected even for rel_pos={rel_pos!r}")
        share_qk = causal if share_qk is None else share_qk
        if rel_pos == "cluster":
            _check_ranks(causal, share_qk, num_mem_kv)
        self.num_heads, self.num_local_heads = num_heads, num_local_heads
        self.local_window, self.share_qk, self.causal = local_window, share_qk, causal
        self.rel_pos, self.scale, self.update = rel_pos, scale, update
        routed = num_heads - num_local_heads
        self.selector: RoutingSelector | None = None
        if routed:
            self.selector = RoutingSelector(
                routed, num_clusters, self.head_dim, window, share_qk=share_qk, **options
            )
        if num_mem_kv is None:
            num_mem_kv = int(causal and not share_qk)
        memory = (2, routed, num_clusters * num_mem_kv, self.head_dim)
        self.memory = nn.Parameter(torch.randn(memory) * 0.02) if num_mem_kv and routed else None
        self.ranks: nn.Parameter | None = None
        if rel_pos == "cluster" and routed:
            table = torch.empty(2, 2 * max_relative_position + 1, self.head_dim)
            self.ranks = nn.Parameter(nn.init.normal_(table, std=self.head_dim**-0.5))
        keys = num_local_heads if share_qk else num_heads
        self.query = nn.Linear(d_model, d_model, bias=bias)
        self.key = nn.Linear(d_model, keys * self.head_dim, bias=bias) if keys else None
        self.value = nn.Linear(d_model, d_model, bias=bias)
        self.out = nn.Linear(d_model, d_model)
        self.auxiliary: Tensor | None = None

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        key_padding: Tensor | None = None,
        cache: SelectorCacheLayer | None = None,
    ) -> Tensor:
        """Attention of tokens among themselves, or on a context.

        Args:
            x: (batch, n, d_model); with a cache, the new tokens.
            context: (batch, m, d_model) keys and values come from, or None for `x`.
            key_padding: (batch, keys) bool, True at real keys.
            cache: of this layer; filled by the call, under ``torch.no_grad()``.

        Returns:
            (batch, n, d_model).

        Raises:
            ValueError: cross attention that is causal, shared, cached, or has local heads or ranks.
        """
        if context is not None:
            self._check_cross(cache)
        source = x if context is None else context
        start = 0 if cache is None else int(cache.get_seq_length())
        local = self.num_local_heads
        q, v = self._split(self.query(x)), self._split(self.value(source))
        turned = 0 if context is not None else self._turned_heads()
        q = _turn_first(q, turned, start)
        if turned and self.rel_pos == "rope_values":
            v = torch.cat([v[:, :local], turn(v[:, local:], start)], 1)
        keys = []
        if self.key is not None:
            k = self._split(self.key(source))
            keys.append(_turn_first(k, turned, start))
        if self.share_qk:
            keys.append(q[:, local:])
        k = torch.cat(keys, 1)
        parts, raw_k = [], k
        if self.selector is not None:
            routed_k = self.selector.kmeans.normalise(k[:, local:])
            routed_q = q[:, local:]
            similar = self._learn(routed_q, routed_k, key_padding)
            if self.selector.kmeans.norm == "layernorm":
                routed_q = self.selector.kmeans.normalise(routed_q)
            elif not self.share_qk:
                routed_k = k[:, local:]
            raw_k = torch.cat([k[:, :local], routed_k], 1)
        if cache is not None:
            raw_k, v = cache.update(raw_k, v)
            if self.selector is not None:
                names = ("similarity of queries", "similarity of keys")
                similar = (
                    cache.append_side(names[0], similar[0]),
                    cache.append_side(names[1], similar[1]),
                )
        if local:
            heads = (q[:, :local], raw_k[:, :local], v[:, :local])
            plan = self._local_plan(heads[0])
            parts.append(attend(*heads, plan=plan, causal=self.causal, key_padding=key_padding))
        if self.selector is not None:
            parts.append(
                self._route(routed_q, raw_k[:, local:], v[:, local:], similar, key_padding)
            )
        return self.out(torch.cat(parts, 1).transpose(1, 2).flatten(2))  # type: ignore[arg-type]

    def _check_cross(self, cache: SelectorCacheLayer | None) -> None:
        wrong = {
            "causal": self.causal,
            "share_qk": self.share_qk,
            "num_local_heads": self.num_local_heads,
            "cache": cache is not None,
            "rel_pos='cluster'": self.rel_pos == "cluster",
        }
        given = [name for name, value in wrong.items() if value]
        if given:
            raise ValueError(f"context: cross attention does not go with {', '.join(given)}")

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _learn(self, q: Tensor, k: Tensor, key_padding: Tensor | None) -> tuple[Tensor, Tensor]:
        """Similarities of queries and (normalised) keys; in training, loss and centroids too."""
        assert self.selector is not None
        kmeans = self.selector.kmeans
        update = self.training and self.update
        if self.share_qk:
            of_keys, _, loss = kmeans(k, update, key_padding)
            of_queries = of_keys
        else:  # one update by both, so that both are compared with the same centroids
            both, real = torch.cat([k, kmeans.normalise(q)], 2), None
            if key_padding is not None:
                same = q.shape[2] == k.shape[2]
                own = key_padding if same else key_padding.new_ones(q.shape[0], q.shape[2])
                real = torch.cat([key_padding, own], 1)
            similarity, _, loss = kmeans(both, update, real)
            of_keys, of_queries = similarity.split([k.shape[2], q.shape[2]], 2)
            loss = 2 * loss  # the sum of the means over keys and over queries, if equally many
        self.auxiliary = loss if self.training else None
        return of_queries, of_keys

    def _local_plan(self, q: Tensor) -> Plan:
        if self.causal:
            return SpanPlan.uniform(0, 2, block=self.local_window, granularity="block")
        blocks = -(-q.shape[2] // self.local_window)
        place = torch.arange(blocks, device=q.device)
        near = (place[:, None] - place).abs() <= 1
        return BlockPlan.from_mask(near[None, None], self.local_window, self.local_window)

    def _route(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        similar: tuple[Tensor, Tensor],
        key_padding: Tensor | None,
    ) -> Tensor:
        assert self.selector is not None
        shape = AttentionShape.of(q, k, causal=self.causal)
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        ctx = AttentionContext(q, k, v, shape, scale, key_padding=key_padding)
        with torch.no_grad():
            plan = self.selector.plan_of(*similar, ctx)
        offset = shape.q_offset
        if self.ranks is not None:
            plan = replace(
                plan, q_rank=self._ranks(plan, shape), rank_keys=self.ranks[0],
                rank_values=self.ranks[1],
            )  # fmt: skip
        if self.memory is not None:
            slots = self.memory.shape[2]
            plan = _with_memory(plan, slots, self.selector.kmeans.mu.shape[1])
            k, v = (
                torch.cat([m.expand(len(x), -1, -1, -1).to(x.dtype), x], 2)
                for m, x in zip(self.memory, (k, v), strict=True)
            )
            offset += slots
            if key_padding is not None:
                key_padding = nn.functional.pad(key_padding, (slots, 0), value=True)
        out = attend(
            q, k, v, plan=plan, scale=scale, causal=self.causal, q_offset=offset,
            key_padding=key_padding, validate=False,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out

    def _turned_heads(self) -> int:
        """So many first heads have rotary embedding."""
        if self.rel_pos == "cluster":
            return self.num_local_heads
        return 0 if self.rel_pos == "none" else self.num_heads

    def _ranks(self, plan: GroupPlan, shape: AttentionShape) -> Tensor:
        """(B, H, N, Wq) the slot of every query among the keys of its group."""
        assert self.selector is not None
        if shape.q_offset or self.selector.causal_selection:  # a query is one of its group's keys
            own = plan.kv_idx[..., None, :] == plan.q_idx[..., None] + shape.q_offset
            return own.int().argmax(-1)
        queries, keys = plan.q_idx.shape[3], plan.kv_idx.shape[3]
        rank = torch.arange(queries, device=plan.q_idx.device) + keys - queries
        return rank.expand(plan.q_idx.shape)


def _check_ranks(causal: bool, share_qk: bool, num_mem_kv: int | None) -> None:
    if causal and not share_qk:
        raise ValueError(
            "rel_pos='cluster' with share_qk=False: expected share_qk=True if causal, as ranks in "
            "two lists say nothing of the order in time"
        )
    if num_mem_kv:
        raise ValueError(f"num_mem_kv={num_mem_kv}: expected 0 with rel_pos='cluster'")


def _turn_first(x: Tensor, heads: int, start: int) -> Tensor:
    """Rotary embedding of the first heads of x (B, H, n, D)."""
    if heads == 0:
        return x
    if heads >= x.shape[1]:
        return turn(x, start)
    return torch.cat([turn(x[:, :heads], start), x[:, heads:]], 1)


def _with_memory(plan: GroupPlan, slots: int, clusters: int) -> GroupPlan:
    """The plan with each cluster's memory, which stands before all keys."""
    groups = plan.kv_idx.shape[2]
    cluster = torch.arange(groups, device=plan.kv_idx.device) // (groups // clusters)
    each = slots // clusters
    first = cluster[:, None] * each + torch.arange(each, device=cluster.device)
    keys = torch.where(plan.kv_idx < 0, -1, plan.kv_idx + slots)
    memory = first.int().expand(*plan.dims, -1, -1)
    return replace(plan, kv_idx=torch.cat([memory, keys], -1))


def turn(x: Tensor, start: int, base: float = 10_000.0) -> Tensor:
    """Rotary embedding (Su et al., arXiv 2104.09864) of x (B, H, n, D), positions from `start`."""
    half = x.shape[-1] // 2
    rates = base ** (-torch.arange(half, device=x.device) / half)
    angle = torch.arange(start, start + x.shape[2], device=x.device)[:, None] * rates
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
