"""Static sparse training: masks that are decided once and never change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from aerogel.sparsity.controller import GradScaler, MaskController
from aerogel.sparsity.masks import MaskSet
from aerogel.sparsity.select import select_parameters


class StaticSparseTrainer:
    """Trains a network whose zeros stay where they are; call `step` in place of the optimizer's.

    After every optimizer step the pruned weights and their optimizer state (momentum, moments) are
    exactly zero, whatever weight decay and momentum did to them.

    Args:
        model: any module; its pruned weights are set to zero at once.
        optimizer: any `torch.optim` optimizer over its parameters.
        masks: parameter name -> bool mask, ``True`` = kept; they are copied.

    Raises:
        ValueError: no masks, a mask for an unknown name or of another shape (another
            architecture), or a parameter that another controller masks.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, masks: Mapping[str, torch.Tensor]
    ) -> None:
        if not masks:
            raise ValueError("masks is empty: there is nothing to hold at zero")
        selection = select_parameters(model, include=tuple(masks))
        self.controller = MaskController(
            model, optimizer, selection, "hard", masks=MaskSet(masks).clone()
        )

    def step(self, scaler: GradScaler | None = None, *, unscaled: bool = False) -> bool:
        """One optimizer step, after which pruned weights are zero; see `MaskController.step`."""
        return self.controller.step(scaler, unscaled=unscaled)

    def follow_optimizer(self) -> None:
        """Act on every ``optimizer.step()`` instead, for trainers that own the loop."""
        self.controller.follow_optimizer()

    @property
    def masks(self) -> MaskSet:
        """The masks in force."""
        return self.controller.masks

    def finalize(self) -> MaskSet:
        """Let go of the model; returns the masks."""
        return self.controller.finalize()

    def state_dict(self) -> dict[str, Any]:
        """What has to survive a kill; the masks are part of it."""
        return self.controller.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume; load the model's and the optimizer's state first."""
        self.controller.load_state_dict(state)
