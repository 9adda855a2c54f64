from __future__ import annotations

import json
from pathlib import Path

import pytest

from aerogel.runtime.tuning_cache import TuningCache, default_path, environment


def written(path: Path, **kwargs: float) -> TuningCache:
    cache = TuningCache(path, {"threads": 1})
    cache.put(cache.key("layer"), kwargs or {"a": 1.0, "b": 2.0})
    cache.flush()
    return cache


def test_measurements_survive_the_process(tmp_path: Path) -> None:
    written(tmp_path / "tuning.json")
    again = TuningCache(tmp_path / "tuning.json", {"threads": 1})
    assert again.get(again.key("layer"), ["b", "a"]) == {"b": 2.0, "a": 1.0}


def test_another_environment_or_candidate_is_measured_anew(tmp_path: Path) -> None:
    written(tmp_path / "tuning.json")
    other = TuningCache(tmp_path / "tuning.json", {"threads": 2})
    assert other.get(other.key("layer"), ["a"]) is None
    same = TuningCache(tmp_path / "tuning.json", {"threads": 1})
    assert same.get(same.key("layer"), ["a", "c"]) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"format": 99, "entries": {}}',
        b'{"format": 1, "entries": [1]}',
        b'{"format": 1, "entries": {"k": {"a": "quick"}}}',
        b'{"format": 1, "entries": {"k": {"a": -1.0}}}',
    ],
)
def test_a_corrupted_file_is_ignored_and_replaced(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tuning.json"
    path.write_bytes(content)
    assert TuningCache(path, {}).get("k", ["a"]) is None
    written(path)
    assert json.loads(path.read_text())["entries"]


def test_two_processes_keep_what_both_measured(tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    first, second = TuningCache(path, {}), TuningCache(path, {})
    first.put(first.key("one"), {"a": 1.0})
    second.put(second.key("two"), {"a": 2.0})
    first.flush()
    second.flush()
    assert len(json.loads(path.read_text())["entries"]) == 2
    assert [each.name for each in tmp_path.iterdir()] == ["tuning.json"]


def test_an_unwritable_place_is_no_error(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    written(blocker / "below" / "tuning.json")


def test_the_place_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AEROGEL_CACHE", "/somewhere")
    assert default_path() == Path("/somewhere/tuning.json")
    monkeypatch.delenv("AEROGEL_CACHE")
    assert default_path().parts[-3:] == (".cache", "aerogel", "tuning.json")


def test_measurements_depend_on_versions_cpu_and_threads() -> None:
    assert set(environment(2, "avx2")) == {"aerogel", "torch", "cpu", "isa", "threads"}
