"""Compare engines so that the ratios mean something.

All contenders live in one process and are timed in interleaved rounds, so that a machine that
slows down slows all of them. A round takes one sample of each, in an order that rotates; a sample
is as many calls as fill a few milliseconds, after one call that is not counted, which wakes the
engine's threads and fetches its weights. Reported are medians and quartiles over rounds, and for
ratios the median of the rounds' own ratios, which drift leaves alone. Before anything is timed,
each contender's outputs are compared to eager PyTorch's; wrong outputs are not ranked.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aerogel.bench.engines import (
    DENSE_ENGINES,
    Aerogel,
    Call,
    Engine,
    Example,
    Inputs,
    NotApplicable,
    TorchEager,
    Workspace,
    output_tensors,
    plain_copy,
)
from aerogel.bench.table import BenchRow, BenchTable

Weights = Literal["dense", "sparse"]

# A sample shorter than this would measure the clock and the scheduler.
SAMPLE_SECONDS = 0.01
WARM_UP_SECONDS = 0.2
MAX_CALLS = 10_000
# Idle OpenMP threads of the previous engine spin for about a millisecond before they sleep.
SETTLE_SECONDS = 0.002
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Contender:
    """One engine with one network's weights."""

    engine: Engine
    model: nn.Module
    weights: Weights = "dense"

    @property
    def label(self) -> str:
        """What the table calls it."""
        return f"{self.engine.name} ({self.weights})"


def lineup(
    dense: nn.Module | None = None,
    sparse: nn.Module | None = None,
    *,
    engines: Sequence[Engine] = DENSE_ENGINES,
    sparse_engines: Sequence[Engine] = (TorchEager(), Aerogel()),
) -> list[Contender]:
    """The usual field: dense weights on every engine, sparse weights on aerogel.

    Args:
        dense: The network before pruning.
        sparse: The network after pruning, masks on or baked.
        engines: Those that run the dense weights.
        sparse_engines: Those that run the sparse weights. Eager torch is among them by default,
            to show what zeros alone buy.

    Returns:
        Contenders, in the order in which the table lists them.
    """
    field = [Contender(e, dense, "dense") for e in engines] if dense is not None else []
    if sparse is not None:
        field += [Contender(e, sparse, "sparse") for e in sparse_engines]
    return field


