"""Compile the sparse network and time both networks against every dense engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from aerogel import bench, runtime
from aerogel.bench.engines import output_tensors
from aerogel.compress.console import Task
from aerogel.compress.recipe import Measurement


class _Explained(bench.Aerogel):
    """aerogel as an engine that remembers what it compiled."""

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.compiled: runtime.CompiledModule | None = None

    def prepare(
        self, model: nn.Module, inputs: bench.Inputs, threads: int, workspace: bench.Workspace
    ) -> Any:
        self.compiled = runtime.compile(
            model, inputs.args, threads=threads, tolerance=self.tolerance
        )
        return lambda: self.compiled(*inputs.args)


def measure(
    dense: nn.Module,
    sparse: nn.Module,
    example: tuple[Tensor, ...],
    threads: int,
    settings: Measurement,
    task: Task,
) -> dict[str, Any]:
    """Time one batch size at one thread count.

    Args:
        dense: The network before pruning.
        sparse: After it.
        example: Inputs of the batch size to measure.
        threads: Of every engine.
        settings: Engines, rounds and tolerance.
        task: Progress.

    Returns:
        As JSON values: `latency` (a `BenchTable`), `layers`, `notes` and `explanation` (of
        `explain()`), and `max_error` against eager torch.

    Raises:
        RuntimeError: aerogel itself failed or gave wrong outputs; the message says how.
    """
    ours = _Explained(settings.tolerance)
    engines = [e for e in bench.DENSE_ENGINES if e.name in settings.engines]
    field = bench.lineup(dense, sparse, engines=engines, sparse_engines=(bench.TorchEager(), ours))
    table = bench.compare(
        field,
        example,
        threads=threads,
        rounds=settings.rounds,
        on_progress=lambda what, done, total: task.update(done, total, what),
    )
    # A missing peer is a gap in the table; without our own row there is nothing to compare.
    (own,) = [row for row in table.rows if row.engine == ours.name]
    if ours.compiled is None or own.missing is not None:
        raise RuntimeError(f"the sparse network could not be measured on aerogel: {own.missing}")
    latency = table.to_dict()
    for row in latency["rows"]:
        row.pop("samples", None)
    explanation = ours.compiled.explain()
    plain = explanation.to_dict()
    return {
        "latency": latency,
        "layers": plain["rows"],
        "notes": plain["notes"],
        "explanation": str(explanation),
        "max_error": deviation(sparse, ours.compiled, example),
    }


def settings_of(measurement: Measurement) -> Iterator[tuple[int, int]]:
    """Each (batch size, thread count) to measure, once."""
    machine = bench.hardware_info()
    cores = min(machine.physical_cores or machine.logical_cores, machine.logical_cores)
    counts = dict.fromkeys(n or cores for n in measurement.threads)
    for batch in dict.fromkeys(measurement.batches):
        for threads in counts:
            yield batch, threads


@torch.no_grad()
def deviation(eager: nn.Module, compiled: nn.Module, example: tuple[Tensor, ...]) -> float:
    """Largest difference between two networks' outputs, relative to the largest output."""
    expected = output_tensors(eager(*example))
    worst = 0.0
    for want, got in zip(expected, output_tensors(compiled(*example)), strict=True):
        scale = want.abs().max().clamp_min(1e-30)
        worst = max(worst, float((got - want).abs().max() / scale))
    return worst
