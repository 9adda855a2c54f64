"""Threads that have stopped to help are left alone, and asked again, for next to nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from aerogel import kernels
from aerogel.kernels import plan as plans
from aerogel.kernels.pace import Pace

Seconds = Callable[[int], tuple[float, float]]  # call number -> what either way would take


def play(pace: Pace, seconds: Seconds, calls: range) -> tuple[list[bool], float]:
    """Which calls ran the second way, and the time of all of them."""
    others, total = [], 0.0
    for call in calls:
        other = pace.other
        taken = seconds(call)[other]
        if not pace.resting():
            pace.took(other, taken)
        others.append(other)
        total += taken
    return others, total


def test_the_faster_way_stays_and_asking_costs_half_a_percent() -> None:
    for slower in (1.0, 1.2, 1.9, 8.0):
        others, total = play(Pace(), lambda _, s=slower: (1.0, s), range(20_000))
        assert total <= 1.006 * 20_000
        assert 0 < sum(others) <= 2000


def test_a_way_that_has_become_slower_is_left_soon_and_taken_again_later() -> None:
    pace = Pace()
    play(pace, lambda _: (1.0, 1.8), range(5000))
    others, total = play(pace, lambda _: (5.0, 1.8), range(5000))
    assert others.index(True) < 200
    assert all(others[200:400])
    assert total < 1.1 * 1.8 * 5000
    others, _ = play(pace, lambda _: (1.0, 1.8), range(5000))
    assert not any(others[-20:])


def test_one_slow_moment_decides_nothing() -> None:
    pace = Pace()
    others, _ = play(pace, lambda call: (9.0 if 2000 <= call < 2030 else 1.0, 1.8), range(9000))
    longest = max(len(run) for run in "".join("x" if o else " " for o in others).split())
    assert longest == 3  # bursts only


def test_a_call_that_overlapped_a_change_of_way_is_not_taken_for_the_other() -> None:
    pace = Pace()
    while not pace.other:
        pace.took(False, 1.0)
    pace.took(False, 100.0)  # began before the burst
    assert pace.other
    for _ in range(3):
        pace.took(True, 1.9)
    assert not pace.other


def test_most_calls_need_no_clock() -> None:
    pace, timed = Pace(), 0
    for _ in range(10_000):
        if pace.resting():
            assert not pace.other
            continue
        timed += 1
        pace.took(pace.other, 1.0)
    assert timed < 2000


@pytest.mark.skipif(not kernels.native_available(), reason="the native kernels are not built")
def test_a_plan_leaves_threads_that_have_become_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = kernels.PlanBuilder(threads=2)
    builder.output(builder.linear(builder.input((5,)), torch.ones(3, 5)))
    plan = builder.build()
    clock, used = [0.0], []

    class Native:
        def run(self, inputs: object, outputs: object, threads: int, together: bool) -> None:
            used.append(threads)
            clock[0] += {1: 1.0, 2: 3.0}[threads]

    monkeypatch.setattr(plan, "_native_plan", Native)
    monkeypatch.setattr(plans, "perf_counter", lambda: clock[0])
    for _ in range(300):
        plan.run([torch.ones(1, 5)])
    assert set(used) == {2}
    plan.adapt()
    for _ in range(1000):
        plan.run([torch.ones(1, 5)])
    assert set(used[-200:]) == {1}
    plan.threads = 1
    plan.run([torch.ones(1, 5)])
    assert used[-1] == 1
