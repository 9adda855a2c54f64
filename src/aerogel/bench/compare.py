"""Compare engines so that the ratios mean something: all see the same rounds (see `rounds`).

    table = compare(lineup(dense, sparse), example, threads=1)

Everything runs in this process, which is what modules just trained, closures and notebooks need.
Given `Workers`, each engine has a process of its own instead, and one of them works at a time.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.bench import rounds as turns
from aerogel.bench import worker
from aerogel.bench.engines import TorchEager, Workspace, plain_copy
from aerogel.bench.field import Contender
from aerogel.bench.inputs import Call, Example, Inputs, output_tensors
from aerogel.bench.processes import Workers
from aerogel.bench.rounds import Clock, Entrant, Progress
from aerogel.bench.table import BenchTable

# Idle OpenMP threads of the previous engine spin for about a millisecond before they sleep.
SETTLE_SECONDS = 0.002

Entries = Sequence[Contender] | Mapping[str, Contender | nn.Module | Callable[..., Any]]


def compare(
    entries: Entries,
    example_inputs: Example,
    *,
    threads: int | None = None,
    rounds: int = 20,
    baseline: str | None = None,
    tolerance: float = turns.TOLERANCE,
    sample_seconds: float = turns.SAMPLE_SECONDS,
    clock: Clock = "wall",
    workers: Workers | None = None,
    on_progress: Progress | None = None,
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
        clock: "wall", or "cpu" for the engine's process's own time, which a busy machine does not
            enter. It means something with one thread only.
        workers: Gives each engine a process of its own. Contenders then need a `source`.
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
    inputs, named = Inputs.of(example_inputs), _named(entries)
    if baseline is not None and baseline not in named:
        raise ValueError(f"baseline={baseline!r} is not one of {', '.join(named)}")
    report = on_progress or (lambda what, done, total: None)
    total = len(named) + rounds
    with ExitStack() as stack:
        workspace = stack.enter_context(_quiet_process(threads))
        entrants = _enter(named, _Networks(inputs, threads, workspace), workers, tolerance,
                          lambda what, done: report(what, done, total))  # fmt: skip
        running = [entrant for entrant in entrants if entrant.running]
        turns.take(running, rounds, sample_seconds,
                   lambda what, done: report(what, len(named) + done, total))  # fmt: skip
    chosen = baseline or turns.default_baseline(entrants) or ""
    against = next((entrant for entrant in entrants if entrant.label == chosen), None)
    rows = [turns.row_of(entrant, against, clock) for entrant in entrants]
    return BenchTable(threads, inputs.batch, rounds, chosen, rows)


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


class _Networks:
    """The networks of a comparison with what belongs to them: plain copies and eager outputs."""

    def __init__(self, inputs: Inputs, threads: int, workspace: Workspace) -> None:
        self.inputs, self.threads, self.workspace = inputs, threads, workspace
        self._copies: dict[int, nn.Module] = {}
        self._outputs: dict[int, list[Tensor]] = {}

    def plain(self, model: nn.Module) -> nn.Module:
        """A copy with masks baked in, the same one for everybody."""
        return self._copies.setdefault(id(model), plain_copy(model))

    def expected(self, entry: Contender, outputs: list[Tensor]) -> list[Tensor]:
        """What eager torch gives; callables are compared with the first of them."""
        if isinstance(entry.engine, _Callable):
            return self._outputs.setdefault(-1, outputs)
        key = id(entry.model)
        if key not in self._outputs:
            found = self.plain(entry.model)(*self.inputs.args, **self.inputs.kwargs)
            self._outputs[key] = output_tensors(found)
        return self._outputs[key]


class _Local:
    """A contender in this process."""

    def __init__(self, entry: Contender, networks: _Networks) -> None:
        self._entry, self._networks = entry, networks
        self._call: Call = lambda: None

    def prepare(self) -> tuple[list[Tensor], dict[str, Any]]:
        among, model = self._networks, self._networks.plain(self._entry.model)
        call = self._entry.engine.prepare(model, among.inputs, among.threads, among.workspace)
        outputs = [tensor.clone() for tensor in output_tensors(call())]
        self._call = call
        return outputs, call.facts() if hasattr(call, "facts") else {}

    def calibrate(self, seconds: float, warm_up: float) -> int:
        return worker.calibrate(self._call, seconds, warm_up)

    def sample(self, count: int) -> tuple[float, float]:
        time.sleep(SETTLE_SECONDS)
        return worker.sample(self._call, count)


def _enter(
    named: Mapping[str, Contender],
    networks: _Networks,
    workers: Workers | None,
    tolerance: float,
    report: Callable[[str, int], None],
) -> list[Entrant]:
    """Prepare and check everybody who can be had."""
    entrants = [Entrant(label, entry.engine.name, entry.weights) for label, entry in named.items()]
    for entrant, entry in zip(entrants, named.values(), strict=True):
        entrant.missing = entry.engine.available()
    if workers is not None:
        present = zip(entrants, named.values(), strict=True)
        workers.start([entry.engine for entrant, entry in present if entrant.missing is None])
    for step, (entrant, entry) in enumerate(zip(entrants, named.values(), strict=True)):
        report(f"preparing {entrant.label}", step)
        if entrant.missing is not None:
            continue
        if workers is None:
            entrant.runner = _Local(entry, networks)
        else:
            model = networks.plain(entry.model)
            entrant.runner = workers.runner(
                entry, model, networks.inputs, networks.threads, networks.workspace
            )

        def expected(outputs: list[Tensor], entry: Contender = entry) -> list[Tensor]:
            return networks.expected(entry, outputs)

        turns.check(entrant, expected, tolerance)
    return entrants


@contextmanager
def _quiet_process(threads: int) -> Iterator[Workspace]:
    """Nothing but the networks at work: no gradients, no collection, and so many threads."""
    before, collecting = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(threads)
    gc.collect()
    gc.disable()
    try:
        with Workspace() as workspace, torch.inference_mode(False), torch.no_grad():
            yield workspace
    finally:
        torch.set_num_threads(before)
        if collecting:
            gc.enable()
