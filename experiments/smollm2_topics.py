"""SmolLM2 and Python's documentation (`pydoc_data.topics`), for experiments on attention."""

from __future__ import annotations

import pydoc_data.topics
from functools import lru_cache

from torch import Tensor, nn

from aerogel import data, models


@lru_cache(maxsize=1)
def model_and_windows(length: int) -> tuple[nn.Module, Tensor]:
    """The pretrained model, and all pages in alphabetical order as (n, length) tokens."""
    folder = data.fetch_checkpoint("smollm2")
    model = models.create_model("smollm2", checkpoint_path=folder).eval()
    tokenizer = data.load_tokenizer(folder / "tokenizer.json")
    topics = pydoc_data.topics.topics
    texts = [topics[name] for name in sorted(topics)]
    return model, data.token_windows(tokenizer, texts, length)
