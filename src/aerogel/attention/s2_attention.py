"""S2-Attention: every head reads its window and its own shard of the blocks before it.

Paper: Lin, Zhang, Wang, Ren, Awadalla, Gao, Chen, Wang, He and others, "Efficient LLM Training and
Serving with Heterogeneous Context Sharding among Attention Heads", 2024, arXiv 2407.17678 (later
titled "S2-Attention: Hardware-Aware Context Sharding Among Attention Heads").

The idea: a head attends to the last blocks and to every V-th block before them. The columns are
shifted from head to head, so that all heads together see the whole context, which no head alone
does. The pattern is fixed: training, prefill and decoding skip the same blocks, and a head never
needs again what has left its window and is not on its stride.

When to use it: training a model for long contexts, from scratch or continued, with a few dense
layers. A model trained densely loses by it; one layer alone is behind dense attention.
Costs and buys: per row about ``local + rest / V`` keys instead of all, forward, backward and in the
KV cache. Full coverage needs as many sparse key heads as the stride.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from aerogel.arguments import check_count
from aerogel.attention.local_stride import LocalStridePattern, block_mask_plan
from aerogel.attention.plan import DensePlan, Plan
from aerogel.attention.selector import AttentionContext, Selector, add_selector
from aerogel.attention.selector_file import model_fingerprint


@add_selector
class S2Selector(Selector):
    """The same shards in every layer but the dense ones; works in training and in decoding.

    A model that is built with it has its options in ``config.aerogel_s2``; then the name
    "aerogel:s2" is all that loading it takes.

    Args:
        block: see `LocalStridePattern`.
        local_blocks: the same.
        stride: the same.
        dense_heads: the same.
        head_offset: the same.
        step: the same.
        homo_head: the same.
        position: the same.
        dense_layers: numbers of layers that read all keys.

    Raises:
        ValueError: a size is out of range.

    Reference:
        Lin et al., arXiv 2407.17678.
    """

    slug = "s2-attention"
    alias = "s2"
    config_key = "aerogel_s2"

    def __init__(
        self,
        block: int = 64,
        local_blocks: int | Sequence[int] = 16,
        stride: int = 8,
        dense_heads: int = 0,
        head_offset: int = 0,
        step: int | None = None,
        homo_head: bool = False,
        dense_layers: Iterable[int] = (),
        position: str | None = None,
    ) -> None:
        super().__init__()
        even = not isinstance(local_blocks, Sequence) or isinstance(local_blocks, str)
        self.sizes: dict[str, Any] = {
            "block": block,
            "local_blocks": local_blocks if even else tuple(local_blocks),  # type: ignore[arg-type]
            "stride": stride,
            "dense_heads": dense_heads,
            "head_offset": head_offset,
            "step": step,
            "homo_head": homo_head,
            "position": position,
        }
        self.dense_layers = tuple(dense_layers)
        for layer in self.dense_layers:
            check_count("each of dense_layers", layer, 0)
        self._q_heads: int | None = None
        self._patterns: dict[tuple[int, int, bool], LocalStridePattern] = {}
        check_count("dense_heads", dense_heads, 0)
        LocalStridePattern(max(1, dense_heads), max(1, dense_heads), **self.sizes, causal=even)

    def options(self) -> dict[str, Any]:
        return {**self.sizes, "dense_layers": list(self.dense_layers)}

    def pattern(self, q_heads: int, kv_heads: int, causal: bool = True) -> LocalStridePattern:
        """The pattern for so many heads; warns once if they leave a part of the context unseen."""
        key = (q_heads, kv_heads, causal)
        if key not in self._patterns:
            pattern = LocalStridePattern(q_heads, kv_heads, **self.sizes, causal=causal)
            self._patterns[key] = pattern
            seen = not pattern.evictable or pattern.coverage().complete
            if not self.dense_layers and not seen:
                warnings.warn(
                    f"{kv_heads} key heads see the residues {pattern.coverage().residues} of "
                    f"stride {pattern.stride}: blocks between them are read by no head",
                    stacklevel=3,
                )
        return self._patterns[key]

    def plan_prefill(self, ctx: AttentionContext) -> Plan:
        if ctx.layer_idx in self.dense_layers:
            return DensePlan()
        shape = ctx.shape
        pattern = self.pattern(shape.q_heads, shape.kv_heads, shape.causal)
        if pattern.evictable:
            return pattern.span(ctx.first_keys(), ctx.q.device)
        blocks = -(-max(shape.k_len, shape.q_offset + shape.q_len) // pattern.block)
        return block_mask_plan(pattern.mask(blocks, blocks), pattern.block, shape)

    plan_decode = plan_prefill

    def cache_layer(self, layer_idx: int, kv_heads: int) -> Any:
        from aerogel.attention.cache import SpanCacheLayer

        if layer_idx in self.dense_layers:
            return None
        pattern = self.pattern(self._q_heads or kv_heads, kv_heads)
        return SpanCacheLayer(pattern.span(), kv_heads) if pattern.evictable else None

    def on_attach(self, model: nn.Module) -> None:
        """Checks the sizes against the model's, whose query heads set the default step."""
        transformer: Any = model
        if getattr(transformer.config.get_text_config(decoder=True), self.config_key, None) is None:
            _warn_of_dense()
        sizes = model_fingerprint(model)
        self._q_heads = sizes["q_heads"]
        self.pattern(sizes["q_heads"], sizes["kv_heads"])

    def on_name(self, options: dict[str, Any]) -> None:
        if not options:
            _warn_of_dense()


def _warn_of_dense() -> None:
    warnings.warn(
        "the model's configuration has no aerogel_s2, so it was not trained on shards: a model "
        "trained densely loses by them",
        stacklevel=3,
    )
