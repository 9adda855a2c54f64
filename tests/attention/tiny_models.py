"""Tiny random transformers models of every family that the engine serves."""

from __future__ import annotations

from typing import Any

import torch
import transformers

COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 63,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Mistral": {"sliding_window": 12},
    "Phi3": {},
    "Gemma": {"head_dim": 16},
    "Gemma2": {"head_dim": 16, "sliding_window": 12},
    "GPTNeoX": {"num_key_value_heads": None},
}


def tiny(family: str, **changes: Any) -> Any:
    """A model in eval mode with reproducible random weights; attention by SDPA."""
    options = {**COMMON, **FAMILIES[family], **changes}
    options = {name: value for name, value in options.items() if value is not None}
    config = getattr(transformers, f"{family}Config")(**options)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def prompts(batch: int = 3, length: int = 40, left: bool = True) -> tuple[Any, Any]:
    """Token numbers and the padding mask of a batch of different lengths."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 63, (batch, length), generator=draw)
    much = torch.arange(batch)[:, None] * 7
    j = torch.arange(length)
    mask = (j >= much if left else j < length - much).long()
    return ids * mask, mask
