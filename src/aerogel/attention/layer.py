"""`SparseSelfAttention`: multi-head self-attention for own models, sparse by a selector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from aerogel.arguments import check_count
from aerogel.attention.engine import attend
from aerogel.attention.plan import Plan
from aerogel.attention.selector import AttentionContext, Selector, select
from aerogel.attention.shape import AttentionShape

PlanFunction = Callable[..., Plan]


class SparseSelfAttention(nn.Module):
    """Self-attention with grouped heads over the keys that a selector chooses.

    Args:
        d_model: size of a token.
        num_heads: query heads.
        num_kv_heads: key and value heads, default as many as queries.
        selector: a `Selector`, or a function ``(q, k, **info) -> Plan``, or None for all keys.
        causal: a token reads no later token.
        rope: function (q, k) -> (q, k) that turns both by position, or None.
        qkv_bias: whether the three projections have biases.

    Raises:
        ValueError: the heads do not divide.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        selector: Selector | PlanFunction | None = None,
        causal: bool = True,
        rope: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        qkv_bias: bool = False,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_count("d_model", d_model)
        check_count("num_heads", num_heads)
        check_count("num_kv_heads", num_kv_heads)
        if d_model % num_heads or num_heads % num_kv_heads:
            raise ValueError(
                f"d_model={d_model}, num_heads={num_heads}, num_kv_heads={num_kv_heads}: "
                "expected each to divide the one before"
            )
        self.head_dim = d_model // num_heads
        self.num_heads, self.num_kv_heads, self.causal = num_heads, num_kv_heads, causal
        self.selector, self.rope = selector, rope
        self.query = nn.Linear(d_model, d_model, bias=qkv_bias)
        self.key = nn.Linear(d_model, num_kv_heads * self.head_dim, bias=qkv_bias)
        self.value = nn.Linear(d_model, num_kv_heads * self.head_dim, bias=qkv_bias)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, key_padding: Tensor | None = None, **info: Any) -> Tensor:
        """Attention of the tokens among themselves.

        Args:
            x: (batch, tokens, d_model).
            key_padding: (batch, tokens) bool, True at real tokens.
            info: handed to the selector (``grid=(H, W)``).

        Returns:
            (batch, tokens, d_model).
        """
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        q_pre, k_pre = q, k
        if self.rope is not None:
            q, k = self.rope(q, k)
        plan = None
        if isinstance(self.selector, Selector):
            shape = AttentionShape.of(q, k, causal=self.causal)
            context = AttentionContext(
                q, k, v, shape, self.head_dim**-0.5, key_padding=key_padding, q_pre=q_pre,
                k_pre=k_pre, layer_input=x, info=info,
            )  # fmt: skip
            own = self.selector.attention(context)
            if own is not None:
                return self.out(own.transpose(1, 2).flatten(2))
            plan = select(self.selector, context)
        elif self.selector is not None:
            plan = self.selector(q, k, **info)
        out = attend(q, k, v, plan=plan, causal=self.causal, key_padding=key_padding)
        assert isinstance(out, Tensor)
        return self.out(out.transpose(1, 2).flatten(2))
