"""Sentence encoders: a BERT-like network, mean pooling, embeddings of length 1.

Reference: Reimers, Gurevych, "Sentence-BERT", arXiv 1908.10084; Wang et al., "MiniLM",
arXiv 2002.10957.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from aerogel.models.checkpoint import read_state_dict
from aerogel.models.registry import register_model

MINILM_L6 = {
    "vocab_size": 30_522,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "max_position_embeddings": 512,
}


class SentenceEncoder(nn.Module):
    """Tokens to one unit vector for each text; captured whole by `torch.export`.

    Args:
        encoder: a transformers encoder that returns `last_hidden_state`.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    @property
    def embed_dim(self) -> int:
        """Length of an embedding."""
        return int(self.encoder.config.hidden_size)  # type: ignore[union-attr,arg-type]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode a batch.

        Args:
            input_ids: (B, T) int64 token ids.
            attention_mask: (B, T) int64, 1 for tokens and 0 for padding.

        Returns:
            (B, embed_dim) embeddings of Euclidean length 1.
        """
        hidden = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask
        ).last_hidden_state  # [B, T, C]
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * weight).sum(1) / weight.sum(1).clamp_min(1.0)
        return F.normalize(pooled, dim=-1)

    def prune_targets(self) -> Iterator[tuple[str, str]]:
        """(module name, "linear") of every linear layer of the encoder's blocks."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                yield name, "linear"


def transformers_package() -> Any:
    """The package transformers, which models of text are made of.

    Raises:
        ModuleNotFoundError: it is not installed; the message says what to install.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "models of text need the package transformers: pip install 'aerogel[text]'"
        ) from error
    return transformers


@register_model(
    input_size=(128,),
    num_classes=0,
    params=22_565_376,
    paper="2002.10957",
    license="Apache-2.0",
    tokenizer="tokenizer.json",
)
def minilm(
    folder: str | Path | None = None, dropout: float = 0.0, freeze_embeddings: bool = False
) -> SentenceEncoder:
    """all-MiniLM-L6-v2: 6 layers of width 384, 22.57 M parameters without the unused pooler.

    Args:
        folder: a local folder with config.json and model.safetensors; None starts from random
            weights.
        dropout: dropout inside the encoder; distillation for a few epochs does better without.
        freeze_embeddings: keep the tables of words and positions, half of all parameters, as they
            are: pruning does not touch them, and a step needs less memory traffic.

    Raises:
        ValueError: the folder holds the weights of another model.
        ModuleNotFoundError: transformers is not installed.
    """
    transformers = transformers_package()
    drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    if folder is None:
        config = transformers.BertConfig(**MINILM_L6, **drop)
    else:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, **drop)
    encoder = transformers.AutoModel.from_config(config, add_pooling_layer=False)
    if folder is not None:
        _load_encoder(encoder, Path(folder) / "model.safetensors")
    encoder.embeddings.requires_grad_(not freeze_embeddings)
    return SentenceEncoder(encoder)


def _load_encoder(encoder: nn.Module, path: Path) -> None:
    state = read_state_dict(path)
    own = encoder.state_dict().keys()
    # Sentence embeddings are means over tokens: BERT's pooler and its stored positions are unused.
    state = {k: v for k, v in state.items() if k in own or not k.startswith(("pooler", "embeddi"))}
    missing, unknown = sorted(own - state.keys()), sorted(state.keys() - own)
    if missing or unknown:
        raise ValueError(
            f"{path} holds the weights of another model: missing {missing[:3]}, "
            f"unknown {unknown[:3]}"
        )
    encoder.load_state_dict(state)
