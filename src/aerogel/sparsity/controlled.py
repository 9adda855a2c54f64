"""The face that every trainer on a `MaskController` shows: what stands for the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from aerogel.sparsity.controller import GradScaler, MaskController
from aerogel.sparsity.mask_set import MaskSet


class ControlledTrainer:
    """Steps a mask controller; call `step` where ``optimizer.step()`` stood.

    Subclasses make the `controller`, and override what they do more.

    Args:
        controller: holds the masks.
    """

    def __init__(self, controller: MaskController) -> None:
        self.controller = controller

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that trains the model."""
        return self.controller.optimizer

    def step(self, scaler: GradScaler | None = None, *, unscaled: bool = False) -> bool:
        """Take one optimizer step, and change the masks if it is time; see `MaskController.step`.

        Args:
            scaler: of mixed precision, if any; call ``scaler.update()`` afterwards as usual.
            unscaled: gradients were unscaled already (to clip them).

        Returns:
            Whether the optimizer stepped.
        """
        return self.controller.step(scaler, unscaled=unscaled)

    def mask_gradients(self) -> None:
        """Mask this step's gradients now, to clip them; see `MaskController.mask_gradients`."""
        self.controller.mask_gradients()

    def follow_optimizer(self) -> None:
        """Act around every ``optimizer.step()`` instead, under a trainer that calls it itself."""
        self.controller.follow_optimizer()

    def after_optimizer_step(self) -> None:
        """What `step` does after the optimizer has stepped, for trainers that only tell so."""
        self.controller.after_optimizer_step()

    @property
    def t(self) -> int:
        """Optimizer steps taken."""
        return self.controller.t

    @property
    def masks(self) -> MaskSet:
        """The masks in force, ``True`` = kept."""
        return self.controller.masks

    def finalize(self) -> MaskSet:
        """Bake the zeros into the weights, leave a plain model behind, and return the masks."""
        return self.controller.finalize()

    def state_dict(self) -> dict[str, Any]:
        """State to resume from, bit for bit: nested dicts of tensors and plain numbers."""
        return self.controller.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume; load the model's and the optimizer's state first."""
        self.controller.load_state_dict(state)
