"""What was measured once need not be measured again: a small JSON file beside the user's caches."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from aerogel.atomic import write_atomic
from aerogel.version import __version__

FORMAT = 1
_MAX_ENTRIES = 20_000


def default_path() -> Path:
    """`$AEROGEL_CACHE/tuning.json`, else `~/.cache/aerogel/tuning.json`."""
    root = os.environ.get("AEROGEL_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "aerogel") / "tuning.json"


@lru_cache(maxsize=1)
def cpu_name() -> str:
    """The processor's model name; measurements do not carry over to another one."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


class TuningCache:
    """Measured seconds by key. A missing, corrupted or read-only file is never an error.

    Args:
        path: The JSON file; None keeps everything in memory only.
        environment: What else a measurement depends on: versions, instruction set, threads.
    """

    def __init__(self, path: Path | None, environment: dict[str, Any]) -> None:
        self._path = path
        self._environment = json.dumps(environment, sort_keys=True)
        self._entries = _read(path) if path else {}
        self._fresh: dict[str, dict[str, float]] = {}

    def key(self, *parts: object) -> str:
        """One string for everything the measurement depends on."""
        return json.dumps([self._environment, *parts], sort_keys=True, default=str)

    def get(self, key: str, names: Iterable[str]) -> dict[str, float] | None:
        """The seconds of exactly these candidates, or None if any of them was never measured."""
        entry = self._entries.get(key)
        if entry is None or not set(names) <= entry.keys():
            return None
        return {name: entry[name] for name in names}

    def put(self, key: str, seconds: dict[str, float]) -> None:
        """Remember a measurement; `flush` writes it down."""
        self._entries[key] = self._fresh[key] = {**self._entries.get(key, {}), **seconds}

    def flush(self) -> None:
        """Merge with what other processes wrote meanwhile and replace the file atomically."""
        if self._path is None or not self._fresh:
            return
        entries = {**_read(self._path), **self._fresh}
        if len(entries) > _MAX_ENTRIES:
            entries = dict(list(entries.items())[-_MAX_ENTRIES:])
        with contextlib.suppress(OSError):
            _write(self._path, {"format": FORMAT, "entries": entries})
        self._fresh = {}


def environment(threads: int, isa: str) -> dict[str, Any]:
    """What every measurement depends on besides the layer itself."""
    return {
        "aerogel": __version__,
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "isa": isa,
        "threads": threads,
    }


def _read(path: Path) -> dict[str, dict[str, float]]:
    try:
        document = json.loads(path.read_text())
        if document["format"] != FORMAT:
            return {}
        entries = document["entries"]
        return {key: entry for key, entry in entries.items() if _is_valid(entry)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _is_valid(entry: object) -> bool:
    return isinstance(entry, dict) and all(
        isinstance(seconds, float) and seconds > 0 for seconds in entry.values()
    )


def _write(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(document), mode=0o600)
