"""Static sparse training: masks that are decided once and never change."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from aerogel.sparsity.controlled import ControlledTrainer
from aerogel.sparsity.controller import MaskController
from aerogel.sparsity.masks import MaskSet
from aerogel.sparsity.select import select_parameters


class StaticSparseTrainer(ControlledTrainer):
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
        controller = MaskController(
            model, optimizer, selection, "hard", masks=MaskSet(masks).clone()
        )
        super().__init__(controller)