def compare(
    entries: Sequence[Contender] | Mapping[str, Contender | nn.Module | Callable[..., Any]],
    example_inputs: Example,
    *,
    threads: int | None = None,
    rounds: int = 20,
    baseline: str | None = None,
    tolerance: float = TOLERANCE,
    sample_seconds: float = SAMPLE_SECONDS,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> BenchTable:
    """Time contenders against each other on one input.

    Args:
        entries: Contenders, e.g. from `lineup`; or label -> contender, module (run eagerly) or
            any callable that takes the example inputs.
        example_inputs: A tensor, a sequence of arguments, or a mapping of keyword arguments.
        threads: For every engine alike; default `torch.get_num_threads()`.
        rounds: Samples of each contender, at least 3.
        baseline: Label the ratios refer to; default the first eager torch on dense weights.
        tolerance: Largest error of outputs, relative to the largest output, that is still ranked.
        sample_seconds: How long one sample lasts at least.
        on_progress: Called with what is being done, steps done, and steps in all.

    Returns:
        A row for every entry; those that could not run say why.

    Raises:
        ValueError: An argument is out of range, or `baseline` is not among the entries.
    """
    threads = threads if threads is not None else torch.get_num_threads()
    if threads < 1 or rounds < 3 or sample_seconds <= 0:
        raise ValueError(
            f"threads={threads} and rounds={rounds} must be at least 1 and 3, "
            f"sample_seconds={sample_seconds} positive"
        )
    inputs = Inputs.of(example_inputs)
    named = _named(entries)
    if baseline is not None and baseline not in named:
        raise ValueError(f"baseline={baseline!r} is not one of {', '.join(named)}")
    report = on_progress or (lambda what, done, total: None)
    with ExitStack() as stack:
        stack.enter_context(_threads(threads))
        workspace = stack.enter_context(Workspace())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        prepared = _prepare(named, inputs, threads, workspace, tolerance, report, rounds)
        running = {label: p for label, p in prepared.items() if p.call is not None}
        samples = _time(running, rounds, sample_seconds, report, len(named))
    chosen = baseline or _default_baseline(named, running)
    rows = [_row(label, prepared[label], samples, chosen) for label in named]
    return BenchTable(threads, inputs.batch, rounds, chosen or "", rows)


@dataclass
class _Prepared:
    engine: str
    weights: Weights
    call: Call | None = None
    missing: str | None = None
    error: float | None = None


class _Callable:
    """A caller's own function as an engine."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name, self._function = "callable", function

    def available(self) -> str | None:
        return None

    def prepare(self, model: nn.Module, inputs: Inputs, threads: int, workspace: Workspace) -> Call:
        return lambda: self._function(*inputs.args, **inputs.kwargs)


def _named(entries: Any) -> dict[str, Contender]:
    if isinstance(entries, Mapping):
        named = {str(label): _contender(label, entry) for label, entry in entries.items()}
    else:
        named = {entry.label: entry for entry in entries}
        if len(named) != len(entries):
            raise ValueError("two entries have the same label; pass a mapping to name them")
    if not named:
        raise ValueError("entries is empty; there is nothing to compare")
    return named


def _contender(label: str, entry: Any) -> Contender:
    if isinstance(entry, Contender):
        return entry
    if isinstance(entry, nn.Module) and not hasattr(entry, "explain"):
        return Contender(TorchEager(), entry)
    if callable(entry):
        return Contender(_Callable(entry), nn.Identity())
    raise TypeError(f"entries[{label!r}] is a {type(entry).__name__}, not a contender or callable")


def _prepare(
    named: dict[str, Contender],
    inputs: Inputs,
    threads: int,
    workspace: Workspace,
    tolerance: float,
    report: Callable[[str, int, int], None],
    rounds: int,
) -> dict[str, _Prepared]:
    copies: dict[int, nn.Module] = {}
    references: dict[int, list[Tensor]] = {}
    prepared = {}
    for step, (label, entry) in enumerate(named.items()):
        report(f"preparing {label}", step, len(named) + rounds)
        one = prepared[label] = _Prepared(entry.engine.name, entry.weights)
        one.missing = entry.engine.available()
        if one.missing:
            continue
        key = id(entry.model)
        try:
            if key not in copies:
                copies[key] = plain_copy(entry.model)
            model = copies[key]
            call = entry.engine.prepare(model, inputs, threads, workspace)
            outputs = [t.clone() for t in output_tensors(call())]
        except NotApplicable as reason:
            one.missing = str(reason)
            continue
        except Exception as error:  # an engine's failure is a result, not the end of the others
            one.missing = f"{type(error).__name__}: {_first_line(error)}"
            continue
        if isinstance(entry.engine, _Callable):
            key = -1  # they are compared to each other
        elif key not in references:
            references[key] = output_tensors(model(*inputs.args, **inputs.kwargs))
        one.error = _error(outputs, references.setdefault(key, outputs))
        if one.error > tolerance or math.isnan(one.error):
            one.missing = f"its outputs are wrong: relative error {one.error:.1e}"
        else:
            one.call = call
    return prepared


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no message"


def _error(outputs: list[Tensor], expected: list[Tensor]) -> float:
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


def _time(
    running: dict[str, _Prepared],
    rounds: int,
    sample_seconds: float,
    report: Callable[[str, int, int], None],
    before: int,
) -> dict[str, list[float]]:
    calls = {label: one.call for label, one in running.items() if one.call is not None}
    counts = {label: _calibrate(call, sample_seconds) for label, call in calls.items()}
    samples: dict[str, list[float]] = {label: [] for label in calls}
    order = list(calls)
    with _no_collection():
        for round_ in range(rounds):
            report(f"round {round_ + 1} of {rounds}", before + round_, before + rounds)
            for label in order:
                time.sleep(SETTLE_SECONDS)
                calls[label]()
                samples[label].append(_sample(calls[label], counts[label]))
            order = order[1:] + order[:1]
    return samples


def _calibrate(call: Call, seconds: float) -> int:
    """Warm up, then find how many calls fill `seconds`."""
    end = time.perf_counter() + WARM_UP_SECONDS
    fastest = math.inf
    for _ in range(MAX_CALLS):
        fastest = min(fastest, _sample(call, 1))
        if time.perf_counter() > end:
            break
    return min(MAX_CALLS, max(1, math.ceil(seconds / fastest)))


def _sample(call: Call, count: int) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - begin) / count


def _default_baseline(named: dict[str, Contender], running: dict[str, _Prepared]) -> str | None:
    eager = [label for label in running if isinstance(named[label].engine, TorchEager)]
    dense = [label for label in eager if named[label].weights == "dense"]
    return next(iter([*dense, *eager, *running]), None)


def _row(
    label: str, one: _Prepared, samples: dict[str, list[float]], baseline: str | None
) -> BenchRow:
    row = BenchRow(label, one.engine, one.weights, missing=one.missing, max_error=one.error)
    taken = samples.get(label)
    if not taken:
        return row
    row.samples = taken
    row.low, row.median, row.high = statistics.quantiles(taken, n=4, method="inclusive")
    if baseline in samples:
        ratios = [b / t for b, t in zip(samples[baseline], taken, strict=True)]
        row.ratio_low, row.ratio, row.ratio_high = statistics.quantiles(
            ratios, n=4, method="inclusive"
        )
    return row


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection inside a sample."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
