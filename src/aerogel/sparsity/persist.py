"""Nested training state in one safetensors file: tensors as tensors, the rest as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from aerogel.atomic import write_atomic

_HEADER = "aerogel_state"
_TENSOR = "__tensor__"


def save_state(state: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write nested dicts and lists of tensors and plain values, atomically.

    Args:
        state: as a ``state_dict`` gives it; leaves are tensors, numbers, strings, bools or None.
        path: the file; its folder must exist.

    Raises:
        TypeError: a leaf of another type, or a key that is not a string.
    """
    tensors: dict[str, Tensor] = {}
    plain = _take_tensors(state, tensors)
    data = save(tensors, metadata={_HEADER: json.dumps(plain)})
    write_atomic(Path(path), data, mode=0o600)


def load_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `save_state` wrote.

    Raises:
        ValueError: not such a file, or a damaged one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(_HEADER)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable state file: {error}") from None
    if header is None:
        raise ValueError(f"{path} holds no training state")
    try:
        state = _put_tensors(json.loads(header), tensors)
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} is damaged: its state is not a mapping")
    return state


def _take_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The value with every tensor replaced by a reference into ``tensors``."""
    if isinstance(value, Tensor):
        key = str(len(tensors))
        # safetensors refuses views that share memory; clones are independent.
        tensors[key] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: key}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"state keys must be strings, got {key!r}")
        return {key: _take_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_take_tensors(item, tensors) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"state leaves must be tensors or plain values, got {type(value).__name__}")


def _put_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _put_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_put_tensors(item, tensors) for item in value]
    return value
