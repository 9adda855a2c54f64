"""Pruning under Hugging Face's Trainer: one thin callback for every method with a controller."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from aerogel.sparsity.persist import load_state, save_state

STATE_FILE = "aerogel_pruner.safetensors"


class Pruner(Protocol):
    """What the callback needs of a method."""

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


def make_trainer_callback(factory: PrunerFactory) -> Any:
    """A `transformers.TrainerCallback` around a pruner that ``factory(model, optimizer)`` makes.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import TrainerCallback

    class PrunerCallback(TrainerCallback):
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

    return PrunerCallback()
