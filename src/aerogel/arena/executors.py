"""Where trials run: in processes of this machine, or through Ray on several."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any, Literal, cast

Executor = Literal["processes", "ray"]
EXECUTORS = ("auto", "processes", "ray")
Jobs = Sequence[tuple[Any, ...]]
Results = Generator[Any, None, None]
Each = Callable[[Callable[..., Any], Jobs], Results]

_ADDRESS = "RAY_ADDRESS"
_PATIENCE_SECONDS = 60.0
_HINT = "executor = 'ray' needs Ray: pip install 'aerogel[ray]'"


def choose(executor: str) -> Executor:
    """What an executor's name means here and now.

    Args:
        executor: "processes", "ray", or "auto": Ray where a cluster is at hand (`ray.init` was
            called, or RAY_ADDRESS is set, and Ray is installed), else processes.

    Raises:
        ValueError: Another name, or "ray" without Ray.
    """
    if executor not in EXECUTORS:
        raise ValueError(f"executor must be one of {EXECUTORS}, got {executor!r}")
    if executor == "auto":
        return "ray" if _has_cluster() else "processes"
    if executor == "ray" and find_spec("ray") is None:
        raise ValueError(_HINT)
    return cast(Executor, executor)


def start(executor: Executor, workers: int) -> tuple[Each, Callable[[], None]]:
    """Make ready to run jobs.

    Args:
        executor: Of `choose`.
        workers: Jobs at a time, one thread each. A Ray cluster runs as many as it has CPUs.

    Returns:
        A generator function (work, jobs) of results as they come, which stops the other jobs when
        it is closed, and a function that ends what was started.
    """
    if executor == "processes":
        return lambda work, jobs: _in_processes(work, jobs, workers), lambda: None
    ray = _ray()
    if ray.is_initialized():
        return _through_ray, lambda: None
    local = {} if os.environ.get(_ADDRESS) else {"num_cpus": workers, "include_dashboard": False}
    ray.init(log_to_driver=False, logging_level="error", **local)
    return _through_ray, ray.shutdown


def _has_cluster() -> bool:
    if find_spec("ray") is None:
        return False
    if os.environ.get(_ADDRESS):
        return True
    return "ray" in sys.modules and bool(_ray().is_initialized())


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    return importlib.import_module("ray")


def _in_processes(work: Callable[..., Any], jobs: Jobs, workers: int) -> Results:
    if workers == 1 or len(jobs) < 2:
        yield from _here(work, jobs)
        return
    context = get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), context, _one_thread) as pool:
        try:
            for future in as_completed([pool.submit(work, *job) for job in jobs]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)  # what is running comes to its end


def _here(work: Callable[..., Any], jobs: Jobs) -> Results:
    """In this process, which has its threads back afterwards."""
    import torch

    threads = torch.get_num_threads()
    _one_thread()
    try:
        for job in jobs:
            yield work(*job)
    finally:
        torch.set_num_threads(threads)


def _through_ray(work: Callable[..., Any], jobs: Jobs) -> Results:
    """A job whose machine dies is started again elsewhere, and goes on from what it had saved."""
    ray = _ray()
    remote = ray.remote(num_cpus=1, max_retries=3)(_alone)
    waiting = [remote.remote(work, job) for job in jobs]
    try:
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1)
            try:
                result = ray.get(done[0])
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            yield result
    finally:
        for left in waiting:
            ray.cancel(left)
        if waiting:  # they let go of their folders
            ray.wait(waiting, num_returns=len(waiting), timeout=_PATIENCE_SECONDS)


def _alone(work: Callable[..., Any], job: tuple[Any, ...]) -> Any:
    _one_thread()
    return work(*job)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
