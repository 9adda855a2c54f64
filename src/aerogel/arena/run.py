"""Running an arena's trials, in as many processes as there are cores to spare."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from aerogel.arena.plan import Arena, Trial
from aerogel.atomic import write_atomic

OnTrial = Callable[[int, int, str], None]
"""Called as (trials done, trials in all, the last one's name)."""


@dataclass(frozen=True)
class Row:
    """What became of one trial.

    Attributes:
        method, sparsity, seed, pattern: The trial's.
        accuracy: Of the sparse network on the test data, in [0, 1].
        dense_accuracy: Of the dense one.
        seconds: Median time of one compiled call, batch 1, one thread, CPU time.
        dense_seconds: Likewise of the dense network in eager torch.
        bytes: Of the sparse network's file.
        dense_bytes: Of the dense one's.
        zeros: Fraction of zeros that the pruned layers really have.
        missing: Why there is no figure, else "".
    """

    method: str
    sparsity: float
    seed: int
    pattern: str | None
    accuracy: float | None = None
    dense_accuracy: float | None = None
    seconds: float | None = None
    dense_seconds: float | None = None
    bytes: int | None = None
    dense_bytes: int | None = None
    zeros: float | None = None
    missing: str = ""


@dataclass(frozen=True)
class Outcome:
    """All rows of an arena, in the order of its trials."""

    arena: Arena
    rows: list[Row]


def run(
    arena: Arena, folder: str | Path, *, workers: int = 1, on_trial: OnTrial | None = None
) -> Outcome:
    """Run what was not run before; the same call goes on after a kill.

    Args:
        arena: What competes.
        folder: For dense networks, trials and `arena.json`.
        workers: Processes, one thread each.
        on_trial: Progress.

    Returns:
        A row for every trial. One that fails has the reason in its row and stops no other.

    Raises:
        ValueError: workers below 1, or a recipe that cannot be (a bad model or data name).
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    trials = arena.trials()
    dense = [(arena, seed, str(path / f"dense-seed{seed}")) for seed in arena.seeds]
    runnable = [trial for trial in trials if trial.pattern is not None]
    total = len(dense) + len(runnable)
    done = 0

    def tell(name: str) -> None:
        nonlocal done
        done += 1
        if on_trial is not None:
            on_trial(done, total, name)

    for seed in _each(_train_dense, dense, workers):
        tell(f"dense, seed {seed}")
    jobs = [(arena, trial, str(path)) for trial in runnable]
    found: dict[Trial, Row] = {}
    for row, trial in _each(_run_trial, jobs, workers):
        found[trial] = row
        tell(trial.name)
    rows = [found.get(trial) or _without(trial, trial.reason) for trial in trials]
    content = json.dumps([asdict(row) for row in rows], indent=1)
    write_atomic(path / "arena.json", content)
    return Outcome(arena, rows)


def _each(work: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], workers: int) -> Iterator[Any]:
    """Results as they come."""
    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            yield work(*job)
        return
    context = get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), context, _one_thread) as pool:
        for future in as_completed([pool.submit(work, *job) for job in jobs]):
            yield future.result()


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _train_dense(arena: Arena, seed: int, folder: str) -> int:
    from aerogel import compress

    compress.train_dense_network(arena.dense_recipe(seed), folder)
    return seed


def _run_trial(arena: Arena, trial: Trial, folder: str) -> tuple[Row, Trial]:
    from aerogel import compress
    from aerogel.compress.pipeline import DENSE_FILE

    root = Path(folder)
    dense = root / f"dense-seed{trial.seed}" / DENSE_FILE
    try:
        results = compress.run(arena.recipe_of(trial, str(dense)), root / trial.name)
    except (ValueError, RuntimeError, ArithmeticError) as error:
        return _without(trial, str(error).splitlines()[0]), trial
    assert results is not None  # one process
    quality, size = results.quality[0], results.size
    ours = results.latency[0].fastest("sparse")
    eager = results.latency[0].fastest("dense")
    row = Row(
        trial.method,
        trial.sparsity,
        trial.seed,
        trial.pattern,
        accuracy=quality.sparse,
        dense_accuracy=quality.dense,
        seconds=None if ours is None else ours.median,
        dense_seconds=None if eager is None else eager.median,
        bytes=size.sparse_bytes,
        dense_bytes=size.dense_bytes,
        zeros=size.sparsity,
    )
    return row, trial


def _without(trial: Trial, reason: str) -> Row:
    return Row(trial.method, trial.sparsity, trial.seed, trial.pattern, missing=reason)
