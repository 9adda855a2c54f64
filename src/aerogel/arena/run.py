"""Running an arena's trials, several at a time, and going on after a kill."""

from __future__ import annotations

import json
import platform
import uuid
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from aerogel.arena import executors
from aerogel.arena.plan import Arena, Trial
from aerogel.atomic import write_atomic
from aerogel.compress import Recipe

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
    arena: Arena,
    folder: str | Path,
    *,
    workers: int = 1,
    executor: str = "auto",
    on_trial: OnTrial | None = None,
) -> Outcome:
    """Run what was not run before; the same call goes on after a kill.

    Args:
        arena: What competes.
        folder: For dense networks, trials and `arena.json`. Through Ray all machines must see it
            under the same path.
        workers: Trials at a time, one thread each; a Ray cluster runs as many as it has CPUs.
        executor: "processes", "ray", or "auto": Ray where `ray.init` was called or RAY_ADDRESS is
            set, else processes. A run may go on under another one.
        on_trial: Progress.

    Returns:
        A row for every trial. One that fails has the reason in its row and stops no other.

    Raises:
        ValueError: workers below 1, an unknown executor, Ray asked for and not installed, a recipe
            that cannot be (a bad model or data name), or a folder that not all machines see.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    chosen = executors.choose(executor)
    path = Path(folder).resolve()
    path.mkdir(parents=True, exist_ok=True)
    each, end = executors.start(chosen, workers)
    beacon = path / f".seen-by-all-{uuid.uuid4().hex}"
    beacon.touch()
    try:
        rows = _rows(arena, beacon, each, on_trial)
    finally:
        beacon.unlink(missing_ok=True)
        end()
    content = json.dumps([asdict(row) for row in rows], indent=1)
    write_atomic(path / "arena.json", content)
    return Outcome(arena, rows)


def _rows(arena: Arena, beacon: Path, each: executors.Each, on_trial: OnTrial | None) -> list[Row]:
    trials = arena.trials()
    dense = [(arena.dense_recipe(seed), seed, beacon) for seed in arena.seeds]
    found: dict[Trial, Row] = {}
    jobs = []
    for trial in trials:
        if trial.pattern is None:
            found[trial] = _without(trial, trial.reason)
            continue
        try:
            recipe = arena.recipe_of(trial, str(_dense_file(beacon.parent, trial.seed)))
        except ValueError as error:
            found[trial] = _without(trial, _first_line(error))
        else:
            jobs.append((recipe, trial, beacon))
    total = len(dense) + len(jobs)
    done = 0

    def tell(name: str) -> None:
        nonlocal done
        done += 1
        if on_trial is not None:
            on_trial(done, total, name)

    with closing(each(_train_dense, dense)) as seeds:
        for seed in seeds:
            tell(f"dense, seed {seed}")
    with closing(each(_run_trial, jobs)) as finished:
        for row, trial in finished:
            found[trial] = row
            tell(trial.name)
    return [found[trial] for trial in trials]


def _train_dense(recipe: Recipe, seed: int, beacon: Path) -> int:
    from aerogel import compress

    _require_seen(beacon)
    compress.train_dense_network(recipe, _dense_file(beacon.parent, seed).parent)
    return seed


def _run_trial(recipe: Recipe, trial: Trial, beacon: Path) -> tuple[Row, Trial]:
    from aerogel import compress

    _require_seen(beacon)
    try:
        results = compress.run(recipe, beacon.parent / trial.name)
    except (ValueError, RuntimeError, ArithmeticError) as error:
        return _without(trial, _first_line(error)), trial
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


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _dense_file(path: Path, seed: int) -> Path:
    from aerogel.compress.pipeline import DENSE_FILE

    return path / f"dense-seed{seed}" / DENSE_FILE


def _require_seen(beacon: Path) -> None:
    """Whether this machine sees the folder of the one that began the arena."""
    if not beacon.is_file():
        raise ValueError(
            f"folder {str(beacon.parent)!r} is not the same one on {platform.node()}: through Ray "
            "the arena needs a folder that all machines see under the same path"
        )
