"""Compare callables fairly: interleaved rounds in one process, medians, a bounded budget."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Protocol

MIN_ROUNDS = 3
MAX_ROUNDS = 25
# Beyond the first rounds, contenders this many times slower than the leader are left out.
_HOPELESS = 3.0
# Where single calls are slow, the budget may be exceeded this far to complete the first rounds.
_OVERDRAFT = 4.0


class Measure(Protocol):
    """Times several callables against each other; tests put a fake one in its place."""

    def __call__(
        self, contenders: Mapping[str, Callable[[], object]], seconds: float
    ) -> dict[str, float]: ...


class Race(Protocol):
    """As `Measure`, for callables that return their own duration."""

    def __call__(
        self, contenders: Mapping[str, Callable[[], float]], seconds: float
    ) -> dict[str, float]: ...


def measure(contenders: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median wall time of each contender, all interleaved so that drift hits them alike.

    Args:
        contenders: Name -> callable. Each is called once beforehand, unmeasured.
        seconds: Budget for all of them together, exceeded where single calls are slow.

    Returns:
        Name -> seconds per call.
    """
    samples = _interleave({n: timed(call) for n, call in contenders.items()}, seconds)
    return {name: statistics.median(taken) for name, taken in samples.items()}


def race(contenders: Mapping[str, Callable[[], float]], seconds: float) -> dict[str, float]:
    """Compare many short kernels that time themselves: the lower quartile of each.

    Other work on the machine only ever adds time, and a median of a few short samples would
    choose among twenty variants by luck.
    """
    samples = _interleave(contenders, seconds)
    return {name: sorted(taken)[len(taken) // 4] for name, taken in samples.items()}


def _interleave(
    contenders: Mapping[str, Callable[[], float]], seconds: float
) -> dict[str, list[float]]:
    started = perf_counter()
    for call in contenders.values():
        call()
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    racing = list(contenders)
    for round_ in range(MAX_ROUNDS):
        spent = perf_counter() - started
        allowed = seconds if round_ >= MIN_ROUNDS else _OVERDRAFT * seconds
        if round_ > 0 and spent > allowed:
            break
        for name in racing:
            samples[name].append(contenders[name]())
        if round_ == MIN_ROUNDS - 1:
            best = {name: min(taken) for name, taken in samples.items()}
            limit = _HOPELESS * min(best.values(), default=0.0)
            racing = [name for name in racing if best[name] <= limit]
    return samples


def timed(call: Callable[[], object]) -> Callable[[], float]:
    """A callable that returns how long the given one takes."""

    def run() -> float:
        begin = perf_counter()
        call()
        return perf_counter() - begin

    return run
