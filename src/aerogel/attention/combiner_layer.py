"""`CombinerAttention`: Combiner as a layer for own models, with a cache that forgets raw tokens.

Reference: Ren et al., arXiv 2107.05768.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from aerogel.arguments import check_count, check_number
from aerogel.attention.combiner import CombinerSelector, RowSummary
from aerogel.attention.combiner_base import Variant
from aerogel.attention.combiner_cache import CombinerCache, attend_by_blocks, attend_by_spans
from aerogel.attention.engine import attend
from aerogel.attention.selector import AttentionContext, select
from aerogel.attention.shape import AttentionShape
from aerogel.attention.summaries import Pooling


class CombinerAttention(nn.Module):
    """Multi-head self-attention in which every visible position keeps a weight.

    Args:
        d_model: size of a token.
        num_heads: query heads.
        num_kv_heads: key and value heads, default as many.
        variant, seg_len, summary, row_summary: see `CombinerSelector`.
        causal: a token reads no later token; "logsparse" and "axial" are causal only.
        dropout: of attention weights, of tokens and of summaries, in training.
        bias: whether the four projections have biases.
        options: further options of `CombinerSelector`.

    Raises:
        ValueError: heads do not divide, or the variant is causal only.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        variant: Variant = "fixed",
        seg_len: int = 128,
        summary: Pooling = "max",
        row_summary: RowSummary = "proj",
        causal: bool = True,
        dropout: float = 0.0,
        bias: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        key_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_count("d_model", d_model)
        check_count("num_heads", num_heads)
        check_count("num_kv_heads", key_heads)
        check_number("dropout", dropout, "[0, 1)")
        if d_model % num_heads or num_heads % key_heads:
            raise ValueError(
                f"d_model={d_model}, num_heads={num_heads}, num_kv_heads={key_heads}: expected "
                "each to divide the one before"
            )
        if variant in ("logsparse", "axial") and not causal:
            raise ValueError(f"variant={variant!r}, causal=False: expected causal attention")
        self.head_dim, self.causal, self.dropout = d_model // num_heads, causal, dropout
        self.selector = CombinerSelector(
            variant, seg_len, summary, row_summary, head_dim=self.head_dim, key_heads=key_heads,
            d_model=d_model, dropout=dropout, **options,
        )  # fmt: skip
        width = key_heads * self.head_dim
        self.query = nn.Linear(d_model, d_model, bias=bias)
        self.key = nn.Linear(d_model, width, bias=bias)
        self.value = nn.Linear(d_model, width, bias=bias)
        self.out = nn.Linear(d_model, d_model, bias=bias)

    def forward(
        self, x: Tensor, key_padding: Tensor | None = None, cache: CombinerCache | None = None
    ) -> Tensor:
        """Attention of tokens among themselves.

        Args:
            x: (batch, L, d_model); with a cache, the new tokens.
            key_padding: (batch, L) bool, True at real tokens; not with a cache.
            cache: of this layer; filled by the call.

        Returns:
            (batch, L, d_model).

        Raises:
            ValueError: the sequence is shorter than a segment, or the cache does not fit.
        """
        seg_len, variant = self.selector.seg_len, self.selector.variant
        if cache is None and variant != "logsparse" and seg_len > x.shape[1]:
            raise ValueError(f"seg_len={seg_len}: expected at most the {x.shape[1]} tokens")
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        if cache is None:
            out = self._whole(q, k, v, x, key_padding)
        else:
            self._check_cache(cache, key_padding)
            if variant == "fixed":
                out, _ = attend_by_blocks(self.selector, cache, q, k, v, self.head_dim**-0.5)
            elif variant == "logsparse":
                out, _ = attend_by_spans(self.selector, cache, q, k, v, self.head_dim**-0.5)
            else:
                q, k, v, x_all = cache.append((q, k, v, x))
                out = self._whole(q, k, v, x_all, None)[:, :, -x.shape[1] :]
        projected: Tensor = self.out(out.transpose(1, 2).flatten(2))
        return projected

    def _whole(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, key_padding: Tensor | None
    ) -> Tensor:
        shape = AttentionShape.of(q, k, causal=self.causal)
        ctx = AttentionContext(
            q, k, v, shape, self.head_dim**-0.5, key_padding=key_padding, layer_input=x
        )
        out = attend(
            q, k, v, plan=select(self.selector, ctx), causal=self.causal, key_padding=key_padding,
            dropout_p=self.dropout if self.training else 0.0,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out

    def _check_cache(self, cache: CombinerCache, key_padding: Tensor | None) -> None:
        mine = (self.selector.variant, self.selector.seg_len)
        if cache.variant not in (None, mine):
            raise ValueError(f"cache: filled by {cache.variant}, expected {mine}")
        if not self.causal or key_padding is not None:
            raise ValueError("cache: expected causal attention without key_padding")
        cache.variant = mine
