"""Scatterbrain: exact attention on few pairs, random features for all the others.

Paper: Chen, Dao, Winsor, Song, Rudra and Re, "Scatterbrain: Unifying Sparse and Low-rank Attention
Approximation", NeurIPS 2021, arXiv 2110.15343.

The idea: positive random features estimate every entry of exp(q.k) from sums over all keys, in
linear time, but are poor at the few large entries; a sparse choice finds those and forgets the long
tail. On the chosen pairs the estimate is taken out and the true entry put in, under one common
normaliser, so that each part covers the other's failure and the whole stays unbiased.

When to use it: long bidirectional encoders and vision transformers whose attention is neither flat
nor very sharp, in training or in place of a trained model's attention.
Costs and buys: time and memory linear in the tokens. At sharp attention (logits beyond about 8) the
features' variance wins and plain sparse attention is better. It cannot decode token by token.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aerogel.arguments import check_count, check_number
from aerogel.attention.call import check_tensors
from aerogel.attention.linear import PositiveRandomFeatures, linear_attention
from aerogel.attention.lowering import TileStream
from aerogel.attention.ops import tile_attention
from aerogel.attention.plan import Plan
from aerogel.attention.selector import AttentionContext, Selector, add_selector
from aerogel.attention.shape import AttentionShape
from aerogel.attention.supports import (
    BlockSupport,
    LocalSupport,
    SmyrfClusters,
    Support,
    TopKSupport,
)
from aerogel.attention.tiled_pairs import Pairs
from aerogel.kernels import native_in_use
from aerogel.kernels.attention_call import MAX_DIM

SupportName = Literal["lsh", "local", "block", "topk"]
_SMALLEST = 1e-24  # of a low-rank sum without its support, in units of its scale


def scatterbrain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: PositiveRandomFeatures | None,
    support: Support | None,
    *,
    scale: float | None = None,
    causal: bool = False,
    key_padding: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention that is exact on a support and estimated elsewhere.

    Without a support this is Performer, without features sparse attention.

    Args:
        q: (B, Hq, Lq, D).
        k: (B, Hkv, Lk, D).
        v: (B, Hkv, Lk, Dv).
        features: their `softmax_scale` is that of the logits; or None.
        support: pairs to make exact, or None.
        scale: factor of the logits; default the features', else ``D ** -0.5``.
        causal: row i reads keys j <= i; needs Lq = Lk.
        key_padding: (B, Lk) bool, True at real keys.
        dropout_p: probability of dropping a pair of the support.

    Returns:
        (B, Hq, Lq, Dv) in q's type; 0 in rows without keys.

    Raises:
        ValueError: neither features nor support, lengths or scale that do not fit, or a batch
            element without a real key.
    """
    scale = _checked(q, k, v, features, support, scale, causal, key_padding)
    shape = AttentionShape.of(q, k, causal=causal)
    tiles = None
    if features is not None and support is not None and _native(q, v, features):
        tiles = support.tiles(q, k, shape, key_padding)
    lag = 0 if tiles is None or support is None else support.lag(shape)
    estimate = None
    if features is not None:
        estimate = _Estimate(q, k, v, features, causal, key_padding, lag)
    if support is None:
        assert estimate is not None
        total = estimate.denominator.clamp(min=_SMALLEST)
        return (estimate.numerator / total[..., None]).to(q.dtype)
    if estimate is not None and tiles is not None:
        return _tiled(q, k, v, estimate, tiles, scale, key_padding, dropout_p)
    pairs = support.pairs(q, k, shape, key_padding)
    z = pairs.dot(q, k) * scale
    lse = pairs.logsumexp(z)
    if estimate is None:
        norm = torch.where(torch.isinf(lse), 0, lse)
        return pairs.weighted(_dropped(_exact(pairs, z, norm), dropout_p), v).to(q.dtype)
    g = pairs.dot(estimate.phi_q, estimate.phi_k)
    rest = (estimate.denominator - pairs.total(g)).clamp(min=_SMALLEST)
    norm = torch.logaddexp(lse, torch.log(rest) + estimate.log_scale)
    unit = torch.exp(estimate.log_scale - norm)  # at most 1 / _SMALLEST
    weights = _dropped(_exact(pairs, z, norm), dropout_p) - g * pairs.spread(unit)
    out = pairs.weighted(weights, v) + estimate.numerator * unit[..., None]
    return out.to(q.dtype)


def _native(q: Tensor, v: Tensor, features: PositiveRandomFeatures) -> bool:
    sizes = q.shape[-1], v.shape[-1], features.num_features
    known = q.is_cpu and q.dtype != torch.float64 and max(sizes) <= MAX_DIM
    return known and native_in_use() is not None


