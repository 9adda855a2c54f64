"""Attention of transformers models with both operands of both products rounded.

Their attention modules compute no product themselves, but call what the configuration names. Each
gets quantisers of its own, and the name of a function that uses them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from aerogel.sparsity.attention_implementation import switch_attention, switchable_attention
from aerogel.sparsity.fake_quantize import ATTENTION_BITS, AttentionQuantisers

NAME = "aerogel_rounded"
CHILD = "product_quantisers"


class ProductQuantisers(AttentionQuantisers):
    """What a transformers attention module holds as a child.

    Args:
        before: implementation of the model's attention that rounding stands for.
        bits: of all four operands.
        percentile: see `ActivationQuantiser`.
    """

    def __init__(
        self, before: str, bits: int = ATTENTION_BITS, percentile: float | None = None
    ) -> None:
        super().__init__(bits, percentile)
        self.before = before

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float, mask: Tensor | None
    ) -> Tensor:
        """q: (B, heads, N, head_dim), k and v with as many heads or fewer -> as q."""
        shared = q.shape[1] // k.shape[1]
        k, v = (each.repeat_interleave(shared, 1) if shared > 1 else each for each in (k, v))
        return self.product(q, k, v, scale, dropout, mask)


def quantise_attention(model: nn.Module, percentile: float | None = None) -> None:
    """Round the products of all switchable attention modules of a model, if there are any."""
    modules = list(switchable_attention(model))
    if not modules:
        return
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    AttentionInterface.register(NAME, _rounded)
    AttentionMaskInterface.register(NAME, eager_mask)
    for module in modules:
        before = str(module.config._attn_implementation)  # type: ignore[union-attr]
        quantisers = ProductQuantisers(before, percentile=percentile).train(module.training)
        module.add_module(CHILD, quantisers.to(next(module.parameters()).device))
    switch_attention(model, NAME)


def restore_attention(model: nn.Module) -> None:
    """Undo `quantise_attention`."""
    befores = set()
    for module in model.modules():
        own = module._modules.get(CHILD)
        if isinstance(own, ProductQuantisers):
            befores.add(own.before)
            del module._modules[CHILD]
    for before in befores:
        switch_attention(model, before)


def _rounded(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: q, k, v (B, heads, N, head_dim) -> (B, N, heads, head_dim)."""
    if softcap is not None or s_aux is not None:
        raise ValueError(
            f"{type(module).__name__} caps its scores or has sinks, which rounded attention has "
            "not: quantise_attention=False leaves it in float"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    own: Any = module._modules[CHILD]
    out = own(query, key, value, scale, dropout, attention_mask)
    return out.transpose(1, 2).contiguous(), None
