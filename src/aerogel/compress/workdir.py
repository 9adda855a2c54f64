"""The output folder of a run: locked, checked before work starts, and safe from kills.

    DIR/recipe.yaml, results.json, report.html, model.safetensors, dense.safetensors
    DIR/.aerogel/recipe.json      the recipe this folder belongs to
    DIR/.aerogel/stages/NAME.json marker of a finished stage: its key, its files' hashes, its result
    DIR/.aerogel/training/NAME/   state of a training phase that is not finished
    DIR/.aerogel/lock             held while a run works here

A stage counts as done only if its marker was made under the same key (its part of the recipe and
the markers before it) and every file it names still has the content it had then.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from aerogel.atomic import write_atomic
from aerogel.compress.recipe import Recipe

STATE = ".aerogel"
OUTPUTS = ("recipe.yaml", "results.json", "report.html", "model.safetensors", "dense.safetensors")
# Room for the report, the tables and the file system's own needs.
SPARE_BYTES = 48 << 20


class FolderError(ValueError):
    """The output folder cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Marker:
    """What a finished stage left behind.

    Args:
        stage: Its name.
        key: Hash of all that decided it.
        files: SHA-256 of each file it wrote, by path relative to the folder.
        result: What it found out, as JSON values.
        seconds: Wall time it took, over all resumed parts of the last attempt.
    """

    stage: str
    key: str
    files: dict[str, str] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def key_of(*parts: Any) -> str:
    """Hash of JSON values: equal parts, equal key."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class RunFolder:
    """One run's output folder. Make it with `RunFolder.opened`, which locks it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = path / STATE

    @classmethod
    @contextlib.contextmanager
    def opened(cls, path: Path, recipe: Recipe, *, restart: bool = False) -> Iterator[RunFolder]:
        """Create or re-open the folder for `recipe` and hold its lock.

        Args:
            path: The folder; made if it does not exist.
            recipe: What the run will do.
            restart: Throw away what an earlier run left here.

        Raises:
            FolderError: Not writable, no space, in use by another run, holding files that are not
                a run's, or begun with another recipe (the changed keys are named).
        """
        folder = cls(path)
        folder._make()
        with folder._locked():
            if restart:
                folder._clear()
            folder._refuse_foreign_files()
            folder._claim(recipe)
            folder.ensure_space(0)
            yield folder

    def _make(self) -> None:
        try:
            (self.state / "stages").mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.state, prefix=".probe."):
                pass
        except (NotADirectoryError, FileExistsError):
            raise FolderError(f"out = {str(self.path)!r}: a file stands in the way") from None
        except OSError as error:
            reason = error.strerror or str(error)
            raise FolderError(
                f"out = {str(self.path)!r} cannot be written ({reason}); choose another --out"
            ) from None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.state / "lock").open("a+") as file:
            if not _try_lock(file):
                raise FolderError(
                    f"out = {str(self.path)!r} is in use by another run; wait for it, or choose "
                    "another --out"
                )
            yield

    def _clear(self) -> None:
        if not (self.state / "recipe.json").exists():
            return
        for name in OUTPUTS:
            (self.path / name).unlink(missing_ok=True)
        for name in ("stages", "training"):
            shutil.rmtree(self.state / name, ignore_errors=True)
        (self.state / "recipe.json").unlink()
        (self.state / "stages").mkdir()

    def _refuse_foreign_files(self) -> None:
        if (self.state / "recipe.json").exists():
            return
        if found := [name for name in OUTPUTS if (self.path / name).exists()]:
            raise FolderError(
                f"out = {str(self.path)!r} holds {', '.join(found)} that no run of aerogel wrote; "
                "nothing was touched; choose another --out"
            )

    def _claim(self, recipe: Recipe) -> None:
        path = self.state / "recipe.json"
        wanted = recipe.model_dump(mode="json")
        if not path.exists():
            write_atomic(path, json.dumps(wanted, indent=1))
        elif changed := changed_keys(_read_json(path) or {}, wanted):
            raise FolderError(
                f"out = {str(self.path)!r} was begun with another recipe: {'; '.join(changed)}. "
                "Choose another --out, or --restart to throw that run away"
            )

    def ensure_space(self, needed: int) -> None:
        """Check that `needed` bytes and some spare room are free.

        Raises:
            FolderError: They are not.
        """
        free = shutil.disk_usage(self.path).free
        if free < needed + SPARE_BYTES:
            raise FolderError(
                f"out = {str(self.path)!r}: the disk has {free / 1e6:.0f} MB free, this run needs "
                f"about {(needed + SPARE_BYTES) / 1e6:.0f} MB; free some, or choose another --out"
            )

    def training_state(self, stage: str) -> Path:
        """Where a training phase keeps what it needs to go on after a kill."""
        return self.state / "training" / stage

    def finished(self, stage: str, key: str) -> Marker | None:
        """The stage's marker if it was finished under `key` and its files are as it left them."""
        raw = _read_json(self.state / "stages" / f"{stage}.json")
        if raw is None or raw.get("key") != key:
            return None
        try:
            marker = Marker(**raw)
        except TypeError:
            return None
        for name, digest in marker.files.items():
            path = self.path / name
            if not path.is_file() or file_hash(path) != digest:
                return None
        return marker

    def finish(
        self, stage: str, key: str, files: Sequence[str], result: dict[str, Any], seconds: float
    ) -> Marker:
        """Record that a stage is done. Its files are on disk before the marker is."""
        hashes = {name: file_hash(self.path / name) for name in files}
        marker = Marker(stage, key, hashes, result, seconds)
        write_atomic(self.state / "stages" / f"{stage}.json", json.dumps(vars(marker)))
        shutil.rmtree(self.training_state(stage), ignore_errors=True)
        return marker


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def changed_keys(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted keys at which two nested values differ, each with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        changes = []
        for key in sorted(old.keys() | new.keys()):
            changes += changed_keys(old.get(key), new.get(key), f"{prefix}{key}.")
        return changes
    if old == new:
        return []
    return [f"{prefix.rstrip('.')} was {json.dumps(old)}, now {json.dumps(new)}"]


def _try_lock(file: IO[str]) -> bool:
    """Take the lock unless another process has it; the system frees it when its owner dies."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return _try_lock_windows(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        return False
    return True


def _try_lock_windows(file: IO[str]) -> bool:
    import msvcrt

    file.seek(0)
    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except OSError:
        return False
    return True
