"""The part of `PlanBuilder` that builds transformers: layers whose columns are tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from aerogel.kernels import token_layers
from aerogel.kernels.layers import Layer, float_tensor
from aerogel.kernels.plan import Value
from aerogel.kernels.token_layers import HeadRows


class TokenMethods:
    """Methods of `PlanBuilder` for values of (features, tokens)."""

    batch: int

    def add_layer(self, layer: Layer, *inputs: Value | None, name: str | None = None) -> Value:
        """Appends a layer; see `PlanBuilder`."""
        raise NotImplementedError

    def constant(self, data: Tensor, name: str | None = None) -> Value:
        """A tensor that every image meets: a position embedding, a class token, a mask.

        Args:
            data: (F, T), (F,) or (C, H, W) float32; copied by `build()`.
            name: for `describe`.

        Raises:
            ValueError: no or more than three dimensions.
            TypeError: not float32 on the CPU.
        """
        data = float_tensor("data", data)
        if not 1 <= data.dim() <= 3 or data.numel() == 0:
            raise ValueError(
                f"data: shape {tuple(data.shape)}, expected (F, T), (F,) or (C, H, W), not empty"
            )
        return self.add_layer(token_layers.Constant(data, self.batch), name=name)

    def layer_norm(
        self,
        x: Value,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        name: str | None = None,
    ) -> Value:
        """Layer normalisation over the features of every column.

        Args:
            x: (F, T), (F,) or planes.
            weight: (F,) or None.
            bias: (F,) or None.
            eps: added to the variance.
            name: for `describe` and `profile`.

        Reference:
            Ba, Kiros, Hinton, Layer Normalization, arXiv 1607.06450.
        """
        weight = None if weight is None else float_tensor("weight", weight)
        bias = None if bias is None else float_tensor("bias", bias)
        return self.add_layer(token_layers.LayerNorm(weight, bias, eps), x, name=name)

    def attention(
        self,
        q: Value,
        k: Value,
        v: Value,
        num_heads: int | HeadRows,
        mask: Value | None = None,
        mask_columns: tuple[int, int, int] = (1, 1, 1),
        scale: float | None = None,
        sequences: int = 1,
        empty_is_zero: bool = True,
        k_heads: HeadRows | None = None,
        v_heads: HeadRows | None = None,
        name: str | None = None,
    ) -> Value:
        """Softmax attention: v softmax(k^T q * scale + mask) for each head and sequence.

        Args:
            q: (heads * head_dim, sequences * queries).
            k: (heads * head_dim, sequences * keys).
            v: (heads * value_dim, sequences * keys).
            num_heads: heads that fill q, k and v; or where those of q lie in a larger value.
            mask: (keys, columns) added to the scores, -inf for what must not be seen.
            mask_columns: what the mask's columns are, (sequences, heads, queries), 1 for any of
                them that all share.
            scale: of the scores; default head_dim ** -0.5.
            sequences: how many lie side by side in the columns.
            empty_is_zero: a query that sees no key gives zeros (as torch's
                `scaled_dot_product_attention`), else NaN (as its softmax).
            k_heads: where the keys' heads lie, default as many as q's from the first row on.
            v_heads: where the values' lie, likewise.
            name: for `describe` and `profile`.

        Returns:
            (heads * value_dim, sequences * queries).

        Reference:
            Vaswani et al., Attention Is All You Need, arXiv 1706.03762; the online softmax is
            Milakov, Gimelshein, arXiv 1805.02867.
        """
        of_q = num_heads if isinstance(num_heads, HeadRows) else _filling("q", q, num_heads)
        layer = token_layers.Attention(
            q=of_q,
            k=k_heads or _filling("k", k, of_q.count),
            v=v_heads or _filling("v", v, of_q.count),
            sequences=sequences,
            scale=of_q.size**-0.5 if scale is None else scale,
            empty_is_zero=empty_is_zero,
            mask=None if mask is None else mask_columns,
        )
        return self.add_layer(layer, q, k, v, mask, name=name)

    def columns(
        self, x: Value, start: int, step: int = 1, count: int | None = None, name: str | None = None
    ) -> Value:
        """Some columns of (F, T) tokens.

        Args:
            x: (F, T).
            start: the first one.
            step: from one to the next.
            count: how many; None for the first alone, as a vector (F,).
            name: for `describe` and `profile`.
        """
        return self.add_layer(token_layers.Columns(start, step, count), x, name=name)

    def concat(self, parts: Sequence[Value], name: str | None = None) -> Value:
        """Tokens of several values side by side: (F, T1), (F, T2), ... to (F, T1 + T2 + ...).

        Args:
            parts: (F, T) or (F,), which is one token.
            name: for `describe` and `profile`.
        """
        return self.add_layer(token_layers.Concat(), *parts, name=name)


def _filling(name: str, x: Value, count: int) -> HeadRows:
    """Heads that fill a value."""
    if count < 1 or not x.shape or x.shape[0] % count:
        raise ValueError(f"num_heads={count}: expected a divisor of {name}'s features, {x.shape}")
    return HeadRows(count, math.prod(x.shape[:1]) // count)
