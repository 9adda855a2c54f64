"""Causal language models by name: transformers' own classes, with weights from a local folder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from aerogel.models.registry import register_model
from aerogel.models.sentence_encoder import transformers_package

SMOLLM2_135M = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


@register_model(
    input_size=(128,),
    num_classes=0,
    params=134_515_008,
    paper="2502.02737",
    license="Apache-2.0",
    tokenizer="tokenizer.json",
)
def smollm2(folder: str | Path | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """SmolLM2-135M: 30 Llama blocks of width 576, embeddings tied to the output.

    Args:
        folder: a local folder with config.json and model.safetensors, as
            `aerogel.data.fetch_checkpoint("smollm2")` returns; None starts from random weights.
        dtype: of the weights; the folder stores bfloat16, which most CPUs compute slowly.

    Returns:
        A `transformers.LlamaForCausalLM`: token ids (batch, length) to an output with `logits`.

    Raises:
        ValueError: the folder holds the weights of another model.
        ModuleNotFoundError: transformers is not installed.
    """
    transformers = transformers_package()
    if folder is None:
        config = transformers.LlamaConfig(**SMOLLM2_135M)
        return transformers.LlamaForCausalLM(config).to(dtype)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, dtype=dtype, output_loading_info=True
    )
    wrong = sorted(map(str, (*info["missing_keys"], *info["unexpected_keys"])))
    if wrong or info["mismatched_keys"]:
        raise ValueError(f"{folder} holds the weights of another model: {wrong[:3]} differ")
    return model
