"""Files that are never half written. A leaf beside the manifest: every room may use it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


def write_atomic(path: Path, content: str | bytes, *, mode: int | None = None) -> None:
    """Write a file so that at any moment either its old or its new content is there, whole.

    The content goes to ``.NAME-*.tmp`` in the same folder first, is synced, and takes the file's
    place in one rename; if anything fails, the old file stays and nothing is left beside it.

    Args:
        path: the file; its folder must exist.
        content: text (as UTF-8) or bytes.
        mode: permissions; None for what the umask allows a new file.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        descriptor, temporary = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}-", suffix=".tmp"
        )
    except OSError as error:
        raise _about(path, error) from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask() if mode is None else mode)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise _about(path, error) from None
        raise


def _about(path: Path, error: OSError) -> OSError:
    """The same error, of the file that was asked for."""
    return OSError(error.errno, error.strerror, str(path)) if error.errno else error


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
