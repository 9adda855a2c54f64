"""What every benchmark here shares: calls that take turns, the machine's ceilings, and the results.

A benchmark says which calls compete, what a row of its table holds, and which figures it exists to
find. `run` gives it options, a timer and the ceilings; prints a table or JSON; and, with --check,
fails below a floor. With --save the result goes into docs/benchmarks (see pages.py).

Fair by construction: everything is timed in one process, in turns, round by round. A call that is
not timed goes before each sample and brings the call's own data back into the caches; a ratio is
taken in every round, and the median of the ratios counts. The rounds of one contest are spread over
several sweeps of all contests, because a shared machine can be slow for seconds. One thread is
timed by its CPU time (a busy machine then costs cache, not seconds), several by the wall clock.
Freed memory stays in the process, so that nobody's output costs page faults.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import pages
from aerogel import kernels
from aerogel.train.allocator import keep_freed_memory

Call = Callable[[], Any]

SAMPLE_SECONDS = 1e-3
OURS = "ours"

# Where our kernels are held to AVX2, torch is, too. Its libraries ask at their first call, so that
# this is in time; ONNX Runtime has no such switch.
HELD = kernels.isa() == "avx2"
if HELD:
    os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx2")
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")
    os.environ.setdefault("MKL_ENABLE_INSTRUCTIONS", "AVX2")


class Timer:
    """Times short calls, repeated so that the clock's own cost vanishes.

    Args:
        threads: One is timed by its own CPU time, several by the wall clock.
        seconds: How long one sample lasts at least.
    """

    def __init__(self, threads: int, seconds: float = SAMPLE_SECONDS) -> None:
        self.clock = time.thread_time if threads == 1 else time.perf_counter
        self._seconds = seconds

    def repeats(self, call: Call) -> int:
        """How many calls fill a sample."""
        once = min(self.time(call, 1) for _ in range(3))
        return max(1, round(self._seconds / max(once, 1e-7)))

    def time(self, call: Call, repeats: int) -> float:
        """Seconds per call."""
        begin = self.clock()
        for _ in range(repeats):
            call()
        return (self.clock() - begin) / repeats

    def rounds(self, calls: Mapping[Any, Call], rounds: int) -> dict[Any, list[float]]:
        """Seconds per call, one entry a round, all calls taking turns."""
        repeats = {name: self.repeats(call) for name, call in calls.items()}
        times: dict[Any, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                call()  # not timed
                times[name].append(self.time(call, repeats[name]))
        return times


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """How many times faster `fast` was: the median of the rounds' own ratios."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


class Contest:
    """Calls that take turns, their times gathered sweep by sweep.

    Args:
        calls: The peers, by name; also "ours", unless there are `variants`.
        variants: Our own call by variant. The fastest is found in the first sweep, in rounds of its
            own, and takes part as "ours" from then on.
    """

    def __init__(
        self, calls: Mapping[str, Call], variants: Mapping[tuple[int, ...], Call] | None = None
    ) -> None:
        self.calls = dict(calls)
        self.variant: tuple[int, ...] = ()
        self._variants = variants
        self.times: dict[str, list[float]] = {}

    def sweep(self, timer: Timer, rounds: int) -> None:
        """Take `rounds` more samples of every call."""
        if self._variants:
            tuning = timer.rounds(self._variants, max(3, rounds))
            self.variant = min(tuning, key=lambda v: statistics.median(tuning[v]))
            self.calls[OURS] = self._variants[self.variant]
            self._variants = None
        for name, seconds in timer.rounds(self.calls, rounds).items():
            self.times.setdefault(name, []).extend(seconds)

    def seconds(self, name: str = OURS) -> float:
        """The median of a call's rounds."""
        return statistics.median(self.times[name])

    def fastest(self, names: Iterable[str]) -> str:
        """Which of these calls has the smallest median."""
        return min(names, key=self.seconds)

    def times_faster(self, than: str) -> float:
        """How many times faster ours is: the median of the rounds' own ratios."""
        return ratio(self.times[than], self.times[OURS])


def hold(contests: Sequence[Contest], setup: Setup) -> None:
    """Let every contest take its rounds, sweep by sweep over all of them."""
    for _ in range(setup.sweeps):
        for contest in contests:
            contest.sweep(setup.timer, setup.rounds)


