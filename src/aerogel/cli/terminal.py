"""How every command speaks: results on stdout, all else on stderr, errors without traceback."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Task as RichTask
from rich.text import Text

BAD_INPUT, INTERRUPTED, TERMINATED = 2, 130, 143
# A log file gets a line this often instead of a moving bar.
LOG_INTERVAL_SECONDS = 15.0


def stdout() -> Console:
    """Where results go."""
    return Console()


def stderr() -> Console:
    """Where progress, warnings and errors go."""
    return Console(stderr=True)


def print_json(value: Any) -> None:
    """Print a value as the only thing on stdout."""
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


@contextlib.contextmanager
def guarded(after_interrupt: str = "Nothing half written was left behind.") -> Iterator[None]:
    """Turn bad input into one paragraph and exit code 2, Ctrl-C into a line and exit code 130.

    A polite request to end (SIGTERM) is followed with exit code 143, temporary files removed. A bug
    keeps its traceback. `AEROGEL_TRACEBACK=1` shows that of bad input as well.

    Args:
        after_interrupt: What to tell a person who pressed Ctrl-C.
    """
    with _termination(), _interrupts() as interrupted:
        try:
            yield
        except BrokenPipeError:
            raise
        except (KeyboardInterrupt, Exception) as error:
            if isinstance(error, KeyboardInterrupt) or interrupted():
                stderr().print(f"\n[yellow]Interrupted.[/] {escape(after_interrupt)}")
                raise typer.Exit(INTERRUPTED) from None
            if not _is_clean(error):
                raise
            if os.environ.get("AEROGEL_TRACEBACK"):
                traceback.print_exc()
            if int(os.environ.get("RANK", "0")) == 0:
                stderr().print(f"[red]error:[/] {escape(_sentence(error))}", soft_wrap=True)
            raise typer.Exit(BAD_INPUT) from None


@contextlib.contextmanager
def _termination() -> Iterator[None]:
    """SIGTERM leaves as an exception does, through everything that cleans up.

    Not in one process of several: cleaning up would wait for others that may be gone.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or "RANK" in os.environ or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed meanwhile.

    C code that Python's handler interrupts may lose the `KeyboardInterrupt` and raise an error of
    its own: `torch.asarray` says that an object has no shape.
    """
    pressed = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or before is not signal.default_int_handler:
        yield pressed.is_set
        return

    def handle(number: int, frame: FrameType | None) -> None:
        pressed.set()
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, handle)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _is_clean(error: Exception) -> bool:
    """Whether the message was written for the user: ours, or the system's about a file."""
    if isinstance(error, (ValueError, FloatingPointError, OSError, ModuleNotFoundError)):
        return True
    return type(error).__module__.startswith("aerogel.")


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        advice = " Free some space and run the same command again." if error.errno == 28 else ""
        return f"{place}{error.strerror}.{advice}"
    return str(error) or type(error).__name__


class _Rate(ProgressColumn):
    """Work a second, in the task's unit."""

    def render(self, task: RichTask) -> Text:
        speed = task.finished_speed or task.speed
        unit = task.fields.get("unit", "")
        return Text(f"{speed:,.3g} {unit}/s" if speed and unit else "", style="cyan")


class _Count(ProgressColumn):
    """How much of how much is done."""

    def render(self, task: RichTask) -> Text:
        if not task.total or not task.fields.get("unit"):
            return Text("")
        return Text(f"{task.completed:,.0f}/{task.total:,.0f}", style="dim")


class _Bar:
    """A moving bar."""

    def __init__(self, progress: Progress, label: str, unit: str) -> None:
        self._progress = progress
        self._id = progress.add_task(label, total=None, unit=unit, note="")

    def update(self, done: float, total: float | None = None, note: str = "") -> None:
        """Move the bar."""
        self._progress.update(self._id, completed=done, total=total, note=note)


class _Log:
    """A line now and then, for a log file; rate and time left are those since the line before."""

    def __init__(self, console: Console, label: str, unit: str) -> None:
        self._console, self._label, self._unit = console, label, unit
        self._said = time.monotonic()
        self._done: float | None = None

    def update(self, done: float, total: float | None = None, note: str = "") -> None:
        """Say where the work stands if nothing was said for a while."""
        now = time.monotonic()
        if self._done is None:  # what came before the first call is not this task's pace
            self._said, self._done = now, done
        if now - self._said < LOG_INTERVAL_SECONDS:
            return
        rate = (done - self._done) / (now - self._said)
        self._said, self._done = now, done
        of = f"/{total:,.0f}" if total else ""
        pace = f", {rate:,.3g} {self._unit}/s" if self._unit and rate > 0 else ""
        left = f", {(total - done) / rate:.0f} s left" if total and rate > 0 else ""
        self._console.print(
            f"  {self._label} {done:,.0f}{of} {self._unit}{pace}{left} {note}",
            highlight=False,
            markup=False,
        )


class Terminal:
    """The console of the pipeline: lines and progress on stderr."""

    def __init__(self) -> None:
        self._console = stderr()

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a line that stands out."""
        self._console.print(f"[yellow]warning:[/] {escape(text)}", highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def task(self, label: str, unit: str = "") -> Iterator[_Bar | _Log]:
        """Show progress with rate and time left while the context is open."""
        if not self._console.is_terminal:
            yield _Log(self._console, label, unit)
            return
        columns = [
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28),
            _Count(),
            _Rate(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}", markup=False, style="dim"),
        ]
        with Progress(*columns, console=self._console, transient=True) as progress:
            yield _Bar(progress, label, unit)


def listed(values: Iterable[str]) -> list[str]:
    """Values of an option that may be repeated and may hold commas."""
    parts = [part.strip() for value in values for part in value.split(",")]
    return [part for part in parts if part]
