"""Rounds of training and pruning, kept on disk so that a killed search goes on where it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aerogel.nested import load_state, save_state
from aerogel.sparsity.masks import MaskSet
from aerogel.sparsity.ownership import fitted_masks
from aerogel.sparsity.rewind import Snapshot
from aerogel.sparsity.select import ParamSelection

State = dict[str, Tensor]


@dataclass(frozen=True)
class RoundResult:
    """One round: a training, and what it was of.

    Attributes:
        round: 0 is the dense network.
        density: fraction of the prunable weights that were trained.
        masks: which ones.
        metrics: of the training function.
        steps: optimizer steps of a whole training.
        final_state: state dict at the end of the training.
    """

    round: int
    density: float
    masks: MaskSet
    metrics: dict[str, float]
    steps: int
    final_state: State = field(repr=False)


@dataclass(frozen=True)
class SavedRound:
    """All that later rounds need from one.

    Attributes:
        result: what it was of and came to.
        next_masks: decided at its end.
        rewound: the state captured in it that tickets are reset to, if it was.
    """

    result: RoundResult
    next_masks: MaskSet
    rewound: Snapshot | None


class RoundFiles:
    """One file a round, written atomically once the round is over.

    Args:
        folder: made if need be.
        settings: what decides the outcome of the search: plain values. A folder of other settings
            is refused.
        initial: the network's initial state. A folder of another one is refused.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], initial: Snapshot) -> None:
        self.folder, self.settings, self.initial = folder, dict(settings), initial
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, saved: SavedRound) -> None:
        """Write a round."""
        result = saved.result
        state = {
            "settings": self.settings,
            "masks": result.masks.state_dict(),
            "next_masks": saved.next_masks.state_dict(),
            "metrics": result.metrics,
            "steps": result.steps,
            "final_state": result.final_state,
            "initial": _packed(self.initial) if result.round == 0 else None,
            "rewound": None if saved.rewound is None else _packed(saved.rewound),
        }
        save_state(state, self._path(result.round))

    def load(self, number: int, selection: ParamSelection, masks: MaskSet) -> SavedRound | None:
        """Read a round, or None if it was not finished.

        Args:
            number: of the round.
            selection: the parameters that masks are for.
            masks: what the round before it left, all ones for round 0.

        Raises:
            ValueError: the file is damaged, or of another run or architecture.
        """
        path = self._path(number)
        if not path.exists():
            return None
        state = load_state(path)
        self._check_same_run(path, state)
        found = _fitted(path, state["masks"], selection)
        if found != masks:
            raise ValueError(f"{path} does not follow from the round before it")
        result = RoundResult(
            number,
            found.density(),
            found,
            dict(state["metrics"]),
            int(state["steps"]),
            dict(state["final_state"]),
        )
        rewound = None if state["rewound"] is None else _unpacked(state["rewound"])
        return SavedRound(result, _fitted(path, state["next_masks"], selection), rewound)

    def _path(self, number: int) -> Path:
        return self.folder / f"round-{number:03d}.safetensors"

    def _check_same_run(self, path: Path, state: Mapping[str, Any]) -> None:
        for name, value in self.settings.items():
            if state["settings"][name] != value:
                raise ValueError(
                    f"{path} is of another run: {name} was {state['settings'][name]}, now {value}"
                )
        if state["initial"] is None:
            return
        if not same_state(_unpacked(state["initial"]), self.initial):
            raise ValueError(f"{path} is of another run: its initial weights differ")


def same_state(one: Snapshot, other: Snapshot) -> bool:
    """Whether two snapshots hold the same parameters and buffers, bit for bit."""
    return _same(one.params, other.params) and _same(one.buffers, other.buffers)


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        value.shape == other[name].shape and torch.equal(value.cpu(), other[name].cpu())
        for name, value in one.items()
    )


def _packed(snapshot: Snapshot) -> dict[str, Any]:
    return {"params": snapshot.params, "buffers": snapshot.buffers, "step": snapshot.step}


def _unpacked(state: Mapping[str, Any]) -> Snapshot:
    return Snapshot(dict(state["params"]), dict(state["buffers"]), int(state["step"]))


def _fitted(path: Path, bits: Mapping[str, Tensor], selection: ParamSelection) -> MaskSet:
    try:
        return fitted_masks(MaskSet.from_state_dict(bits), selection)
    except ValueError as error:
        raise ValueError(f"{path} holds masks of another architecture: {error}") from None