@dataclass(frozen=True)
class Setup:
    """What a benchmark is to do.

    Attributes:
        options: All options as parsed.
        threads: Of everybody.
        rounds: Of one sweep.
        sweeps: Over all contests.
        quick: Only the most telling rows.
        timer: For everything that is timed.
        roof: The machine's ceilings, measured in this process.
    """

    options: argparse.Namespace
    threads: int
    rounds: int
    sweeps: int
    quick: bool
    timer: Timer
    roof: kernels.Roofline


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        key: The field of a row that it shows.
        head: What stands above it.
        form: Format specification of a number, e.g. ".2f" or ".0%".
    """

    key: str
    head: str
    form: str = ""


@dataclass(frozen=True)
class Figure:
    """A number that the benchmark exists to find.

    Attributes:
        name: What was compared, e.g. "1x1, 90 % in 4x1 blocks (geometric mean)".
        value: What was measured.
        unit: What the value counts, e.g. "x the fastest dense call of torch".
        floor: What must be reached; none if there is no such promise.
        aim: Where it should be.
        most: What it must not exceed.
        threads: How many the promise is for.
        limit: What it would be if ours ran at the ceilings that were measured in the same run.
    """

    name: str
    value: float
    unit: str
    floor: float | None = None
    aim: float | None = None
    most: float | None = None
    threads: int = 1
    limit: float | None = None

    @property
    def missed(self) -> bool:
        """Whether it is out of its bounds, or not a number where it has some."""
        low = self.floor is not None and not self.value >= self.floor
        return low or (self.most is not None and not self.value <= self.most)


@dataclass(frozen=True)
class Findings:
    """What a benchmark found.

    Attributes:
        columns: Of the table.
        rows: Dataclasses or dicts with plain JSON values.
        figures: The numbers that count.
        notes: Sentences a reader needs to judge them.
        plots: Panels as `plot.svg` takes them.
    """

    columns: Sequence[Column]
    rows: Sequence[Any]
    figures: Sequence[Figure] = ()
    notes: Sequence[str] = ()
    plots: Sequence[Mapping[str, Any]] = ()


def run(
    doc: str,
    measure: Callable[[Setup], Findings],
    *,
    rounds: int = 5,
    quick_rounds: int = 5,
    sweeps: int = 3,
    sample_seconds: float = SAMPLE_SECONDS,
    options: Callable[[argparse.ArgumentParser], None] | None = None,
) -> int:
    """The main function of a benchmark.

    Args:
        doc: The script's docstring; its first line is the benchmark's title.
        measure: Does the work.
        rounds: Of one sweep, unless --rounds says otherwise.
        quick_rounds: The same with --quick.
        sweeps: Over all contests, unless --sweeps says otherwise.
        sample_seconds: How long one sample lasts at least.
        options: Adds the script's own options.

    Returns:
        The exit code: 1 with --check if a figure is below its floor.
    """
    parsed = _parse(doc, sweeps, options)
    chosen = parsed.rounds or (quick_rounds if parsed.quick else rounds)
    torch.set_num_threads(parsed.threads)
    torch.manual_seed(0)
    keep_freed_memory()
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    setup = Setup(
        options=parsed,
        threads=parsed.threads,
        rounds=chosen,
        sweeps=parsed.sweeps,
        quick=parsed.quick,
        timer=Timer(parsed.threads, sample_seconds),
        roof=kernels.roofline(parsed.threads),
    )
    record = _record(doc, measure(setup), setup)
    print(json.dumps(record, indent=2) if parsed.json else pages.as_text(record))
    if parsed.save:
        pages.save(record, Path(parsed.save))
    below = [f for f in record["figures"] if f["missed"]]
    for figure in below:
        print(f"out of bounds: {pages.figure_text(figure)}", file=sys.stderr)
    return 1 if below and parsed.check else 0


def _parse(
    doc: str, sweeps: int, options: Callable[[argparse.ArgumentParser], None] | None
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=None, help="samples of each call in a sweep")
    parser.add_argument("--sweeps", type=int, default=sweeps, help="over all rows")
    parser.add_argument("--quick", action="store_true", help="the most telling rows only")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--check", action="store_true", help="exit 1 below a floor")
    parser.add_argument(
        "--save",
        nargs="?",
        const=str(pages.FOLDER),
        metavar="DIR",
        help="keep the result and redo the pages, in docs/benchmarks unless DIR is given",
    )
    if options is not None:
        options(parser)
    parsed = parser.parse_args()
    if parsed.save and parsed.quick:
        parser.error("--save keeps whole results only; leave out --quick")
    return parsed


def _record(doc: str, findings: Findings, setup: Setup) -> dict[str, Any]:
    """All that the page says, as JSON values."""
    held = ["torch, its oneDNN and its MKL were held to AVX2 as our kernels were."] if HELD else []
    figures = []
    for figure in findings.figures:
        if setup.threads != figure.threads:
            figure = dataclasses.replace(figure, floor=None, aim=None, most=None)
        figures.append({**dataclasses.asdict(figure), "missed": figure.missed})
    return {
        "benchmark": Path(sys.argv[0]).stem,
        "title": doc.splitlines()[0],
        "command": _command(setup.threads),
        **pages.provenance(),
        "threads": setup.threads,
        "rounds": setup.rounds * setup.sweeps,
        "ceilings": dataclasses.asdict(setup.roof),
        "columns": [dataclasses.asdict(column) for column in findings.columns],
        "rows": [_plain(row) for row in findings.rows],
        "figures": figures,
        "notes": [*held, *findings.notes],
        "plots": list(findings.plots),
    }


def _plain(row: Any) -> dict[str, Any]:
    return dict(row) if isinstance(row, Mapping) else dataclasses.asdict(row)


# Options with a value that say where, not what; threads are told by themselves.
_ELSEWHERE = ("--save", "--threads", "--networks")


def _command(threads: int) -> str:
    """What a reader types to repeat this; the same for the same work, so that it is kept once."""
    chosen = os.environ.get("AEROGEL_ISA")
    arguments, skip = [], False
    for argument in sys.argv[1:]:
        if skip and not argument.startswith("-"):
            skip = False
            continue
        skip = argument in _ELSEWHERE
        named = argument.partition("=")[0]
        if not skip and named not in (*_ELSEWHERE, "--json", "--check"):
            arguments.append(argument)
    if threads != 1:
        arguments += ["--threads", str(threads)]
    script = f"benchmarks/{Path(sys.argv[0]).name}"
    prefix = [f"AEROGEL_ISA={chosen}"] if chosen else []
    return " ".join([*prefix, "python", script, *map(shlex.quote, arguments)])
