"""A training run in progress, and what may take part in it."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn

from aerogel.train.config import TrainConfig
from aerogel.train.history import History, zero_fraction


class Stepper(Protocol):
    """What may stand in for the optimizer's step: a pruner, for example.

    One that has ``mask_gradients()`` is asked to mask them before they are clipped.
    """

    def step(self) -> Any:
        """Take one optimizer step, and whatever comes with it."""

    def state_dict(self) -> dict[str, Any]:
        """What has to survive a kill."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Take back what `state_dict` returned."""


@dataclasses.dataclass
class Run:
    """A run in progress, as callbacks see it."""

    model: nn.Module  # never wrapped for several processes
    optimizer: torch.optim.Optimizer
    stepper: Stepper | None
    config: TrainConfig
    total_steps: int
    history: History
    accelerator: Accelerator
    step: int = 0  # steps done
    epoch: int = 0  # passes begun before this one

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over the weights that pruning may touch."""
        return zero_fraction(self.model)


class Callback:
    """Hooks of a run; override what you need. All run on every process."""

    def on_train_begin(self, run: Run) -> None:
        """Before the first step (also of a resumed run)."""

    def on_optimizer_step(self, run: Run) -> None:
        """After each optimizer step; `run.step` counts the steps done."""

    def on_epoch_end(self, run: Run) -> None:
        """After each pass over the data, and after the last step."""

    def on_train_end(self, run: Run) -> None:
        """After the last step."""

    def state_dict(self) -> dict[str, Any]:
        """What has to survive a kill."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
