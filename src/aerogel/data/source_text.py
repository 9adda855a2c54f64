"""Text that is on every machine: the source of Python's own standard library, as bytes."""

from __future__ import annotations

import hashlib
import pydoc_data.topics
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

HELD_OUT = 0.05  # the last part of the text
# Parts that some systems leave out, tables, and tests.
_SKIPPED = frozenset(
    {
        *("__pycache__", "config", "dist-packages", "distutils", "encodings", "ensurepip"),
        *("idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests", "tkinter"),
        *("turtledemo",),
    }
)


@dataclass(frozen=True)
class SourceText:
    """Bytes to train on and bytes to score on.

    Attributes:
        train: (n,) uint8.
        held_out: (m,) uint8, what follows the training part.
        sha256: of both together; differs between versions of Python.
    """

    train: Tensor
    held_out: Tensor
    sha256: str


def load_source_text(root: str | Path | None = None) -> SourceText:
    """The modules of the standard library, in the order of their paths, after Python's help texts.

    About 10 MB: tests, tables of encodings and the parts that some systems leave out (tkinter,
    idlelib) are skipped.

    Args:
        root: folder of modules; default the standard library of the running interpreter.

    Raises:
        ValueError: the folder holds no Python source.
    """
    root = Path(sysconfig.get_path("stdlib") if root is None else root)
    found = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    kept = [name for name in sorted(found) if not _SKIPPED.intersection(name.split("/"))]
    if not kept:
        raise ValueError(f"root={str(root)!r}: expected a folder with Python source")
    topics = pydoc_data.topics.topics
    parts = [topics[name].encode() for name in sorted(topics)]
    text = b"\n".join([*parts, *(found[name].read_bytes() for name in kept)])
    data = torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())
    cut = int(len(data) * (1 - HELD_OUT))
    return SourceText(data[:cut], data[cut:], hashlib.sha256(text).hexdigest())
