"""Routing Transformer: a token attends to the tokens that fall into its own cluster.

Paper: Roy, Saffar, Vaswani and Grangier, "Efficient Content-Based Sparse Attention with Routing
Transformers", TACL 2021, arXiv 2003.05997.

The idea: queries and keys of a head are clustered by online spherical k-means; each of c clusters
takes its w most similar queries and keys, and attention stays inside a cluster, so n tokens cost
n w pairs and c = sqrt(n) is best. A token in several clusters gets the mean of what they give. Some
heads route; the others attend to a local window.

When to use it: training on long sequences whose related tokens lie anywhere.
Costs and buys: n c products for the choice, n w pairs instead of n^2 / 2; it must be trained with
it. The w tokens of a cluster are taken over the whole sequence: no value of a later token reaches
an earlier one, but which keys an earlier one sees depends on later tokens
(`causal_selection=True` forbids that, at the cost of an index of n^2 entries). Here, one layer
trained on digits read them worse with clusters than with blocks, and 300 steps on text were too few
for a gain over local heads (docs/evidence.md).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from aerogel.arguments import check_count
from aerogel.attention.group_plan import GroupPlan
from aerogel.attention.plan import Plan
from aerogel.attention.selector import AttentionContext, Selector
from aerogel.attention.spherical_kmeans import SphericalKMeans, hash_centroids
from aerogel.attention.topk import stable_topk


class RoutingSelector(Selector):
    """Groups of the tokens that are most similar to each centroid.

    It is made for one layer, for normalised queries and keys (`SphericalKMeans.normalise`).

    Args:
        num_heads: heads that route; queries and keys have as many.
        num_clusters: clusters c of a head.
        dim: width of a head.
        window: tokens w that each cluster takes; default n / c.
        context_window: keys that each cluster takes in cross attention; default keys / c.
        share_qk: queries are the keys, so one list serves both.
        mask_self: a token attends to itself only where it sees nothing else of its cluster.
        causal_selection: clusters are filled for every token from the tokens up to it.
        fit: shorter sequences take a smaller window, and n need not be a multiple of c; else
            both are errors.
        routing: "kmeans", or "hash" for random sign hashes that never learn.
        kmeans: further options of `SphericalKMeans`.

    Reference:
        Roy et al., arXiv 2003.05997.
    """

    slug = "routing-transformer"

    def __init__(
        self,
        num_heads: int,
        num_clusters: int,
        dim: int,
        window: int | None = None,
        context_window: int | None = None,
        share_qk: bool = True,
        mask_self: bool = False,
        causal_selection: bool = False,
        fit: bool = False,
        routing: Literal["kmeans", "hash"] = "kmeans",
        **kmeans: Any,
    ) -> None:
        super().__init__()
        if routing not in ("kmeans", "hash"):
            raise ValueError(f"routing={routing!r}: expected 'kmeans' or 'hash'")
        for name, size in (("window", window), ("context_window", context_window)):
            if size is not None:
                check_count(name, size)
        self.window, self.context_window = window, context_window
        self.share_qk, self.mask_self = share_qk, mask_self
        self.causal_selection, self.fit = causal_selection, fit
        hashed = routing == "hash"
        self.kmeans = SphericalKMeans(num_heads, num_clusters, dim, frozen=hashed, **kmeans)
        if hashed:
            self.kmeans.mu.copy_(hash_centroids(num_heads, num_clusters, dim))

    def plan_prefill(self, ctx: AttentionContext) -> Plan:
        return self.plan_of(*self._similarities(ctx), ctx)

    def plan_decode(self, ctx: AttentionContext) -> Plan:
        return self.plan_of(*self._similarities(ctx), ctx)

    def loss(self, ctx: AttentionContext) -> Tensor:
        """The commitment loss of the queries, and of the keys if they differ."""
        loss: Tensor = self.kmeans(ctx.q)[2]
        return loss if self.share_qk else loss + self.kmeans(ctx.k, False, ctx.key_padding)[2]

    def _similarities(self, ctx: AttentionContext) -> tuple[Tensor, Tensor]:
        groups = ctx.shape.q_heads // ctx.shape.kv_heads
        keys = self.kmeans.similarity(ctx.k.repeat_interleave(groups, 1))
        if self.share_qk:
            return keys, keys
        return self.kmeans.similarity(ctx.q), keys

    def plan_of(self, of_queries: Tensor, of_keys: Tensor, ctx: AttentionContext) -> GroupPlan:
        """The plan for known similarities.

        Args:
            of_queries: (B, H, m, c), m = new rows, or all rows up to the last new one.
            of_keys: (B, H, k_len, c).
            ctx: the call.

        Raises:
            ValueError: the clusters do not fit the lengths.
        """
        shape = ctx.shape
        if ctx.key_padding is not None:
            of_keys = of_keys.masked_fill(~ctx.key_padding[:, None, :, None], -torch.inf)
            if of_queries.shape[2] == of_keys.shape[2]:
                hidden = ~ctx.key_padding[:, None, :, None]
                of_queries = of_queries.masked_fill(hidden, -torch.inf)
        if not shape.causal:
            width = self._width("window", self.window, shape.q_len)
            other = self.window if self.context_window is None else self.context_window
            wide = self._width("context_window", other, shape.k_len)
            return self._groups(_best(of_queries, width), _best(of_keys, wide))
        width = self._width("window", self.window, shape.k_len)
        if shape.q_offset or self.causal_selection:
            return self._running(of_queries, of_keys, width, shape.q_offset)
        return self._groups(_best(of_queries, width), _best(of_keys, width))

    def _width(self, name: str, window: int | None, length: int) -> int:
        clusters = self.kmeans.mu.shape[1]
        if self.fit:
            return min(length, -(-length // clusters) if window is None else window)
        if window is None and length % clusters:
            raise ValueError(
                f"{length} tokens, num_clusters={clusters}: expected a multiple, or {name}, or "
                "fit=True"
            )
        width = length // clusters if window is None else window
        if width > length:
            raise ValueError(f"{name}={width}: expected at most the {length} tokens, or fit=True")
        return width

    def _groups(self, q_idx: Tensor, kv_idx: Tensor) -> GroupPlan:
        return GroupPlan(q_idx, kv_idx, reduce="mean", uncovered="zero", mask_self=self.mask_self)

    def _running(self, of_queries: Tensor, of_keys: Tensor, width: int, offset: int) -> GroupPlan:
        """One group for each new row and cluster, filled from the tokens up to the row's."""
        if of_queries.shape[2] != of_keys.shape[2]:
            raise ValueError(
                f"of_queries: {of_queries.shape[2]} rows, expected all {of_keys.shape[2]} up to "
                "the last new one"
            )
        length = of_keys.shape[2]
        rows = torch.arange(offset, length, device=of_keys.device)
        late = torch.arange(length, device=rows.device) > rows[:, None]
        reach = of_queries.transpose(2, 3)[..., None, :]  # [B, H, c, 1, n]
        own = of_queries[:, :, offset:].transpose(2, 3)  # [B, H, c, m]
        first = torch.arange(length, device=rows.device) < rows[:, None]
        better = (reach > own[..., None]) | ((reach == own[..., None]) & first)
        member = (better & ~late).sum(-1) < width
        member &= own > -torch.inf
        ranked = of_keys.transpose(2, 3)[..., None, :].masked_fill(late, -torch.inf)
        keys = _listed(ranked, width)  # [B, H, c, m, w]
        queries = torch.where(member, rows - offset, -1).int()
        return self._groups(queries.flatten(2)[..., None], keys.flatten(2, 3))


def _best(similarity: Tensor, width: int) -> Tensor:
    """(B, H, c, w) int32: the tokens most similar to each centroid, ascending; -1 at padding."""
    return _listed(similarity.transpose(2, 3), width)


def _listed(scores: Tensor, width: int) -> Tensor:
    best = stable_topk(scores, width)
    real = scores.gather(-1, best) > -torch.inf
    return torch.where(real, best, -1).int()
