"""Benchmark results: fair turns, floors that are checked, and pages that nobody types."""

from __future__ import annotations

import collections
import dataclasses
import importlib
import json
import math
import time
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from aerogel import kernels

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ROOF = kernels.Roofline(1, "generic", 100.0, 200.0, 100.0, 50.0, 20.0)


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module as the scripts see it, with ceilings that take no time to measure."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import harness

    monkeypatch.setattr(harness.kernels, "roofline", lambda threads: ROOF)
    return harness


def run(harness: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str, value: float = 3.0):
    """A benchmark of one row, as its script would run."""
    monkeypatch.setattr("sys.argv", ["benchmarks/tiny.py", *arguments])

    def measure(setup: Any) -> Any:
        columns = (harness.Column("layer", "layer"), harness.Column("us", "us", ".1f"))
        rows = [{"layer": "a|b", "us": 12.34}]
        figure = harness.Figure("90% zeros", value, "x dense", floor=2.0, aim=4.0, limit=6.5)
        lines = {"a <b>": [(1, 10.0), (10, 95.0), (100, 1000.0)]}
        panel = {"title": "cost", "x": "work", "y": "us", "lines": lines}
        return harness.Findings(columns, rows, [figure], ["A remark."], [panel])

    return harness.run("Tiny: one layer.\n\nMore.", measure)


def test_a_contest_takes_turns_and_keeps_the_fastest_variant(harness) -> None:
    order: list[str] = []

    def call(name: str, seconds: float):
        return lambda: (order.append(name), time.sleep(seconds))

    contest = harness.Contest(
        {"dense": call("dense", 0.004)}, {(1,): call("slow", 0.003), (2,): call("fast", 0.001)}
    )
    contest.sweep(harness.Timer(2, 1e-9), 3)
    contest.sweep(harness.Timer(2, 1e-9), 3)
    assert contest.variant == (2,)
    assert {name: len(taken) for name, taken in contest.times.items()} == {"dense": 6, "ours": 6}
    assert order[-4:] == ["dense", "dense", "fast", "fast"]  # one call uncounted, one counted
    assert contest.times_faster("dense") > 1
    assert contest.fastest(["dense", "ours"]) == "ours"


def test_a_slower_machine_half_way_does_not_change_the_ratio(harness) -> None:
    assert harness.ratio([1.0, 2.0, 3.0, 6.0], [0.5, 1.0, 1.5, 3.0]) == 2.0


@pytest.mark.parametrize(
    ("value", "arguments", "code"),
    [
        (3.0, ["--check"], 0),
        (1.9, ["--check"], 1),
        (math.nan, ["--check"], 1),
        (1.9, [], 0),
        (1.9, ["--check", "--threads", "2"], 0),  # floors are promises of one thread
    ],
)
def test_check_fails_below_a_floor(harness, monkeypatch, capsys, value, arguments, code) -> None:
    assert run(harness, monkeypatch, *arguments, value=value) == code
    said = capsys.readouterr().err
    assert ("out of bounds: 90% zeros" in said) == (not value >= 2 and "2" not in arguments)


def test_saved_results_make_pages_and_replace_only_their_own_kind(
    harness, monkeypatch, tmp_path, capsys
) -> None:
    for arguments, value in (([], 3.0), (["--threads", "2"], 4.0), (["--threads=1"], 5.0)):
        run(harness, monkeypatch, *arguments, "--save", str(tmp_path), value=value)
    records = json.loads((tmp_path / "tiny.json").read_text())
    assert [(r["threads"], r["figures"][0]["value"]) for r in records] == [(1, 5.0), (2, 4.0)]
    assert [r["figures"][0]["floor"] for r in records] == [2.0, None]
    assert records[0]["command"] == "python benchmarks/tiny.py"
    assert records[1]["command"] == "python benchmarks/tiny.py --threads 2"
    for key in ("commit", "date", "isa", "versions", "machine", "ceilings"):
        assert records[0][key]
    page = (tmp_path / "tiny.md").read_text()
    assert page.startswith("# Tiny: one layer\n")
    for part in ("| a\\|b | 12.3 |", "| 90% zeros | 5 | x dense | 2 | 4 | 6.5 |", "100 GFLOP/s",
                 "A remark.", "2 threads"):  # fmt: skip
        assert part in page
    assert "![cost](tiny-2.svg)" in page
    drawn = ElementTree.fromstring((tmp_path / "tiny-1.svg").read_text())
    assert "a <b>" in [element.text for element in drawn.iter() if element.text]
    assert "[tiny](tiny.md) | 90% zeros | 5 |" in (tmp_path / "README.md").read_text()
    assert capsys.readouterr().out.count("A remark.") == 3


