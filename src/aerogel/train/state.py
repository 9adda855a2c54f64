"""The state of a training run in one file: safetensors, with everything else as JSON in its header.

One file and one rename: whenever a run is killed, the state on disk is complete and of one step.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from aerogel.atomic import write_atomic

FILE = "state.safetensors"
_VERSION = 1


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write a nested state (dicts, lists, tuples, tensors, numbers, strings, None) atomically.

    Args:
        folder: where `state.safetensors` goes; made if it is missing.
        state: what `load_state` will give back.

    Raises:
        TypeError: a value that is none of the above, with its place.
        OSError: the folder cannot be written; an older state is left as it was.
    """
    tensors: dict[str, Tensor] = {}
    tree = _flatten(state, "", tensors)
    header = {"aerogel.train": json.dumps({"version": _VERSION, "state": tree})}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / FILE, save(tensors, metadata=header), mode=0o600)


def load_state(folder: Path) -> dict[str, Any] | None:
    """Read the state of a run, or None if there is none yet.

    Raises:
        ValueError: the file is damaged or was not written by `save_state`.
    """
    path = folder / FILE
    _sweep(folder)
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["aerogel.train"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if header["version"] != _VERSION:
            raise ValueError(f"version {header['version']}, expected {_VERSION}")
        state = _restore(header["state"], tensors)
    except (SafetensorError, KeyError, IndexError, TypeError, ValueError, OSError) as error:
        raise ValueError(
            f"{path} cannot be resumed ({error}); remove it to start this training anew"
        ) from error
    return state


def _flatten(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for a nested value; tensors move to `tensors`, keys that are not text are kept."""
    if isinstance(value, Tensor):
        key = place or "tensor"
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


def _sweep(folder: Path) -> None:
    """Remove temporary files of a killed run."""
    for leftover in folder.glob(f".{FILE}-*"):
        with contextlib.suppress(OSError):
            leftover.unlink()


def random_seed(seed: int, step: int, rank: int) -> int:
    """Seed of torch's generator for one step of one process: resuming needs no generator state."""
    mixed = (
        seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB
    ) % 2**64
    mixed ^= mixed >> 31
    return (mixed * 0xD6E8FEB86659FD93 % 2**64) >> 1


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make everything random in this step a function of (seed, step, rank)."""
    torch.manual_seed(random_seed(seed, step, rank))
