"""Causal language models by name: transformers' own classes, with weights from a local folder.

`smollm2` is a real pretrained model. `tiny_lm` is for evidence that needs gradients or speed:
`experiments/tiny_lm.py` trains it in a quarter of an hour on one core, until it copies passages
from far back, which is what sparse attention may break.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
TINY_LM = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
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
    return _llama(SMOLLM2_135M, folder, dtype)


@register_model(input_size=(256,), num_classes=0, params=476_032)
def tiny_lm(
    folder: str | Path | None = None, dtype: torch.dtype = torch.float32, **config: Any
) -> nn.Module:
    """Three Llama blocks of width 128 on bytes, embeddings tied to the output.

    Args:
        folder: a local folder with config.json and model.safetensors, as `experiments/tiny_lm.py`
            caches; None starts from random weights.
        dtype: of the weights.
        **config: other fields of `transformers.LlamaConfig`, for a model with random weights.

    Returns:
        A `transformers.LlamaForCausalLM`: bytes (batch, length) to an output with `logits`.

    Raises:
        ValueError: the folder holds the weights of another model.
        ModuleNotFoundError: transformers is not installed.
    """
    return _llama({**TINY_LM, **config}, folder, dtype)


def _llama(config: dict[str, Any], folder: str | Path | None, dtype: torch.dtype) -> nn.Module:
    transformers = transformers_package()
    if folder is None:
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).to(dtype)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, dtype=dtype, output_loading_info=True
    )
    wrong = sorted(map(str, (*info["missing_keys"], *info["unexpected_keys"])))
    if wrong or info["mismatched_keys"]:
        raise ValueError(f"{folder} holds the weights of another model: {wrong[:3]} differ")
    return model
