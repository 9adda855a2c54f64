"""`results.json` keeps its shape, takes what the other rooms give, and says what is wrong."""

from __future__ import annotations

import json
import math

import pytest
import samples
from pydantic import ValidationError

from aerogel.bench import BenchRow, BenchTable
from aerogel.report import Curve, Latency, Layer, Results


def test_results_survive_a_file(tmp_path) -> None:
    results = Results.model_validate(samples.results())
    (tmp_path / "results.json").write_text(json.dumps(results.to_dict()))
    assert Results.from_file(tmp_path / "results.json") == results


def test_a_bench_table_is_a_latency() -> None:
    row = BenchRow("e (dense)", "e", median=1.0, low=0.9, high=1.1, ratio=1.0, samples=[1.0])
    gone = BenchRow("x (dense)", "x", missing="not installed")
    table = BenchTable(2, 1, 5, "e (dense)", [row, gone])
    latency = Latency.model_validate(table.to_dict())
    assert latency.model_dump() == table.to_dict()
    assert latency.fastest().label == "e (dense)"


def test_a_row_of_explain_is_a_layer() -> None:
    layer = Layer.model_validate(samples.layers()[1])
    assert layer.name == "features.1.pointwise.convolution"
    assert (layer.type, layer.shape) == ("conv2d", "64 × 64 × 1 × 1")


def test_nan_and_infinity_become_nothing() -> None:
    results = Results(title="t")
    results.curves = [Curve(name="loss", steps=[0, 1, 2], values=[1.0, math.nan, math.inf])]
    text = json.dumps(results.to_dict(), allow_nan=False)
    assert json.loads(text)["curves"][0]["values"] == [1.0, None, None]


def test_unknown_fields_of_a_newer_writer_are_ignored() -> None:
    assert Results.model_validate({"title": "t", "novelty": 1}).title == "t"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"title": None}, "title"),
        ({"schema_version": 99}, "schema_version is 99"),
        ({"curves": [{"name": "loss", "steps": [1], "values": []}]}, "1 steps but 0 values"),
        ({"latency": [{"threads": 0}]}, "threads"),
        ({"size": {"dense_bytes": -1}}, "dense_bytes"),
    ],
)
def test_what_is_wrong_is_named(change, match) -> None:
    with pytest.raises(ValidationError, match=match):
        Results.model_validate({**samples.results(), **change})


@pytest.mark.parametrize("text", ["", "{", "\x00", "[" * 100_000])
def test_a_file_that_is_no_json_is_named(tmp_path, text) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=r"results\.json"):
        Results.from_file(tmp_path / "results.json")


@pytest.mark.parametrize(
    ("size", "sparsity"),
    [
        ({"prunable": 100, "prunable_nonzero": 10, "parameters": 200, "nonzero": 110}, 0.9),
        ({"parameters": 200, "nonzero": 50}, 0.75),
        ({"prunable": 0, "prunable_nonzero": 0}, None),
        ({}, None),
    ],
)
def test_sparsity_is_that_of_what_could_be_pruned(size, sparsity) -> None:
    found = Results.model_validate({"title": "t", "size": size}).size.sparsity
    assert found == (None if sparsity is None else pytest.approx(sparsity))
