"""Queries and keys of a pretrained sentence encoder on running text, for experiments on attention.

all-MiniLM-L6-v2: six layers of 12 heads of 32 channels, every token reads every token, no rotary
embedding. The text is Python's documentation (`pydoc_data.topics`).
"""

from __future__ import annotations

import pydoc_data.topics
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aerogel import data, models
from aerogel.attention import AttentionContext, AttentionShape

LENGTH, HEADS, HEAD_DIM, LAYERS = 512, 12, 32, 6


class Piece(NamedTuple):
    """One layer's view of one piece of text: q, k (1, heads, tokens, 32)."""

    q: Tensor
    k: Tensor

    def context(self, layer: int = 0) -> AttentionContext:
        """The call; values are the keys, since nothing looks at them."""
        shape = AttentionShape.of(self.q, self.k)
        return AttentionContext(
            self.q, self.k, self.k, shape, HEAD_DIM**-0.5, layer, q_pre=self.q, k_pre=self.k
        )

    def weights(self) -> Tensor:
        """Softmax attention (1, heads, tokens, tokens)."""
        return torch.softmax(self.q @ self.k.transpose(-1, -2) * HEAD_DIM**-0.5, -1)


@lru_cache(maxsize=1)
@torch.no_grad()
def pieces(count: int) -> list[list[Piece]]:
    """The first pieces of the text: per piece, every layer."""
    folder = data.fetch_checkpoint("minilm")
    model: Any = models.create_model("minilm", checkpoint_path=folder).eval()
    tokenizer = data.load_tokenizer(folder / "tokenizer.json")
    topics = pydoc_data.topics.topics
    windows = data.token_windows(tokenizer, [topics[name] for name in sorted(topics)], LENGTH)
    if len(windows) < count:
        raise ValueError(f"count={count}: the text has {len(windows)} pieces")
    found: list[list[Piece]] = []
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _, __, output: outputs.__setitem__(name, output)

    blocks = model.encoder.encoder.layer
    handles = []
    for number, block in enumerate(blocks):
        attention = block.attention.self
        handles.append(attention.query.register_forward_hook(keep(f"q{number}")))
        handles.append(attention.key.register_forward_hook(keep(f"k{number}")))
    for window in windows[:count]:
        model(window[None], torch.ones(1, LENGTH, dtype=torch.int64))
        split = {n: t.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for n, t in outputs.items()}
        found.append([Piece(split[f"q{i}"], split[f"k{i}"]) for i in range(len(blocks))])
    for handle in handles:
        handle.remove()
    return found
