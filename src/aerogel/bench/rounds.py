"""Rounds in which contenders take turns, and what is read off them.

A round takes one sample of each contender, in an order that rotates; a sample is as many calls as
fill a few milliseconds, after one call that is not counted, which wakes the engine's threads and
fetches its weights. Reported are medians and quartiles over rounds, and for ratios the median of
the rounds' own ratios, which drift leaves alone. Before anything is timed, each contender's outputs
are compared to eager PyTorch's; wrong outputs are not ranked.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from aerogel.bench.field import Weights
from aerogel.bench.inputs import NotApplicable
from aerogel.bench.table import BenchRow

Clock = Literal["wall", "cpu"]
Progress = Callable[[str, int, int], None]

# A sample shorter than this would measure the clock and the scheduler.
SAMPLE_SECONDS = 0.01
WARM_UP_SECONDS = 0.2
TOLERANCE = 1e-3


class Runner(Protocol):
    """One contender, wherever it runs."""

    def prepare(self) -> tuple[list[Tensor], dict[str, Any]]:
        """Get ready; return the outputs of one call, and what the engine says about itself."""

    def calibrate(self, seconds: float, warm_up: float) -> int:
        """Warm up, and say how many calls fill `seconds`."""

    def sample(self, count: int) -> tuple[float, float]:
        """Wall and CPU seconds of a call, as the mean over `count` calls."""


@dataclass
class Entrant:
    """A contender's way through a comparison.

    Attributes:
        label: What the table calls it.
        engine: Which engine runs.
        weights: Which network.
        runner: How; None where the engine is not available.
        missing: Why it takes no part, or no longer.
        error: Of its outputs.
        facts: What the engine says.
        count: Calls in a sample.
        wall: Seconds a call in each round.
        cpu: The same of its process.
    """

    label: str
    engine: str
    weights: Weights
    runner: Runner | None = None
    missing: str | None = None
    error: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    count: int = 1
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def running(self) -> bool:
        """Whether it is still in the race."""
        return self.missing is None and self.runner is not None

    def attempt(self, step: Callable[[Runner], Any]) -> Any:
        """Do one step; a failure is a result, not the end of the others."""
        assert self.runner is not None
        try:
            return step(self.runner)
        except NotApplicable as reason:
            self.missing = str(reason)
        except Exception as error:
            kind = "" if type(error).__name__ == "WorkerLost" else f"{type(error).__name__}: "
            self.missing = kind + _first_line(error)
        self.wall, self.cpu = [], []
        return None


def check(
    entrant: Entrant, expected: Callable[[list[Tensor]], list[Tensor]], tolerance: float
) -> None:
    """Prepare a contender and compare its outputs.

    Args:
        entrant: One that is available.
        expected: What eager torch gives, to be compared with the outputs it is called with.
        tolerance: Largest error of outputs, relative to the largest output, that is still ranked.
    """
    found = entrant.attempt(lambda runner: runner.prepare())
    if found is None:
        return
    outputs, entrant.facts = found
    entrant.error = deviation(outputs, expected(outputs))
    if not entrant.error <= tolerance:
        entrant.missing = f"its outputs are wrong: relative error {entrant.error:.1e}"


def take(
    entrants: Sequence[Entrant], rounds: int, seconds: float, report: Callable[[str, int], None]
) -> None:
    """Take `rounds` samples of each, in turns; who fails drops out.

    Args:
        entrants: Those that were checked.
        rounds: Samples of each.
        seconds: How long a sample lasts at least.
        report: Called with what is being done and the rounds that are done.
    """
    for entrant in entrants:
        count = entrant.attempt(lambda runner: runner.calibrate(seconds, WARM_UP_SECONDS))
        entrant.count = count or 1
    order = list(entrants)
    for round_ in range(rounds):
        report(f"round {round_ + 1} of {rounds}", round_)
        for entrant in order:
            if not entrant.running:
                continue
            taken = entrant.attempt(lambda runner, n=entrant.count: runner.sample(n))  # type: ignore[misc]
            if taken is not None:
                entrant.wall.append(taken[0])
                entrant.cpu.append(taken[1])
        order = order[1:] + order[:1]


def default_baseline(entrants: Sequence[Entrant]) -> str | None:
    """Eager torch on dense weights, else on any, else whoever runs first."""
    running = [e for e in entrants if e.running]
    eager = [e for e in running if e.engine == "torch eager"]
    dense = [e for e in eager if e.weights == "dense"]
    return next((e.label for e in [*dense, *eager, *running]), None)


def row_of(entrant: Entrant, baseline: Entrant | None, clock: Clock) -> BenchRow:
    """What is read off a contender's rounds."""
    row = BenchRow(entrant.label, entrant.engine, entrant.weights, missing=entrant.missing,
                   max_error=entrant.error, facts=entrant.facts)  # fmt: skip
    taken = entrant.wall if clock == "wall" else entrant.cpu
    if not entrant.running or not taken:
        return row
    row.samples = taken
    row.low, row.median, row.high = _quartiles(taken)
    row.cpu = statistics.median(entrant.cpu) / statistics.median(entrant.wall)
    if baseline is not None and baseline.running:
        other = baseline.wall if clock == "wall" else baseline.cpu
        ratios = [b / t for b, t in zip(other, taken, strict=True)]
        row.ratio_low, row.ratio, row.ratio_high = _quartiles(ratios)
    return row


def deviation(outputs: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference, relative to the largest expected value; infinite for other shapes."""
    if [t.shape for t in outputs] != [t.shape for t in expected]:
        return math.inf
    worst = 0.0
    for got, want in zip(outputs, expected, strict=True):
        if want.numel():
            scale = want.abs().max().double().clamp_min(1e-30)
            difference = (got.double() - want.double()).abs().max() / scale
            worst = float("nan") if difference.isnan() else max(worst, difference.item())
    return worst


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:400] if lines else "no message"
