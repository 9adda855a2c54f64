"""Nested state in one safetensors file: tensors as tensors, the rest as JSON in its header.

A leaf beside `aerogel.atomic`: every room that has to go on after a kill may use it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from aerogel.atomic import write_atomic

_HEADER = "aerogel.state"
_VERSION = 1


def save_state(state: Any, path: str | os.PathLike[str]) -> None:
    """Write a nested state atomically, for its owner alone to read.

    Args:
        state: dicts, lists, tuples, tensors, numbers, strings and None, as `load_state` will give
            them back (tensors on the CPU).
        path: the file; its folder must exist.

    Raises:
        TypeError: a value that is none of the above, with its place.
        OSError: the file cannot be written; an older one is left as it was.
    """
    tensors: dict[str, Tensor] = {}
    tree = _flatten(state, "", tensors)
    header = {_HEADER: json.dumps({"version": _VERSION, "state": tree})}
    write_atomic(Path(path), save(tensors, metadata=header), mode=0o600)


def load_state(path: str | os.PathLike[str]) -> Any:
    """Read what `save_state` wrote.

    Raises:
        ValueError: the file is damaged or was not written by `save_state`.
        FileNotFoundError: there is no such file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if header["version"] != _VERSION:
            raise ValueError(f"version {header['version']}, expected {_VERSION}")
        return _restore(header["state"], tensors)
    except FileNotFoundError:
        raise
    except (SafetensorError, KeyError, IndexError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"{path} is not a readable state file: {error}") from error


def _flatten(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for a nested value; tensors move to `tensors`, keys that are not text are kept."""
    if isinstance(value, Tensor):
        key = place or "tensor"
        # safetensors refuses views that share memory; clones are independent.
        tensors[key] = value.detach().cpu().contiguous().clone()
        return {"tensor": key}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        for key in value:
            if key is not None and not isinstance(key, (bool, int, float, str)):
                raise TypeError(f"state at {place or 'top'}: key {key!r} cannot be stored")
        pairs = [[k, _flatten(v, f"{place}/{k}", tensors)] for k, v in value.items()]
        return {"dict": pairs}
    if isinstance(value, (list, tuple)):
        items = [_flatten(v, f"{place}/{i}", tensors) for i, v in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else {"list": items}
    raise TypeError(f"state at {place or 'top'}: {type(value).__name__} cannot be stored")


def _restore(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _restore(value, tensors) for key, value in content}
    items = [_restore(value, tensors) for value in content]
    return tuple(items) if kind == "tuple" else items
