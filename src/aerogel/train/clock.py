"""The time a run takes: of its steps alone, its rate, and when to save and report next."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator

from aerogel.train.config import TrainConfig
from aerogel.train.history import History, OnProgress, Progress
from aerogel.train.run import Run

_PROGRESS_SECONDS = 0.25


class Clock:
    """Time of the steps alone, the rate, and when to save next."""

    def __init__(self, first_step: int, save_seconds: float) -> None:
        self.first_step, self.save_seconds = first_step, save_seconds
        self.start = self.saved = time.monotonic()
        self.reported = -math.inf

    @contextlib.contextmanager
    def timed(self, history: History) -> Iterator[None]:
        start = time.monotonic()
        yield
        history.seconds += time.monotonic() - start

    def is_time_to_save(self) -> bool:
        if time.monotonic() - self.saved < self.save_seconds:
            return False
        self.saved = time.monotonic()
        return True

    def report(
        self, run: Run, losses: list[float], on_progress: OnProgress, config: TrainConfig
    ) -> None:
        now = time.monotonic()
        if now - self.reported < _PROGRESS_SECONDS and run.step < run.total_steps:
            return
        self.reported = now
        rate = (run.step - self.first_step) / max(now - self.start, 1e-9)
        curve = run.history.steps[-1] if run.history.steps else {}
        on_progress(
            Progress(
                step=run.step,
                total=run.total_steps,
                epoch=run.epoch,
                loss=losses[-1] if losses else curve.get("loss", math.nan),
                lr=config.lr_at(run.step - 1, run.total_steps),
                sparsity=curve.get("sparsity", 0.0),
                samples_per_second=rate * config.batch_size,
                seconds_left=(run.total_steps - run.step) / max(rate, 1e-9),
            )
        )
