"""What pruners share that make a network sparser along a schedule while it trains."""

from __future__ import annotations

import warnings
from typing import Literal

from aerogel.arguments import check_count
from aerogel.sparsity.controlled import ControlledTrainer
from aerogel.sparsity.controller import MaskController
from aerogel.sparsity.masks import MaskSet
from aerogel.sparsity.schedules import Cubic, OneShot

FineTuning = Literal["cubic", "one-shot"] | Cubic | OneShot

# New masks within a ramp; more make no visible difference.
_UPDATES = 40


def fine_tuning_schedule(schedule: FineTuning, sparsity: float, steps: int) -> Cubic | OneShot:
    """The schedule of pruning a trained network while it is fine-tuned.

    Args:
        schedule: ``"cubic"`` (a ramp over the first half), ``"one-shot"`` (all with the first
            step), or a `Cubic` or `OneShot` of one's own.
        sparsity: fraction of zeros at its end.
        steps: optimizer steps of the fine-tuning.

    Raises:
        ValueError: an unknown name, another sparsity at the end, or too few steps.
    """
    check_count("steps", steps)
    if isinstance(schedule, (Cubic, OneShot)):
        end = schedule.s_f if isinstance(schedule, Cubic) else schedule.s
        if abs(end - sparsity) > 1e-9:
            raise ValueError(f"schedule ends at sparsity {end}, expected {sparsity}")
        return schedule
    if schedule == "one-shot":
        return OneShot(0, sparsity)
    if schedule != "cubic":
        raise ValueError(f"schedule must be 'cubic', 'one-shot' or a schedule, got {schedule!r}")
    ramp = steps // 2
    if ramp < 1:
        raise ValueError(f"steps = {steps} leave no room for a ramp; schedule='one-shot'?")
    every = -(-ramp // _UPDATES)
    return Cubic(0.0, sparsity, 0, ramp // every, every)


class ScheduledPruner(ControlledTrainer):
    """Steps a mask controller; call `step` where ``optimizer.step()`` stood.

    Args:
        controller: holds the masks.
        schedule: the sparsity over the steps.
        final_sparsity: fraction of zeros at the schedule's end.
    """

    def __init__(
        self, controller: MaskController, schedule: Cubic | OneShot, final_sparsity: float
    ) -> None:
        super().__init__(controller)
        self.schedule = schedule
        self.final_sparsity = final_sparsity

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, so that a pruner can stand where the optimizer stood."""
        self.optimizer.zero_grad(set_to_none)

    def sparsity_at(self, t: int) -> float:
        """Scheduled fraction of zeros after step ``t``."""
        return 0.0 if t < self._first_due else self.schedule.value(t)

    def finalize(self) -> MaskSet:
        """Bake the zeros into the weights, leave a plain model behind, and return the masks.

        Raises:
            RuntimeError: nothing was ever pruned.
        """
        sparsity = self.masks.sparsity()
        if self.final_sparsity > 0 and sparsity == 0:
            raise RuntimeError(
                f"nothing was pruned in {self.t} steps: is pruner.step() called in place of "
                f"optimizer.step(), and begin_step={self._first_due} within the training?"
            )
        if self.t <= self._last_due:
            warnings.warn(
                f"finalized after {self.t} steps, before the ramp's end at step {self._last_due}: "
                f"sparsity is {sparsity:.4f}, not {self.final_sparsity}",
                stacklevel=2,
            )
        return super().finalize()

    @property
    def _first_due(self) -> int:
        return self.schedule.at if isinstance(self.schedule, OneShot) else self.schedule.begin

    @property
    def _last_due(self) -> int:
        return self.schedule.at if isinstance(self.schedule, OneShot) else self.schedule.end