def test_growth_is_read_off_the_points(harness, monkeypatch) -> None:
    import scaling

    assert scaling.fit([(n, 3.0 * n) for n in (1, 2, 5, 10)]) == pytest.approx((1, 1, 0))
    exponent, r2, fixed = scaling.fit([(n, 5.0 + n) for n in (1, 2, 5, 10)])
    assert exponent < 0.5
    assert (r2, fixed) == pytest.approx((1, 1 / 3))
    exponent, r2, _ = scaling.fit([(n, float(n) ** 2) for n in (1, 2, 5, 10)])
    assert exponent == pytest.approx(2)
    assert r2 < 0.98


def test_what_must_not_grow_has_an_upper_bound(harness) -> None:
    assert harness.Figure("a", 1.2, "exponent", most=1.1).missed
    assert not harness.Figure("a", 0.9, "exponent", most=1.1).missed
    assert harness.Figure("a", math.nan, "exponent", most=1.1).missed


def test_json_is_all_there_is_on_stdout(harness, monkeypatch, capsys) -> None:
    run(harness, monkeypatch, "--json")
    assert json.loads(capsys.readouterr().out)["rows"] == [{"layer": "a|b", "us": 12.34}]


def test_quick_results_are_not_kept(harness, monkeypatch, tmp_path) -> None:
    with pytest.raises(SystemExit):
        run(harness, monkeypatch, "--quick", "--save", str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_committed_pages_are_those_of_the_committed_results(harness, tmp_path) -> None:
    import pages

    for path in pages.FOLDER.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    pages.write_pages(tmp_path)
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_text() for path in pages.FOLDER.glob("*.*")}
    assert drawn == kept or not kept


def test_the_limit_against_deepsparse_is_a_sum_over_layers(harness, monkeypatch) -> None:
    peers = importlib.import_module("peers")
    conv, dense = nn.Conv2d(4, 2, 1, bias=False), nn.Linear(100, 100)
    half = nn.Linear(100, 100, bias=False)
    with torch.no_grad():
        for layer in (conv, half):
            layer.weight.view(-1)[::2] = 0.0
    roof = dataclasses.replace(ROOF, load_gbps_l1=100.0)

    def limits(layer: nn.Module, *shape: int) -> dict[str, float]:
        found = peers.layer_limits(layer, peers.bench.Inputs.of(torch.randn(1, *shape)), 10, roof)
        return {name: 1e9 * seconds for name, seconds in found.items()}

    monkeypatch.setattr(peers, "second_cache_bytes", lambda: 1 << 20)
    assert limits(dense, 100) == pytest.approx({"multiply-adds": 2 * 1e4 * 10 / 100})
    assert limits(half, 100) == pytest.approx({"loads": 4 * 5e3 * 10 / 100})
    assert limits(conv, 4, 3, 3) == pytest.approx({"the second cache": 10 * 4 * 54 / 100})
    monkeypatch.setattr(peers, "second_cache_bytes", lambda: 16)
    far = 4 * 4 + 10 * (4 * 54 - 16)
    assert limits(conv, 4, 3, 3) == pytest.approx({"the last cache": far / 50})

    seconds = collections.Counter({"loads": 1e-3, "multiply-adds": 1e-3})
    assert "2.00 ms at least" in peers.said("tiny", seconds, 1.5, (2.3, 3.2))
    assert "out of reach" in peers.said("tiny", seconds, 1.5, (2.3, 3.2))
    assert "out of reach" not in peers.said("tiny", seconds, 3.0, (2.3, 3.2))
