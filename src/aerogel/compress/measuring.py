"""Compile the sparse network and time both networks against every engine, a process for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from aerogel import bench
from aerogel.compress.console import Task
from aerogel.compress.recipe import Measurement


@dataclass(frozen=True)
class Pair:
    """A dense and a sparse network, and how other processes build both.

    Attributes:
        dense: The network before pruning.
        sparse: After it.
        source: Builds the dense network; None keeps all engines in this process.
        sparse_source: Builds the sparse one.
    """

    dense: nn.Module
    sparse: nn.Module
    source: bench.Source | None = None
    sparse_source: bench.Source | None = None


def measure(
    pair: Pair,
    example: tuple[Tensor, ...],
    threads: int,
    settings: Measurement,
    task: Task,
    workers: bench.Workers | None = None,
) -> dict[str, Any]:
    """Time one batch size at one thread count.

    Args:
        pair: The networks.
        example: Inputs of the batch size to measure.
        threads: Of every engine.
        settings: Engines, rounds and tolerance.
        task: Progress.
        workers: The engines' processes; None runs everything in this one.

    Returns:
        As JSON values: `latency` (a `BenchTable`), `layers`, `notes` and `explanation` (of
        `explain()`), and `max_error` against eager torch.

    Raises:
        RuntimeError: aerogel itself failed or gave wrong outputs; the message says how.
    """
    table = bench.compare(
        _field(pair, settings),
        example,
        threads=threads,
        rounds=settings.rounds,
        clock=settings.clock,
        workers=workers,
        on_progress=lambda what, done, total: task.update(done, total, what),
    )
    # A missing peer is a gap in the table; without our own row there is nothing to compare.
    (own,) = [row for row in table.rows if row.engine == bench.Aerogel.name]
    if own.missing is not None:
        raise RuntimeError(f"the sparse network could not be measured on aerogel: {own.missing}")
    latency = table.to_dict()
    for row in latency["rows"]:
        del row["facts"]
    return {
        "latency": latency,
        "layers": own.facts["rows"],
        "notes": own.facts["notes"] + quietness(table),
        "explanation": own.facts["text"],
        "max_error": own.max_error,
    }


def _field(pair: Pair, settings: Measurement) -> Sequence[bench.Contender]:
    """Dense weights on dense engines; sparse weights on eager torch, on sparse peers, and on us."""
    asked = [bench.find_engine(name) for name in settings.engines]
    sparse = [engine for engine in asked if engine in bench.SPARSE_ENGINES]
    return bench.lineup(
        pair.dense,
        pair.sparse,
        engines=[engine for engine in asked if engine in bench.DENSE_ENGINES],
        sparse_engines=[bench.TorchEager(), *sparse, bench.Aerogel(settings.tolerance)],
        source=pair.source,
        sparse_source=pair.sparse_source,
    )


# Below this share of a core an engine's time is not its own any more.
_UNDISTURBED = 0.9


def quietness(table: bench.BenchTable) -> list[str]:
    """A sentence where other processes kept engines of one thread from their core."""
    shares = [row.cpu for row in table.rows if row.cpu is not None]
    if table.threads != 1 or not shares or min(shares) >= _UNDISTURBED:
        return []
    return [
        f"The machine was busy: at one thread an engine had its core only {min(shares):.0%} of "
        "the time (--clock cpu counts that time alone)."
    ]


def settings_of(measurement: Measurement) -> Iterator[tuple[int, int]]:
    """Each (batch size, thread count) to measure, once."""
    machine = bench.hardware_info()
    cores = min(machine.physical_cores or machine.logical_cores, machine.logical_cores)
    counts = dict.fromkeys(n or cores for n in measurement.threads)
    for batch in dict.fromkeys(measurement.batches):
        for threads in counts:
            yield batch, threads
