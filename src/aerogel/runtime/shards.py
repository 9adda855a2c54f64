"""Checkpoints in several files, as transformers publishes them: an index names each tensor's file.

model.safetensors.index.json     {"weight_map": {"fc.weight": "model-00001-of-00002.safetensors"}}
model-00001-of-00002.safetensors, ...
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from aerogel.runtime.container import Container
from aerogel.runtime.formats import CheckpointError

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"


def open_parts(path: str | os.PathLike[str]) -> list[Container]:
    """The safetensors files of one checkpoint, opened.

    Args:
        path: a safetensors file, an index (`.json`), or a folder with one of either by its usual
            name.

    Raises:
        CheckpointError: an index that is none, that leads out of its folder, or that names a tensor
            which its file does not hold.
        OSError: a file cannot be opened.
    """
    place = Path(path)
    if place.is_dir():
        place = next((place / n for n in (INDEX, WHOLE) if (place / n).is_file()), place)
    if place.suffix != ".json" or not place.is_file():
        return [Container(place)]
    files = _weight_map(place)
    parts = {name: Container(place.parent / name) for name in dict.fromkeys(files.values())}
    lost = next((name for name, file in files.items() if name not in parts[file]), None)
    if lost is not None:
        raise CheckpointError(f"{place} says that {files[lost]} holds {lost!r}, which it does not")
    return list(parts.values())


def _weight_map(index: Path) -> dict[str, str]:
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        strings = all(isinstance(file, str) for file in files.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is no index of a checkpoint: {error!r}") from error
    if not files or not strings:
        raise CheckpointError(f"{index} is no index of a checkpoint: its weight_map names no files")
    outside = next((file for file in files.values() if Path(file).name != file), None)
    if outside is not None:
        raise CheckpointError(f"{index} names {outside!r}; expected a file in its own folder")
    return dict(files)
