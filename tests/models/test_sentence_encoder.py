"""The sentence encoder: unit vectors that do not see the padding, captured by torch.export."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from aerogel import models
from aerogel.models import SentenceEncoder
from aerogel.models.sentence_encoder import MINILM_L6

transformers = pytest.importorskip("transformers")
TINY = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


@pytest.fixture
def encoder() -> SentenceEncoder:
    torch.manual_seed(0)
    config = transformers.BertConfig(**TINY)
    bert = transformers.AutoModel.from_config(config, add_pooling_layer=False)
    return SentenceEncoder(bert).eval()


def tokens(length: int, padded: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.zeros(1, padded, dtype=torch.int64)
    ids[0, :length] = torch.arange(1, length + 1)
    return ids, (torch.arange(padded) < length).long()[None]


def test_embeddings_have_length_1_and_ignore_padding(encoder: SentenceEncoder):
    short, long = encoder(*tokens(5, 5)), encoder(*tokens(5, 12))
    torch.testing.assert_close(short.norm(), torch.tensor(1.0))
    torch.testing.assert_close(short, long, rtol=1e-5, atol=1e-6)
    assert short.shape == (1, encoder.embed_dim)


def test_an_encoder_can_be_exported_whole(encoder: SentenceEncoder):
    program = torch.export.export(encoder, tokens(5, 8))
    other = tokens(7, 8)
    torch.testing.assert_close(program.module()(*other), encoder(*other))


def test_pruning_may_touch_the_linear_layers_of_the_blocks(encoder: SentenceEncoder):
    targets = list(encoder.prune_targets())
    assert len(targets) == 2 * 6
    assert all(kind == "linear" for _, kind in targets)


def test_a_folder_of_other_weights_is_refused(tmp_path: Path):
    transformers.BertConfig(**TINY).save_pretrained(tmp_path)
    save_file({"foo": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="another model"):
        models.create_model("minilm", checkpoint_path=tmp_path)


def test_minilm_tells_paraphrases_from_other_texts():
    root = Path(os.environ.get("AEROGEL_CACHE") or "~/.cache/aerogel").expanduser() / "minilm"
    if not (root / "model.safetensors").exists():
        pytest.skip("minilm is not in the cache; aerogel.data.fetch_checkpoint('minilm') gets it")
    tokenizers = pytest.importorskip("tokenizers")
    model = models.create_model("minilm", checkpoint_path=root).eval()
    assert model.embed_dim == MINILM_L6["hidden_size"]
    tokenizer = tokenizers.Tokenizer.from_file(str(root / "tokenizer.json"))
    texts = ["A man is eating food.", "A man eats something.", "The stock market fell today."]
    encoded = tokenizer.encode_batch(texts)
    ids = torch.tensor([e.ids for e in encoded])
    mask = torch.tensor([e.attention_mask for e in encoded])
    with torch.no_grad():
        vectors = model(ids, mask)
    close, far = float(vectors[0] @ vectors[1]), float(vectors[0] @ vectors[2])
    assert close > 0.7
    assert far < 0.2
