"""Turning a GGUF file of a Llama-like language model into a plain transformers folder.

GGUF is llama.cpp's container: 4-bit blocks, other names, query and key rows in another order. The
folder holds what everybody reads: `config.json`, `model.safetensors` (bfloat16) and
`tokenizer.json`. Whatever the file's quantisation lost stays lost: "dense" below means dequantised.

Reference: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aerogel.atomic import write_atomic

# Raised when the same GGUF file would be turned into other bytes.
CONVERSION_VERSION = 1
STAMP = "converted.json"

_CONTROL_TOKEN = 3  # llama.cpp's token type of special tokens
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def convert_llama(
    path: Path, folder: Path, on_progress: Callable[[str, int, int], None] | None = None
) -> None:
    """Write the transformers folder of one GGUF file; the stamp that says it is whole comes last.

    Args:
        path: a GGUF file of architecture "llama" with a byte-level BPE tokenizer.
        folder: an existing folder.
        on_progress: called as (what, tensors done, tensors in all).

    Raises:
        ModuleNotFoundError: `gguf` or `tokenizers` is not installed.
        ValueError: another architecture, or a tensor that is not known.
    """
    gguf = _gguf()
    from safetensors.torch import save

    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("general.architecture") != "llama":
        raise ValueError(f"{path} holds a {fields.get('general.architecture')!r}, not a llama")
    config = _config(fields)
    state: dict[str, Tensor] = {}
    for done, entry in enumerate(reader.tensors, start=1):
        values = torch.tensor(gguf.quants.dequantize(entry.data, entry.tensor_type))
        name, weight = _renamed(entry.name, values, config)
        state[name] = weight.to(torch.bfloat16).contiguous()
        if on_progress is not None:
            on_progress(f"dequantise {path.name}", done, len(reader.tensors))
    config["tie_word_embeddings"] = "lm_head.weight" not in state
    write_atomic(folder / "config.json", json.dumps(config, indent=2) + "\n", mode=0o644)
    write_atomic(folder / "tokenizer.json", _tokenizer(fields), mode=0o644)
    write_atomic(folder / "model.safetensors", save(state, {"format": "pt"}), mode=0o644)


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    """config.json of transformers' Llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 12),
        "rope_theta": fields["llama.rope.freq_base"],
        "rope_parameters": {"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        "hidden_act": "silu",
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        "dtype": "bfloat16",
    }


def _renamed(name: str, values: Tensor, config: dict[str, Any]) -> tuple[str, Tensor]:
    """transformers' name and row order of one tensor."""
    if name == "output.weight":
        return "lm_head.weight", values
    stem, _, ending = name.rpartition(".")
    if stem in _OUTER_NAMES:
        return f"{_OUTER_NAMES[stem]}.{ending}", values
    prefix, _, part = stem.rpartition(".")
    if not prefix.startswith("blk.") or part not in _LAYER_NAMES:
        raise ValueError(f"unknown tensor {name!r}; only plain Llama models are known")
    if part in ("attn_q", "attn_k"):
        heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
        # llama.cpp interleaves the two halves that a rotary embedding turns together.
        values = values.view(heads, -1, 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape)
    return f"model.layers.{prefix.removeprefix('blk.')}.{_LAYER_NAMES[part]}.{ending}", values


def _tokenizer(fields: dict[str, Any]) -> str:
    """tokenizer.json: byte-level BPE that splits numbers into digits, as SmolLM's does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if (fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre")) != ("gpt2", "smollm"):
        raise ValueError(
            f"tokenizer {fields['tokenizer.ggml.model']!r}/{fields.get('tokenizer.ggml.pre')!r} "
            "is not known; expected 'gpt2'/'smollm'"
        )
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    return tokenizer.to_str()


def _gguf() -> Any:
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "reading GGUF files needs the package gguf: pip install 'aerogel[gguf]'"
        ) from error
    return gguf
