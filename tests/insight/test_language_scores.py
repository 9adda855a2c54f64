"""Scores of language models: nats agree with the model's own loss, probes ask what they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from aerogel import models
from aerogel.data import recall
from aerogel.insight import language, passage_nats, retrieval, token_nats

HAY = torch.arange(2000) % 90 + 32


def encode(text: str) -> list[int]:
    return list(text.encode())


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return models.create_model("tiny_lm", hidden_size=32, intermediate_size=32, num_hidden_layers=2)


class Copier(nn.Module):
    """Foretells what followed the last occurrence of the last six tokens; prompts are short."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, **_: Any) -> Any:
        seen = (past_key_values or []) + input_ids[0].tolist()
        logits = torch.zeros(1, input_ids.shape[1], 256)
        for i in range(len(seen) - input_ids.shape[1], len(seen)):
            for j in range(i - 1, 4, -1):
                if seen[j - 5 : j + 1] == seen[i - 5 : i + 1]:
                    logits[0, i - len(seen), seen[j + 1]] = 50.0
                    break
        return type("Output", (), {"logits": logits, "past_key_values": seen})()


def test_nats_are_the_models_own_loss(model, monkeypatch):
    ids = torch.randint(0, 256, (3, 20))
    logits = model(ids).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    wanted = loss.detach().view(3, 19)
    model.train()
    torch.testing.assert_close(token_nats(model, ids, batch_size=2), wanted)
    assert model.training
    monkeypatch.setattr(language, "_LOGITS", 3 * 256 * 4)
    torch.testing.assert_close(token_nats(model, ids, batch_size=3), wanted)
    monkeypatch.setattr(model.config, "logit_scale", 1.0, raising=False)
    torch.testing.assert_close(token_nats(model, ids), wanted)


def test_a_model_that_copies_does_better_on_the_repetition():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (2, 64), generator=generator)
    nats = passage_nats(Copier(), *recall.repeat_passage(ids, (16, 16), generator), skip=6)
    assert nats.repeat < 0.01 < 5 < nats.plain


def test_bad_shapes_are_named(model):
    with pytest.raises(ValueError, match="ids has shape"):
        token_nats(model, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="repeated has shape"):
        passage_nats(model, torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 7).bool())
    with pytest.raises(ValueError, match="plain and repeated"):
        passage_nats(model, torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8).bool())


@given(length=st.integers(100, 400), depth=st.floats(0, 1), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_probes_fill_their_length_and_hold_the_answer_once(length, depth, seed):
    for probe in (
        retrieval.needle_probe(encode, HAY, length, depth, seed),
        retrieval.key_value_probe(encode, length, depth, seed),
    ):
        prompt, answer = bytes(probe.prompt.tolist()), bytes(probe.answer.tolist())
        assert len(prompt) == length
        question = prompt[-8:]
        at = prompt.index(question)
        assert prompt[at + len(question) :].startswith(answer)
        assert at < length - 8


def test_depth_moves_the_answer_through_the_prompt():
    found = []
    for depth in (0.0, 0.5, 1.0):
        pair = retrieval.key_value_probe(encode, 600, depth, 1)
        needle = retrieval.needle_probe(encode, HAY, 600, depth, 1)
        found.append(
            [bytes(p.prompt.tolist()).index(bytes(p.answer.tolist())) for p in (pair, needle)]
        )
    assert found[0] < found[1] < found[2]
    assert max(found[0]) < 100
    assert min(found[2]) > 450


def test_a_copier_answers_and_a_random_model_does_not(model):
    probes = [retrieval.key_value_probe(encode, 150, d, 3) for d in (0.0, 1.0)]
    assert retrieval.ask(Copier(), probes).accuracy == 1.0
    seen: list[tuple[int, int]] = []
    got = retrieval.ask(model, probes, on_progress=lambda *x: seen.append(x))
    assert got.accuracy == 0.0
    assert 4 < got.nats < 8
    assert seen == [(1, 2), (2, 2)]


def test_answers_through_the_cache_are_scored_as_without_one(model):
    probe = retrieval.key_value_probe(encode, 120, 0.5, 0)
    whole = torch.cat([probe.prompt, probe.answer])[None]
    wanted = token_nats(model, whole)[0, -len(probe.answer) :].mean()
    assert retrieval.ask(model, [probe]).nats == pytest.approx(float(wanted), abs=1e-4)


def test_impossible_probes_are_named():
    with pytest.raises(ValueError, match="depth"):
        retrieval.needle_probe(encode, HAY, 200, 1.5)
    with pytest.raises(ValueError, match="length=40"):
        retrieval.needle_probe(encode, HAY, 40, 0.5)
    with pytest.raises(ValueError, match="haystack"):
        retrieval.needle_probe(encode, HAY[:50], 400, 0.5)
    with pytest.raises(ValueError, match="length=20"):
        retrieval.key_value_probe(encode, 20, 0.5)
    with pytest.raises(ValueError, match="at least one"):
        retrieval.ask(nn.Identity(), [])