def _tiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    estimate: _Estimate,
    tiles: tuple[TileStream, AttentionShape],
    scale: float,
    key_padding: Tensor | None,
    dropout_p: float,
) -> Tensor:
    """The same from native passes over the support: its softmax, and its share of the sums.

    Where the sums were taken without the support, there is no share to take out.
    """
    stream, shape = tiles
    seed = int(torch.randint(1 << 31, ())) if dropout_p else 0
    o, lse = tile_attention(
        q, k, v, stream, shape,
        scale=scale, key_padding=key_padding, dropout_p=dropout_p, seed=seed,
    )  # fmt: skip
    rest, total = estimate.numerator, estimate.denominator
    if not estimate.lag:
        share, own_total = tile_attention(
            estimate.phi_q, estimate.phi_k, v.to(estimate.phi_q.dtype), stream, shape,
            scale=1.0, key_padding=key_padding, linear=True,
        )  # fmt: skip
        rest, total = rest - share, total - own_total
    norm = torch.logaddexp(lse, torch.log(total.clamp(min=_SMALLEST)) + estimate.log_scale)
    unit = torch.exp(estimate.log_scale - norm)
    own = torch.exp(lse - norm)
    return torch.addcmul(o * own[..., None], rest, unit[..., None]).to(q.dtype)


class _Estimate:
    """The low-rank part: features, their sums over all keys, and the log of their unit.

    Attributes:
        phi_q: (B, Hq, Lq, m).
        phi_k: (B, Hkv, Lk, m).
        log_scale: (B, Hq, Lq); entry (i, j) is ``phi_q[i] . phi_k[j] * exp(log_scale[i])``.
        numerator: (B, Hq, Lq, Dv).
        denominator: (B, Hq, Lq).
        lag: if above 0, the last `lag` keys of each row take no part in the two sums.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        features: PositiveRandomFeatures,
        causal: bool,
        key_padding: Tensor | None,
        lag: int,
    ) -> None:
        real = None if key_padding is None else key_padding[:, None].expand(-1, k.shape[1], -1)
        self.phi_q, rows = features.queries(q)
        self.phi_k, keys = features.keys(k, real)
        keys = keys.repeat_interleave(q.shape[1] // k.shape[1], 1)
        self.log_scale = (rows + keys)[..., 0]
        self.lag = lag
        self.numerator, self.denominator = linear_attention(self.phi_q, self.phi_k, v, causal, lag)


def _exact(pairs: Pairs, z: Tensor, norm: Tensor) -> Tensor:
    """``exp(z - norm)``; where a tile's slot is no pair, anything finite."""
    return torch.exp((z - pairs.spread(norm)).clamp(max=0))


def _dropped(weights: Tensor, p: float) -> Tensor:
    return nn.functional.dropout(weights, p) if p else weights


def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: PositiveRandomFeatures | None,
    support: Support | None,
    scale: float | None,
    causal: bool,
    key_padding: Tensor | None,
) -> float:
    """The factor of the logits."""
    check_tensors(q, k, v)
    if features is None and support is None:
        raise ValueError("features=None, support=None: expected at least one of them")
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError(
            f"causal: {q.shape[2]} queries and {k.shape[2]} keys, expected as many "
            "(it cannot decode on a cache)"
        )
    if key_padding is not None and not bool(key_padding.any(1).all()):
        raise ValueError("key_padding: expected a real key in every batch element")
    if features is None:
        return q.shape[-1] ** -0.5 if scale is None else scale
    if q.shape[-1] != features.dim:
        raise ValueError(f"q: {q.shape[-1]} dimensions, expected {features.dim} of the features")
    if scale is not None and not math.isclose(scale, features.softmax_scale, rel_tol=1e-6):
        raise ValueError(f"scale={scale}: expected {features.softmax_scale} of the features")
    return features.softmax_scale


def _support(
    name: str, window: int, count: int, n_hashes: int, cluster: int, mask: Any, block: int,
    seed: int | None,
) -> Support:  # fmt: skip
    if name == "local":
        return LocalSupport(window)
    if name == "topk":
        return TopKSupport(count)
    if name == "lsh":
        return SmyrfClusters(n_hashes, cluster, seed=seed)
    if name == "block":
        if mask is None:
            raise ValueError("block_mask=None: expected a mask with support='block'")
        return BlockSupport(torch.as_tensor(mask), block)
    raise ValueError(f"support={name!r}: expected 'lsh', 'local', 'block' or 'topk'")


