"""A causal language model of Routing Transformer blocks.

Paper: Roy et al., "Efficient Content-Based Sparse Attention with Routing Transformers", 2020,
arXiv 2003.05997. Its PG-19 model: depth 22, width 1032, 8 heads of which 2 route, and only in the
last layer, 16 clusters of 512 tokens, local blocks of 256, length 8192.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from aerogel.attention.cache import SelectorCacheLayer
from aerogel.attention.routing_layer import RoutingAttention
from aerogel.models.decoder_block import DecoderBlock


class RoutingTransformerLM(nn.Module):
    """Tokens to logits of the next token.

    Args:
        vocab: tokens there are.
        dim: width.
        depth: blocks.
        max_seq_len: longest sequence, cached tokens included.
        num_heads: heads of every block.
        num_local_heads: of them, heads with a local window.
        num_clusters: clusters of a routing head.
        window: tokens per cluster; default ``max_seq_len / num_clusters``.
        skip_first: so many first blocks have local heads only.
        dropout: of both branches of a block.
        options: further options of `RoutingAttention`.

    Raises:
        ValueError: `skip_first` is out of range, or `RoutingAttention` does not take the options.
    """

    def __init__(
        self,
        vocab: int,
        dim: int,
        depth: int,
        max_seq_len: int,
        num_heads: int = 8,
        num_local_heads: int = 4,
        num_clusters: int = 16,
        window: int | None = None,
        skip_first: int = 0,
        dropout: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        if not 0 <= skip_first <= depth:
            raise ValueError(f"skip_first={skip_first}: expected 0 to depth={depth}")
        self.max_seq_len = max_seq_len
        window = max(1, max_seq_len // num_clusters) if window is None else window
        options.setdefault("fit", True)
        self.embed = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList()
        for number in range(depth):
            local = num_heads if number < skip_first else num_local_heads
            attention = RoutingAttention(dim, num_heads, local, num_clusters, window, **options)
            self.blocks.append(DecoderBlock(dim, attention, dropout))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab, bias=False)
        nn.init.normal_(self.embed.weight, std=dim**-0.5)

    def forward(
        self,
        ids: Tensor,
        key_padding: Tensor | None = None,
        cache: list[SelectorCacheLayer] | None = None,
    ) -> Tensor:
        """Logits (batch, n, vocab) of ids (batch, n).

        Raises:
            ValueError: ids and cache together are longer than `max_seq_len`.
        """
        length = ids.shape[1] + (0 if not cache else int(cache[0].get_seq_length()))
        if length > self.max_seq_len:
            raise ValueError(f"ids: {length} tokens, expected at most {self.max_seq_len}")
        x = self.embed(ids)
        for number, block in enumerate(self.blocks):
            own = None if cache is None else cache[number]
            x = block(x, key_padding=key_padding, cache=own)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def make_cache(self) -> list[SelectorCacheLayer]:
        """An empty cache, one layer for each block."""
        return [SelectorCacheLayer() for _ in self.blocks]

    def auxiliary_loss(self) -> Tensor:
        """The commitment losses of the last training pass; add it to the task's loss."""
        total = self.embed.weight.new_zeros(())
        for module in self.modules():
            if isinstance(module, RoutingAttention) and module.auxiliary is not None:
                total = total + module.auxiliary
        return total
