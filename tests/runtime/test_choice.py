"""Who wins is decided by the timers alone; here they are fake."""

from __future__ import annotations

import pytest
import torch
from fakes import build_with, clock

from aerogel.runtime.compiler import Settings
from aerogel.runtime.layer import Layer
from aerogel.runtime.native import PlanModule
from aerogel.runtime.strategies import CALLS, EAGER, PLANS, TORCH, deviation, fastest
from aerogel.runtime.timing import MIN_ROUNDS, measure, race
from aerogel.runtime.tuner import Tuner
from aerogel.runtime.tuning_cache import TuningCache
from networks import mobile_network, perceptron


def linear(sparsity: float, block: int = 1, columns: int = 16) -> Layer:
    torch.manual_seed(0)
    kept = torch.rand(32 // block, 48) >= sparsity
    weight = torch.randn(32, 48) * kept.repeat_interleave(block, 0)
    return Layer("fc", "linear", weight, None, "none", False, (columns, 48), (columns, 32))


@pytest.mark.parametrize("winner", [EAGER, TORCH, CALLS, PLANS])
def test_the_fastest_contender_is_kept(winner: str) -> None:
    compiled = build_with(mobile_network(), torch.randn(1, 3, 20, 20), whole=winner)
    assert compiled.explain().chosen == winner


def test_the_original_wins_a_tie() -> None:
    assert fastest({PLANS: 1.0, EAGER: 1.0, TORCH: 1.0}) == EAGER


def test_layers_that_torch_computes_faster_stay_in_torch() -> None:
    compiled = build_with(mobile_network(), torch.randn(1, 3, 20, 20), layer="direct/torch")
    assert CALLS not in compiled.explain().strategies
    assert {
        row.kernel
        for row in build_with(
            mobile_network(), torch.randn(1, 3, 20, 20), layer="direct/torch", whole=TORCH
        )
        .explain()
        .rows
    } == {"torch"}


def test_what_deviates_is_rejected_and_said() -> None:
    compiled = build_with(perceptron(), torch.randn(4, 24), tolerance=1e-12)
    assert compiled.explain().chosen == EAGER
    assert any("rejected" in note for note in compiled.explain().notes)


def test_what_fails_is_rejected_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(PlanModule, "run", broken)
    compiled = build_with(perceptron(), torch.randn(4, 24))
    assert compiled.explain().chosen == EAGER
    assert any("no such instruction" in note for note in compiled.explain().notes)


def test_dense_torch_is_always_measured() -> None:
    tuner = Tuner(1, TuningCache(None, {}), clock("torch"))
    tuned = tuner.tune([linear(0.9), linear(0.0)])
    assert all(each.best_direct.name == "torch" for each in tuned)
    assert all("torch" in each.direct for each in tuned)


def test_sparse_kernels_far_below_break_even_are_not_measured() -> None:
    names = {
        sparsity: Tuner(1, TuningCache(None, {}), clock("")).tune([linear(sparsity)])[0].direct
        for sparsity in (0.1, 0.6)
    }
    assert not any("spmm 1x1" in name for name in names[0.1])
    assert any("spmm 1x1" in name for name in names[0.6])


def test_widest_admissible_block_is_tried() -> None:
    tuned = Tuner(1, TuningCache(None, {}), clock("spmm")).tune([linear(0.8, block=4)])[0]
    assert tuned.best_direct.name.startswith("spmm 4x1")
    assert tuned.best_direct.sparse


def test_equal_layers_are_measured_once() -> None:
    calls = []

    def counting(contenders, seconds):  # type: ignore[no-untyped-def]
        calls.append(len(contenders))
        return clock("spmm")(contenders, seconds)

    Tuner(1, TuningCache(None, {}), counting).tune([linear(0.9), linear(0.9), linear(0.5)])
    assert len(calls) == 2


def test_equal_contenders_are_interleaved_and_slow_ones_left_out() -> None:
    order: list[str] = []

    def taking(name: str, seconds: float):  # type: ignore[no-untyped-def]
        def run() -> float:
            order.append(name)
            return seconds

        return run

    measured = race({"a": taking("a", 1.0), "b": taking("b", 9.0)}, 1e9)
    assert measured == {"a": 1.0, "b": 9.0}
    assert order[:4] == ["a", "b", "a", "b"]
    assert order.count("b") == MIN_ROUNDS + 1


def test_measure_runs_everything_even_without_budget() -> None:
    assert set(measure({"a": lambda: None, "b": lambda: None}, 0.0)) == {"a", "b"}


def test_deviation_is_relative_and_strict_about_nan() -> None:
    theirs = torch.tensor([100.0, float("nan"), float("inf")])
    assert deviation([theirs + 0.01], [theirs]) == pytest.approx(1e-4, rel=1e-2)
    assert deviation([torch.zeros(3)], [theirs]) == float("inf")
    assert deviation([theirs[:2]], [theirs]) == float("inf")
    assert deviation([theirs, 1], [theirs, 1]) == 0.0
    assert deviation([theirs[1:2].nan_to_num()], [theirs[1:2]]) == float("inf")
    assert deviation([torch.zeros(0)], [torch.zeros(0)]) == 0.0
    assert deviation([torch.full((2,), float("nan"))], [torch.ones(2)]) == float("inf")
    assert deviation([torch.tensor([1, 2])], [torch.tensor([1, 3])]) == float("inf")


def test_settings_name_no_strategy_by_default() -> None:
    assert Settings().strategy == "fastest"
