"""What the pipeline tells a person while it works; the command line draws it, tests collect it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol


class Task(Protocol):
    """Work of known or unknown length that is under way."""

    def update(self, done: float, total: float | None = None, note: str = "") -> None:
        """Say how far it is, of how much, and a word on how it goes."""


class Console(Protocol):
    """Where the pipeline's messages go."""

    def say(self, text: str) -> None:
        """One line for the reader."""

    def warn(self, text: str) -> None:
        """One line the reader should not miss."""

    def task(self, label: str, unit: str = "") -> contextlib.AbstractContextManager[Task]:
        """Show progress of `label`, counted in `unit`, while the context is open."""


class Silent:
    """A console that shows nothing: for ranks above 0 and for library use."""

    def say(self, text: str) -> None:
        """Drop the line."""

    def warn(self, text: str) -> None:
        """Drop the line."""

    def update(self, done: float, total: float | None = None, note: str = "") -> None:
        """Drop the progress."""

    @contextlib.contextmanager
    def task(self, label: str, unit: str = "") -> Iterator[Task]:
        """A task that shows nothing."""
        yield self
