"""Training state: what goes in comes out, and a damaged file is an error, not a surprise."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aerogel.train.state import FILE, load_state, random_seed, save_state

plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
keys = st.text() | st.integers()
nested = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.text(), nested, max_size=4))
def test_plain_values_survive(state):
    with TemporaryDirectory() as folder:
        save_state(Path(folder), state)
        again = load_state(Path(folder))
    assert again == state
    assert repr(again) == repr(state)


def test_tensors_of_all_kinds_survive(tmp_path: Path):
    shared = torch.randn(3, 4)
    state = {
        "views": [shared, shared.T, shared[0]],
        "scalar": torch.tensor(3),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 2),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "wide": torch.tensor([2**62]),
        3: {"step": torch.tensor(1.5, dtype=torch.float64)},
    }
    save_state(tmp_path, state)
    again = load_state(tmp_path)
    for key in ("scalar", "mask", "empty", "half", "wide"):
        assert torch.equal(again[key], state[key])
        assert again[key].dtype == state[key].dtype
    assert all(torch.equal(a, b) for a, b in zip(again["views"], state["views"], strict=True))
    assert torch.equal(again[3]["step"], state[3]["step"])


def test_there_is_no_state_at_first(tmp_path: Path):
    assert load_state(tmp_path) is None
    assert load_state(tmp_path / "nowhere") is None


def test_a_failed_write_keeps_the_older_state(tmp_path: Path, monkeypatch):
    save_state(tmp_path, {"step": 1})

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_state(tmp_path, {"step": 2})
    assert load_state(tmp_path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == [FILE]


def test_leftovers_of_a_kill_are_swept(tmp_path: Path):
    save_state(tmp_path, {"step": 1})
    (tmp_path / f".{FILE}-abc").write_bytes(b"half")
    assert load_state(tmp_path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_a_damaged_state_says_what_to_do(tmp_path: Path, keep: int):
    save_state(tmp_path, {"w": torch.ones(9)})
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="remove it to start"):
        load_state(tmp_path)


def test_what_cannot_be_stored_is_named(tmp_path: Path):
    with pytest.raises(TypeError, match="/a/1: object"):
        save_state(tmp_path, {"a": [1, object()]})


def test_steps_and_ranks_have_their_own_seeds():
    seeds = {
        random_seed(seed, step, rank)
        for seed in range(5)
        for step in range(50)
        for rank in range(-1, 4)
    }
    assert len(seeds) == 5 * 50 * 5
    assert all(0 <= seed < 2**63 for seed in seeds)