class ScatterbrainAttention(nn.Module):
    """Multi-head self-attention, exact on a support and estimated elsewhere.

    Args:
        d_model: size of a token.
        num_heads: heads.
        num_features: even; default ``d * ln(d)`` of a head's size d; 0 leaves the sparse part.
        support: "lsh", "local", "block", "topk", or None, which leaves Performer.
        window: of "local", in tokens.
        count: of "topk", keys per row.
        n_hashes: of "lsh", rounds.
        cluster_size: of "lsh", tokens.
        block_mask: of "block", (nQ, nK) or (num_heads, nQ, nK) bool.
        block: of "block", tokens.
        causal: a token reads no later token.
        dropout: of the exact weights, while training.
        qkv_bias: whether the three projections have biases.
        eps: see `PositiveRandomFeatures`.
        ortho_scaling: rows of the projection have length sqrt(d) instead of a Gaussian's.

    Raises:
        ValueError: the heads do not divide, or an option does not fit.

    Reference:
        Chen et al., arXiv 2110.15343.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_features: int | None = None,
        support: SupportName | None = "lsh",
        *,
        window: int = 32,
        count: int = 32,
        n_hashes: int = 2,
        cluster_size: int = 32,
        block_mask: Tensor | None = None,
        block: int = 64,
        causal: bool = False,
        dropout: float = 0.0,
        qkv_bias: bool = False,
        eps: float = 0.0,
        ortho_scaling: bool = False,
    ) -> None:
        super().__init__()
        check_count("d_model", d_model)
        check_count("num_heads", num_heads)
        check_number("dropout", dropout, "[0, 1)")
        if d_model % num_heads:
            raise ValueError(f"d_model={d_model}: expected a multiple of num_heads={num_heads}")
        self.head_dim, self.causal, self.dropout = d_model // num_heads, causal, dropout
        self.features = None
        if num_features != 0:
            norm: Literal["gaussian", "sqrt_d"] = "sqrt_d" if ortho_scaling else "gaussian"
            self.features = PositiveRandomFeatures(self.head_dim, num_features, norm=norm, eps=eps)
        self.support = None
        if support is not None:
            self.support = _support(
                support, window, count, n_hashes, cluster_size, block_mask, block, None
            )
        if self.features is None and self.support is None:
            raise ValueError("num_features=0, support=None: expected at least one of them")
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=qkv_bias)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, key_padding: Tensor | None = None) -> Tensor:
        """Attention of tokens x (batch, tokens, d_model) among themselves.

        Args:
            x: the tokens.
            key_padding: (batch, tokens) bool, True at real tokens.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        out = scatterbrain_attention(
            q, k, v, self.features, self.support, causal=self.causal, key_padding=key_padding,
            dropout_p=self.dropout if self.training else 0.0,
        )  # fmt: skip
        return self.out(out.transpose(1, 2).flatten(2))


@add_selector
class ScatterbrainSelector(Selector):
    """Scatterbrain in place of a trained model's attention: ``aerogel:scatterbrain``.

    Its plan is the support; its own `attention` adds the features.

    Args:
        num_features: see `ScatterbrainAttention`.
        support: the same.
        window: the same.
        count: the same.
        n_hashes: the same.
        cluster_size: the same.
        seed: draws the features and the directions of "lsh", the same in every layer and call.

    Raises:
        ValueError: an option does not fit.

    Reference:
        Chen et al., arXiv 2110.15343.
    """

    slug = "scatterbrain"

    def __init__(
        self,
        num_features: int | None = None,
        support: Literal["lsh", "local", "topk"] = "local",
        window: int = 64,
        count: int = 64,
        n_hashes: int = 2,
        cluster_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._options = {
            "num_features": num_features, "support": support, "window": window, "count": count,
            "n_hashes": n_hashes, "cluster_size": cluster_size, "seed": seed,
        }  # fmt: skip
        if support == "block":
            raise ValueError("support='block': expected 'lsh', 'local' or 'topk' in a model")
        if num_features is not None:
            check_count("num_features", num_features, 0)
        check_count("seed", seed, 0)
        if num_features is not None and num_features % 2:
            raise ValueError(f"num_features={num_features}: expected an even number")
        self.num_features, self.seed = num_features, seed
        self.support = _support(support, window, count, n_hashes, cluster_size, None, 64, seed)
        self._features: dict[tuple[int, float], PositiveRandomFeatures] = {}

    def options(self) -> dict[str, Any]:
        return dict(self._options)

    def plan_prefill(self, ctx: AttentionContext) -> Plan:
        return self.support.plan(ctx.q, ctx.k, ctx.shape, ctx.key_padding)

    def attention(self, ctx: AttentionContext, **options: Any) -> Tensor | None:
        """Exact on the support, estimated elsewhere.

        Raises:
            ValueError: the model's attention has a window, a soft cap or a sink.
        """
        for name in ("window", "softcap", "sink_logit"):
            if options.get(name) is not None:
                raise ValueError(f"{name}={options[name]}: expected None with Scatterbrain")
        return scatterbrain_attention(
            ctx.q, ctx.k, ctx.v, self.features(ctx.q, ctx.scale), self.support,
            causal=ctx.shape.causal, key_padding=ctx.key_padding,
            dropout_p=options.get("dropout_p", 0.0),
        )  # fmt: skip

    def features(self, q: Tensor, scale: float) -> PositiveRandomFeatures | None:
        """The features for q and a factor of the logits, drawn once."""
        if self.num_features == 0:
            return None
        name = (q.shape[-1], scale)
        if name not in self._features:
            draw = torch.Generator().manual_seed(self.seed)
            self._features[name] = PositiveRandomFeatures(
                q.shape[-1], self.num_features, softmax_scale=scale, generator=draw
            )
        return self._features[name].to(q.device)
