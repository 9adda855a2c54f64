"""Supports: the pairs that a mixture of sparse and low-rank attention makes exact."""

from __future__ import annotations

import abc
from dataclasses import replace

import torch
from torch import Tensor

from aerogel.arguments import check_count
from aerogel.attention.block_plan import BlockPlan
from aerogel.attention.group_plan import GroupPlan
from aerogel.attention.key_list_plan import KeyListPlan
from aerogel.attention.labels import gather_channels
from aerogel.attention.lowering import TileStream, lower
from aerogel.attention.plan import DensePlan, Plan
from aerogel.attention.primitives import plan_pairs
from aerogel.attention.shape import AttentionShape
from aerogel.attention.tiled_pairs import ListedPairs, Pairs, TiledPairs

_TILE = 64  # query rows of a tile of a window
_SCORED = 1 << 22  # scores held at a time by an exact top-k


class Support(abc.ABC):
    """Chooses pairs for given queries and keys; no gradient passes through the choice."""

    @abc.abstractmethod
    def plan(
        self, q: Tensor, k: Tensor, shape: AttentionShape, key_padding: Tensor | None = None
    ) -> Plan:
        """The choice, as the engine's plans say it.

        Args:
            q: (B, Hq, Lq, D).
            k: (B, Hkv, Lk, D).
            shape: sizes and causal rule.
            key_padding: (B, Lk) bool, True at real keys.
        """

    def pairs(
        self, q: Tensor, k: Tensor, shape: AttentionShape, key_padding: Tensor | None = None
    ) -> Pairs:
        """The choice, without padding and without later keys if causal."""
        plan = self.plan(q, k, shape, key_padding)
        return ListedPairs(plan_pairs(plan, shape, key_padding))

    def tiles(
        self, q: Tensor, k: Tensor, shape: AttentionShape, key_padding: Tensor | None = None
    ) -> tuple[TileStream, AttentionShape] | None:
        """The choice as native kernels read it, with the shape to read it by; None if they cannot.

        Padding is left to the kernels.
        """
        streams = lower(self.plan(q, k, shape, key_padding).passes(shape), shape)
        return (streams[0], shape) if len(streams) == 1 else None

    def lag(self, shape: AttentionShape) -> int:
        """n, where every row's own key and the n - 1 before it are all of the choice; else 0."""
        return 0


class LocalSupport(Support):
    """Keys at ``-(window // 2) <= j - i < (window + 1) // 2`` around each row's position i.

    Raises:
        ValueError: `window` is below 1.
    """

    def __init__(self, window: int) -> None:
        check_count("window", window)
        self.window = window

    def plan(
        self, q: Tensor, k: Tensor, shape: AttentionShape, key_padding: Tensor | None = None
    ) -> Plan:
        lane = torch.arange(self.window, device=q.device) - self.window // 2
        keys = shape.positions(q.device)[:, None] + lane
        keep = (keys >= 0) & (keys < shape.k_len)
        if shape.causal:
            keep &= lane <= 0
        return KeyListPlan.from_index(torch.where(keep, keys, -1)[None, None])

    def lag(self, shape: AttentionShape) -> int:
        return self.window // 2 + 1 if shape.causal else 0

    def tiles(
        self, q: Tensor, k: Tensor, shape: AttentionShape, key_padding: Tensor | None = None
    ) -> tuple[TileStream, AttentionShape] | None:
        """A causal window whose rows stand as far ahead as they may look."""
        back, reach = self.window // 2, self.window - self.window // 2
        ahead = 0 if shape.causal else reach - 1
        moved = replace(shape, causal=True, offset=shape.q_offset + ahead)
        streams = lower(DensePlan().passes(moved), moved, back + 1 + ahead)
        return (streams[0], moved) if len(streams) == 1 else None

    def pairs(
        self, q: Tensor, k: Tensor, shape: AttentionShape, key_padding: Tensor | None = None
    ) -> Pairs:
        tiles = shape.tiles(_TILE)
        rows = torch.arange(tiles * _TILE, device=q.device).view(tiles, _TILE)
        back, reach = self.window // 2, self.window - self.window // 2
        lane = torch.arange(_TILE + self.window - 1, device=q.device) - back
        keys = rows[:, :1] + shape.q_offset + lane  # [tiles, Wk]
        apart = keys[:, None, :] - (rows[:, :, None] + shape.q_offset)
        mask = ((apart >= -back) & (apart < reach))[None, None]
        rows = torch.where(rows < shape.q_len, rows, -1)
        keys = torch.where((keys >= 0) & (keys < shape.k_len), keys, -1)[None, None]
        mask = _real(mask, keys, key_padding)
        return TiledPairs.of(shape, rows[None, None], keys, mask)


