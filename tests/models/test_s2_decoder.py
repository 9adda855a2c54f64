"""A decoder with shards trains, and generates from a cache that drops what it needs no more."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from aerogel.attention.cache import AerogelCache
from aerogel.models.s2_decoder import s2_decoder

CONFIG = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
SHARDS = {"block": 4, "local_blocks": 2, "stride": 2, "dense_layers": (0,)}


def test_it_trains_and_generates_from_an_evicting_cache():
    torch.manual_seed(0)
    model = s2_decoder(CONFIG, **SHARDS)
    ids = torch.arange(48).remainder(7).add(2).expand(2, -1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    model.eval()
    options = {"max_new_tokens": 8, "do_sample": False}
    want = model.generate(ids, **options)
    cache = AerogelCache(model)
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), want)
    tokens = want.shape[1] - 1
    assert cache.layers[1].keys.shape[1] < 2 * tokens


def test_layers_that_are_not_there_are_named():
    with pytest.raises(ValueError, match="from 0 to 2"):
        s2_decoder(CONFIG, **{**SHARDS, "dense_layers": (3,)})
