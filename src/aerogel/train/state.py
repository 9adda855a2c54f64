"""Where a training run keeps its state, and the random numbers of its steps.

One file and one rename: whenever a run is killed, the state on disk is complete and of one step.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from aerogel import nested

FILE = "state.safetensors"


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write a run's nested state atomically.

    Args:
        folder: where `state.safetensors` goes; made if it is missing.
        state: what `load_state` will give back.

    Raises:
        TypeError: a value that cannot be stored, with its place.
        OSError: the folder cannot be written; an older state is left as it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    nested.save_state(state, folder / FILE)


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
        state: dict[str, Any] = nested.load_state(path)
    except ValueError as error:
        raise ValueError(f"{error}; remove it to start this training anew") from error
    return state


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
