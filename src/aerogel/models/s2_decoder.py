"""Decoders whose layers read shards of their context, but for a few dense ones (S2-Attention).

Paper: Lin et al., "Efficient LLM Training and Serving with Heterogeneous Context Sharding among
Attention Heads", arXiv 2407.17678: the best quality comes with some dense layers mixed in.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from aerogel.attention import S2Selector, attach
from aerogel.models.sentence_encoder import transformers_package


def s2_decoder(config: Any, *, dense_layers: Iterable[int] = (0, 1), **pattern: Any) -> nn.Module:
    """A causal language model with random weights that trains and generates on shards.

    Args:
        config: a transformers configuration of a causal model, or a dictionary of fields of
            `transformers.LlamaConfig`.
        dense_layers: numbers of the layers that read all keys.
        pattern: of `aerogel.attention.S2Selector`: block, local_blocks, stride, ...

    Returns:
        The transformers model, attached; `aerogel.attention.detach` makes it dense, and
        `aerogel.attention.cache.AerogelCache(model)` is the cache that drops what no head reads
        again. Its configuration keeps the pattern: once saved, it loads by
        ``attn_implementation="aerogel:s2"``.

    Raises:
        ValueError: a size is out of range, or there is no such layer.
        ModuleNotFoundError: transformers is not installed.
    """
    transformers = transformers_package()
    if isinstance(config, dict):
        config = transformers.LlamaConfig(**config)
    layers = config.get_text_config(decoder=True).num_hidden_layers
    numbers = tuple(dense_layers)
    if any(not 0 <= number < layers for number in numbers):
        raise ValueError(f"dense_layers={numbers}: expected numbers from 0 to {layers - 1}")
    selector = S2Selector(dense_layers=numbers, **pattern)
    config.get_text_config(decoder=True).aerogel_s2 = selector.options()
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    attach(model, selector)
    return model
