"""Pruners as callbacks: under `aerogel.train` and under Hugging Face's Trainer, for every method.

Both make their pruner when training begins, because only then the optimizer exists. The pruner must
therefore keep zeros in the parameters themselves (`Frozen(in_place=True)` or a hard coupling), so
that a checkpoint can be loaded before the pruner is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from aerogel.nested import load_state, save_state

STATE_FILE = "aerogel_pruner.safetensors"


class Pruner(Protocol):
    """What the callbacks need of a method."""

    def after_optimizer_step(self) -> None:
        """Called after each optimizer step."""
        ...

    def finalize(self) -> object:
        """Called when training ends."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Plain state."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore plain state."""
        ...


PrunerFactory = Callable[[nn.Module, torch.optim.Optimizer], Pruner]


class PrunerCallback:
    """A pruner as callback of `aerogel.train.fit` (or of any loop that calls these methods).

    ``run`` needs the attributes ``model`` and ``optimizer``.

    Args:
        factory: ``factory(model, optimizer)`` makes the pruner.
    """

    def __init__(self, factory: PrunerFactory) -> None:
        self.factory = factory
        self.pruner: Pruner | None = None
        self._pending: Mapping[str, Any] | None = None

    def on_train_begin(self, run: Any) -> None:
        """Make the pruner, and let it resume if a state was loaded."""
        self.pruner = self.factory(run.model, run.optimizer)
        if self._pending is not None:
            self.pruner.load_state_dict(self._pending)
            self._pending = None

    def on_optimizer_step(self, run: Any) -> None:
        """Prune if it is time, and keep the zeros."""
        assert self.pruner is not None
        self.pruner.after_optimizer_step()

    def on_epoch_end(self, run: Any) -> None:
        """Nothing to do: pruning counts optimizer steps."""

    def on_train_end(self, run: Any) -> None:
        """Bake the zeros in."""
        assert self.pruner is not None
        self.pruner.finalize()

    def state_dict(self) -> dict[str, Any]:
        """The pruner's state; empty before training began."""
        return {} if self.pruner is None else self.pruner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume; may come before training begins."""
        if not state:
            return
        if self.pruner is None:
            self._pending = state
        else:
            self.pruner.load_state_dict(state)


def make_trainer_callback(factory: PrunerFactory) -> Any:
    """A `transformers.TrainerCallback` around a pruner that ``factory(model, optimizer)`` makes.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import TrainerCallback

    class TrainerPruning(TrainerCallback):
        """Steps a pruner after each optimizer step and finalizes it at the end of training."""

        pruner: Pruner | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.pruner = factory(kwargs["model"], kwargs["optimizer"])
            if state.global_step > 0:
                saved = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE
                if not saved.exists():
                    raise ValueError(f"cannot resume pruning: {saved} is missing")
                self.pruner.load_state_dict(load_state(saved))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert self.pruner is not None
            self.pruner.after_optimizer_step()

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.pruner is not None and state.is_world_process_zero:
                folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                save_state(self.pruner.state_dict(), folder / STATE_FILE)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert self.pruner is not None
            self.pruner.finalize()

    return TrainerPruning()