class BlockSupport(Support):
    """Fixed blocks.

    Args:
        mask: (nQ, nK) or (heads, nQ, nK) bool, True at blocks to make exact.
        block: rows and keys of a block.

    Raises:
        ValueError: the mask has other dimensions or type.
    """

    def __init__(self, mask: Tensor, block: int = 64) -> None:
        if mask.dtype != torch.bool or mask.dim() not in (2, 3):
            raise ValueError(
                f"mask: {mask.dtype} {tuple(mask.shape)}, expected bool (nQ, nK) or (heads, nQ, nK)"
            )
        check_count("block", block)
        self.mask, self.block = mask if mask.dim() == 3 else mask[None], block

    def plan(
        self, q: Tensor, k: Tensor, shape: AttentionShape, key_padding: Tensor | None = None
    ) -> Plan:
        want = (shape.tiles(self.block), -(-shape.k_len // self.block))
        if tuple(self.mask.shape[1:]) != want or self.mask.shape[0] not in (1, shape.q_heads):
            raise ValueError(
                f"mask: {tuple(self.mask.shape)}, expected (1 or {shape.q_heads}, *{want}) blocks"
            )
        return BlockPlan.from_mask(self.mask[None].to(q.device), self.block, self.block)

    def pairs(
        self, q: Tensor, k: Tensor, shape: AttentionShape, key_padding: Tensor | None = None
    ) -> Pairs:
        self.plan(q, k, shape)
        lane = torch.arange(self.block, device=q.device)
        heads = self.mask.to(q.device).expand(shape.q_heads, -1, -1)
        head, i, j = heads.nonzero(as_tuple=True)
        rows, keys = (t[:, None] * self.block + lane for t in (i, j))
        mask = (rows < shape.q_len)[:, :, None] & (keys < shape.k_len)[:, None]
        if shape.causal:
            mask &= keys[:, None] <= rows[:, :, None] + shape.q_offset
        rows, keys = rows.clamp(max=shape.q_len - 1), keys.clamp(max=shape.k_len - 1)
        batch = torch.arange(shape.batch, device=q.device)[:, None]
        plane = batch * shape.q_heads + head
        kv_plane = plane * shape.kv_heads // shape.q_heads
        real = mask.expand(shape.batch, *mask.shape)
        if key_padding is not None:
            real = real & key_padding[:, keys][:, :, None]
        return TiledPairs(
            shape,
            (plane[..., None] * shape.q_len + rows).flatten(0, 1),
            (kv_plane[..., None] * shape.k_len + keys).flatten(0, 1),
            real.flatten(0, 1),
        )


class TopKSupport(Support):
    """The `count` keys of the largest logits of each row, some rows at a time.

    Args:
        count: keys.
        channels: (key or query heads, r) int64, the channels by which logits are estimated, as
            `aerogel.attention.ChannelOrder` has them (Double Sparsity); None for exact logits.

    Raises:
        ValueError: `count` is below 1.
    """

    def __init__(self, count: int, channels: Tensor | None = None) -> None:
        check_count("count", count)
        self.count, self.channels = count, channels

    @torch.no_grad()
    def plan(
        self, q: Tensor, k: Tensor, shape: AttentionShape, key_padding: Tensor | None = None
    ) -> Plan:
        count = min(self.count, shape.k_len)
        if self.channels is not None:
            q, k = self._labels(q, k)
        step = max(1, _SCORED // max(1, shape.batch * shape.q_heads * shape.k_len))
        position = shape.positions(q.device)
        keys = torch.arange(shape.k_len, device=q.device)
        chosen = []
        for begin in range(0, shape.q_len, step):
            part = q[:, :, begin : begin + step].unflatten(1, (k.shape[1], -1))
            scores = (part.float() @ k.float().transpose(-1, -2)[:, :, None]).flatten(1, 2)
            keep = keys <= position[begin : begin + step, None] if shape.causal else keys >= 0
            if key_padding is not None:
                keep = keep & key_padding[:, None, None]
            scores = scores.masked_fill(~keep, -torch.inf)
            best = scores.topk(count, -1)
            chosen.append(torch.where(torch.isinf(best.values), -1, best.indices))
        return KeyListPlan.from_index(torch.cat(chosen, 2))

    def _labels(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """The channels of queries and keys that stand for all."""
        assert self.channels is not None
        heads = self.channels.shape[0]
        if heads not in (k.shape[1], q.shape[1]):
            raise ValueError(
                f"channels: {heads} heads, expected {k.shape[1]} or {q.shape[1]} of keys or queries"
            )
        channels = self.channels.to(k.device)
        own = channels.repeat_interleave(q.shape[1] // heads, 0)
        return gather_channels(q, own), gather_channels(k, channels)


class SmyrfClusters(Support):
    """Asymmetric hashing into equal clusters; a row reads the keys of its cluster.

    Queries and keys get two more coordinates that give all of them the same length, are projected
    on a random direction and sorted by it; both orders are cut into equally many clusters. A pair
    found in several rounds counts once. The paper's random offset shifts all projections alike and
    so changes no order; it is left out.

    Args:
        n_hashes: rounds.
        cluster_size_q: queries of a cluster.
        cluster_size_k: keys of a cluster, default as many.
        seed: every call draws the same directions from it; None draws new ones from torch.

    Raises:
        ValueError: a size is below 1.

    Reference:
        Daras, Kitaev, Odena and Dimakis, "SMYRF", arXiv 2010.05315.
    """

    def __init__(
        self,
        n_hashes: int = 2,
        cluster_size_q: int = 32,
        cluster_size_k: int | None = None,
        seed: int | None = None,
    ) -> None:
        cluster_size_k = cluster_size_q if cluster_size_k is None else cluster_size_k
        check_count("n_hashes", n_hashes)
        check_count("cluster_size_q", cluster_size_q)
        check_count("cluster_size_k", cluster_size_k)
        if seed is not None:
            check_count("seed", seed, 0)
        self.n_hashes, self.seed = n_hashes, seed
        self.cluster_size_q, self.cluster_size_k = cluster_size_q, cluster_size_k

    def plan(
        self, q: Tensor, k: Tensor, shape: AttentionShape, key_padding: Tensor | None = None
    ) -> Plan:
        rows, keys = self._clusters(q, k, shape, key_padding)
        return GroupPlan(rows.flatten(2, 3).int(), keys.flatten(2, 3).int(), "lse")

    def tiles(
        self, q: Tensor, k: Tensor, shape: AttentionShape, key_padding: Tensor | None = None
    ) -> tuple[TileStream, AttentionShape] | None:
        """None: a cluster's rows are scattered, and a pair of several rounds counts once."""
        return None

    def pairs(
        self, q: Tensor, k: Tensor, shape: AttentionShape, key_padding: Tensor | None = None
    ) -> Pairs:
        rows, keys = self._clusters(q, k, shape, key_padding)  # [B, Hq, rounds, clusters, W]
        mask = torch.ones((), dtype=torch.bool, device=q.device)
        mask = mask.expand(*rows.shape, keys.shape[-1]).clone()
        row_home = [_homes(rows[:, :, r], shape.q_len) for r in range(self.n_hashes)]
        key_home = [_homes(keys[:, :, r], shape.k_len) for r in range(self.n_hashes)]
        for later in range(1, self.n_hashes):
            at_row = rows[:, :, later].clamp(min=0).flatten(2)
            at_key = keys[:, :, later].clamp(min=0).flatten(2)
            for earlier in range(later):
                mine = row_home[earlier].gather(2, at_row).view_as(rows[:, :, later])
                theirs = key_home[earlier].gather(2, at_key).view_as(keys[:, :, later])
                mask[:, :, later] &= mine[..., :, None] != theirs[..., None, :]
        rows, keys, mask = rows.flatten(2, 3), keys.flatten(2, 3), mask.flatten(2, 3)
        return TiledPairs.of(shape, rows, keys, _real(mask, keys, key_padding))

    @torch.no_grad()
    def _clusters(
        self, q: Tensor, k: Tensor, shape: AttentionShape, key_padding: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Rows and keys of every cluster: (B, Hq, rounds, clusters, W), -1 = empty."""
        clusters = -(-shape.q_len // self.cluster_size_q)
        if clusters != -(-shape.k_len // self.cluster_size_k):
            raise ValueError(
                f"cluster_size_q={self.cluster_size_q}, cluster_size_k={self.cluster_size_k}: "
                f"expected as many clusters of {shape.q_len} queries as of {shape.k_len} keys"
            )
        if not bool(torch.isfinite(q).all() and torch.isfinite(k).all()):
            raise ValueError("q, k: expected finite numbers to hash, got NaN or infinity")
        q, k = q.float(), k.float().repeat_interleave(shape.q_heads // shape.kv_heads, 1)
        q_norm, k_norm = q.norm(dim=-1, keepdim=True), k.norm(dim=-1, keepdim=True)
        radius = q_norm.amax(2, keepdim=True) ** 2 + k_norm.amax(2, keepdim=True) ** 2
        zero_q, zero_k = torch.zeros_like(q_norm), torch.zeros_like(k_norm)
        q = torch.cat([q, zero_q, (radius - q_norm**2).clamp(min=0).sqrt()], -1)
        k = torch.cat([k, (radius - k_norm**2).clamp(min=0).sqrt(), zero_k], -1)
        draw = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        directions = torch.randn(shape.q_heads, q.shape[-1], self.n_hashes, generator=draw).to(q)
        q_hash, k_hash = (q @ directions).transpose(2, 3), (k @ directions).transpose(2, 3)
        if key_padding is not None:
            k_hash = k_hash.masked_fill(~key_padding[:, None, None], torch.inf)
            if shape.q_len == shape.k_len:
                q_hash = q_hash.masked_fill(~key_padding[:, None, None], torch.inf)
        return (
            _cut(q_hash, clusters, self.cluster_size_q),
            _cut(k_hash, clusters, self.cluster_size_k),
        )


def _cut(values: Tensor, clusters: int, size: int) -> Tensor:
    """The order of values (..., L) in clusters: (..., clusters, size), -1 past the end."""
    order = values.argsort(dim=-1, stable=True)
    short = clusters * size - order.shape[-1]
    return torch.nn.functional.pad(order, (0, short), value=-1).unflatten(-1, (clusters, size))


def _homes(members: Tensor, length: int) -> Tensor:
    """The cluster of every token: (B, H, clusters, W) -> (B, H, length)."""
    flat = members.flatten(2)
    number = torch.arange(flat.shape[2], device=flat.device) // members.shape[-1]
    homes = flat.new_zeros(*flat.shape[:2], length + 1)
    place = torch.where(flat < 0, length, flat)
    return homes.scatter(2, place, number.expand_as(flat))[..., :-1]


def _real(mask: Tensor, keys: Tensor, key_padding: Tensor | None) -> Tensor:
    """`mask` (b, h, N, Wq, Wk) without padded keys (b, h, N, Wk)."""
    if key_padding is None:
        return mask
    keys = keys.clamp(min=0).expand(key_padding.shape[0], -1, -1, -1)
    real = key_padding.gather(1, keys.flatten(1)).view(keys.shape)
    return mask & real[..., None, :]
