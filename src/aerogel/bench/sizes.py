"""What networks take on disk and in numbers."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from aerogel import runtime


@dataclass(frozen=True)
class FileSize:
    """One network as a checkpoint.

    Attributes:
        file_bytes: The whole file, header included.
        dense_bytes: Its tensors with every zero written out.
        elements: Numbers in all tensors, buffers included.
        nonzero: Those that are stored; what is not known to be zero counts.
    """

    file_bytes: int
    dense_bytes: int
    elements: int
    nonzero: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def file_sizes(entries: Mapping[str, nn.Module | str | os.PathLike[str]]) -> dict[str, FileSize]:
    """Measure networks as files.

    Args:
        entries: Label -> a checkpoint's path, or a module, which is saved to a temporary file.

    Returns:
        Label -> sizes.
    """
    sizes = {}
    with tempfile.TemporaryDirectory(prefix="aerogel-size-") as folder:
        for label, entry in entries.items():
            path: Any = entry
            if isinstance(entry, nn.Module):
                path = Path(folder) / "model.safetensors"
                runtime.save(entry, path)
            sizes[label] = _measure(path)
    return sizes


def _measure(path: str | os.PathLike[str]) -> FileSize:
    info = runtime.inspect(path)
    counts = [(t.elements, 0.0 if t.sparsity is None else t.sparsity) for t in info.tensors]
    return FileSize(
        file_bytes=info.file_bytes,
        dense_bytes=info.dense_bytes,
        elements=sum(n for n, _ in counts),
        nonzero=sum(round(n * (1 - zeros)) for n, zeros in counts),
    )
