"""Sequences for recall: what repeats repeats exactly, and draws follow their seed alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aerogel.data import recall
from aerogel.data.source_text import load_source_text


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(seed=st.integers(0, 999), low=st.integers(1, 20), more=st.integers(0, 20))
@settings(max_examples=25, deadline=None)
def test_symbols_repeat_with_their_period(seed, low, more):
    ids, repeated = recall.repeat_symbols(3, 64, (low, low + more), drawn(seed))
    for row, later in zip(ids, repeated, strict=True):
        period = int((~later).sum())
        assert low <= period <= low + more
        assert torch.equal(row[period:], row[:-period])
    assert recall.FIRST_SYMBOL <= int(ids.min()) <= int(ids.max()) <= recall.LAST_SYMBOL


@given(seed=st.integers(0, 999), size=st.integers(1, 32))
@settings(max_examples=25, deadline=None)
def test_the_end_repeats_a_passage_from_before(seed, size):
    before = torch.arange(64).repeat(2, 1)
    ids, repeated = recall.repeat_passage(before, (1, size), drawn(seed))
    assert torch.equal(ids[~repeated], before[~repeated])
    for row, later in zip(ids, repeated, strict=True):
        passage = row[later]
        first, count = int(passage[0]), len(passage)
        assert 1 <= count <= size
        assert torch.equal(passage, torch.arange(first, first + count))
        assert first + count <= 64 - count


def test_batches_follow_the_seed():
    text = torch.arange(1000) % 251
    first, second = (recall.draw_windows(text, 4, 32, drawn(7)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first.diff(dim=1) % 251, torch.ones(4, 31, dtype=torch.int64))


def test_windows_reach_both_ends_of_the_text():
    text = torch.arange(5)
    starts = recall.draw_windows(text, 200, 4, drawn(0))[:, 0]
    assert set(starts.tolist()) == {0, 1}


def test_weights_stand_where_they_belong():
    ids, repeated = recall.repeat_symbols(2, 16, (4, 6), drawn(0))
    batch = recall.joined(
        [recall.weigh(ids, repeated, 2.0, 0.1), recall.weigh(ids, None, 9.0, 1.0)]
    )
    assert batch.ids.shape == batch.weights.shape == (4, 16)
    assert set(batch.weights[:2][repeated].tolist()) == {2.0}
    assert set(batch.weights[2:].flatten().tolist()) == {1.0}


@pytest.mark.parametrize("bad", [(0, 4), (5, 4), (4, 33)])
def test_impossible_sizes_are_named(bad):
    with pytest.raises(ValueError, match="passage="):
        recall.repeat_passage(torch.zeros(1, 64, dtype=torch.int64), bad)


def test_text_shorter_than_a_window_is_an_error():
    with pytest.raises(ValueError, match="3 tokens"):
        recall.draw_windows(torch.arange(3), 1, 4)


def test_source_text_leaves_tests_out_and_holds_the_end_back(tmp_path: Path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "a.py").write_text("SECRET")
    (tmp_path / "b.py").write_text("x = 1\n" * 200_000)
    text = load_source_text(tmp_path)
    whole = bytes(torch.cat([text.train, text.held_out]).tolist())
    assert b"SECRET" not in whole
    assert whole.endswith(b"x = 1\n")
    assert len(text.held_out) == pytest.approx(0.05 * len(whole), abs=1)
    assert text.sha256 == load_source_text(tmp_path).sha256
    with pytest.raises(ValueError, match="Python source"):
        load_source_text(tmp_path / "nothing")
