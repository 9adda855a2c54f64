"""A causal language model of Combiner blocks.

Paper: Ren et al., "Combiner: Full Attention Transformer with Sparse Computation Cost", 2021,
arXiv 2107.05768. Its language model: 12 blocks of width 768, 12 heads, 2048 tokens, seg_len 128,
AdamW with a cosine from 3e-4 after 10,000 steps of warm-up, batches of 128, no weight decay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from aerogel.attention.combiner_layer import CombinerAttention, CombinerCache
from aerogel.models.decoder_block import DecoderBlock


class CombinerLM(nn.Module):
    """Tokens to logits of the next token; learned positions.

    Args:
        vocab: tokens there are.
        dim: width.
        depth: blocks.
        max_seq_len: longest sequence, cached tokens included.
        num_heads: query heads of every block.
        dropout: of both branches of a block.
        options: further options of `CombinerAttention` (``variant``, ``seg_len``, ...).
    """

    def __init__(
        self,
        vocab: int,
        dim: int,
        depth: int,
        max_seq_len: int,
        num_heads: int = 8,
        dropout: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        self.max_seq_len = max_seq_len
        self.embed, self.place = nn.Embedding(vocab, dim), nn.Embedding(max_seq_len, dim)
        self.blocks = nn.ModuleList(
            DecoderBlock(dim, CombinerAttention(dim, num_heads, **options), dropout)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab, bias=False)

    def forward(
        self,
        ids: Tensor,
        key_padding: Tensor | None = None,
        cache: list[CombinerCache] | None = None,
    ) -> Tensor:
        """Logits (batch, n, vocab) of ids (batch, n).

        Raises:
            ValueError: ids and cache together are longer than `max_seq_len`.
        """
        start = cache[0].tokens if cache else 0
        stop = start + ids.shape[1]
        if stop > self.max_seq_len:
            raise ValueError(f"ids: {stop} tokens, expected at most {self.max_seq_len}")
        x = self.embed(ids) + self.place(torch.arange(start, stop, device=ids.device))
        for number, block in enumerate(self.blocks):
            own = None if cache is None else cache[number]
            x = block(x, key_padding=key_padding, cache=own)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def make_cache(self) -> list[CombinerCache]:
        """An empty cache, one for each block."""
        return [CombinerCache() for _ in self.blocks]
