"""Training methods as callbacks: of `aerogel.train`, of Hugging Face's Trainer and of Lightning.

    callback = PrunerCallback(pruner_factory("rigl", sparsity=0.9, steps=1000))
    callback = make_trainer_callback(pruner_factory("rigl", sparsity=0.9, steps=1000))
    callback = make_lightning_callback(pruner_factory("rigl", sparsity=0.9, steps=1000))

All three make their pruner when training begins, because only then the optimizer exists, and let
its `step` stand in the place of the optimizer's, whoever calls that. So a trainer's run ends with
the very bits of a plain loop with `pruner.step()`. While it lasts, the model's `state_dict` is that
of a plain sparse network; what resuming needs besides is the callback's state. Under Accelerate no
callback is needed: give the pruner the prepared optimizer and call its `step`.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aerogel.nested import load_state, save_state
from aerogel.pruning.method import (
    METHODS,
    Goal,
    Pruner,
    RewritingMethod,
    TrainingMethod,
    method_slug,
)
from aerogel.pruning.selection import parameters_for
from aerogel.sparsity.plain_state import PlainState, restore_weights, stored_weights
from aerogel.sparsity.select import unknown_name

STATE_FILE = "aerogel_pruner.safetensors"

PrunerFactory = Callable[[nn.Module, torch.optim.Optimizer], Pruner]


def pruner_factory(
    method: str,
    sparsity: float,
    steps: int,
    *,
    pattern: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    **options: Any,
) -> PrunerFactory:
    """What makes the pruner of any training method, as a recipe would.

    Args:
        method: slug, one of `aerogel.pruning.METHODS`. The model of a `RewritingMethod` must be
            what its `rewrite` gave.
        sparsity: fraction of zeros at the end, in [0, 1).
        steps: optimizer steps of the training.
        pattern: what is zero together; None takes the method's own.
        include: globs of the weights to prune; none takes what model or method propose, else every
            linear and convolution weight that the pattern fits.
        exclude: globs of weights to leave dense.
        options: more attributes of a `Goal`: ``begin``, ``end``, ``updates``, ``seed``, ...

    Raises:
        ValueError: not a training method, or a pattern that it does not prune by. The factory
            raises it for a network that the method is not for.
    """
    known = {slug: found for slug, found in METHODS.items() if isinstance(found, TrainingMethod)}
    slug = method_slug(method)
    if slug not in known:
        raise ValueError(unknown_name("training method", slug, known))
    chosen = known[slug]
    by = pattern or chosen.pattern or "unstructured"
    if not chosen.prunes_by(by):
        raise ValueError(f"pattern = {by!r}: {slug} prunes by {', '.join(chosen.patterns)}")

    def names_in(model: nn.Module) -> tuple[str, ...]:
        if isinstance(chosen, RewritingMethod):
            return chosen.masked(model)
        return parameters_for(chosen, model, by, include, exclude)

    def make(model: nn.Module, optimizer: torch.optim.Optimizer) -> Pruner:
        return chosen.build(model, optimizer, Goal(names_in(model), sparsity, by, steps, **options))

    return make


class Attached:
    """A pruner in the place of a running optimizer's step, until `finalize`.

    Args:
        factory: ``factory(model, optimizer)`` makes the pruner.
        model: with the weights to begin with, or those of the checkpoint to go on from.
        optimizer: whose `step` somebody else calls; Accelerate's wrapper of one will do.
        state: of `state_dict`, to go on.
    """

    def __init__(
        self,
        factory: PrunerFactory,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        # A fresh pruner begins by zeroing weights, so those of a checkpoint are put back after.
        before = [(p, p.detach().clone()) for p in model.parameters()] if state else []
        self.pruner = factory(model, optimizer)
        if state:
            with torch.no_grad():
                for parameter, value in before:
                    parameter.copy_(value)
            restore_weights(model, state["weights"])
            self.pruner.load_state_dict(state["pruner"])
        self._plain = PlainState(model)
        self._original: Any = optimizer.step
        optimizer.step = self._standing_in()  # type: ignore[method-assign]

    def state_dict(self) -> dict[str, Any]:
        """The pruner's state, and the weights that masks hide."""
        return {"pruner": self.pruner.state_dict(), "weights": stored_weights(self.model)}

    def finalize(self) -> None:
        """Give the optimizer its step back and leave a plain sparse model."""
        self.optimizer.step = self._original  # type: ignore[method-assign]
        self._plain.remove()
        self.pruner.finalize()

    def _standing_in(self) -> Any:
        """`optimizer.step` as a method that asks the pruner, which calls the original in turn."""
        original, pruner = self._original, self.pruner
        inside = False

        @functools.wraps(original)
        def step(_: Any, closure: Callable[[], Any] | None = None) -> Any:
            nonlocal inside
            if inside:
                return original()
            loss = None
            if closure is not None:  # Lightning computes the gradients in it
                with torch.enable_grad():
                    loss = closure()
            inside = True
            try:
                pruner.step()
            finally:
                inside = False
            return loss

        # Learning-rate schedulers that come later wrap it, and want a bound method.
        return types.MethodType(step, self.optimizer)


class PrunerCallback:
    """A pruner as callback of `aerogel.train.fit` (or of any loop that calls these methods).

    ``run`` needs the attributes ``model`` and ``optimizer``.

    Args:
        factory: ``factory(model, optimizer)`` makes the pruner.
    """

    def __init__(self, factory: PrunerFactory) -> None:
        self.factory = factory
        self._attached: Attached | None = None
        self._pending: Mapping[str, Any] = {}

    @property
    def pruner(self) -> Pruner | None:
        """The pruner, once training began."""
        return None if self._attached is None else self._attached.pruner

    def on_train_begin(self, run: Any) -> None:
        """Make the pruner, and let it resume if a state was loaded."""
        self._attached = Attached(self.factory, run.model, run.optimizer, self._pending)
        self._pending = {}

    def on_optimizer_step(self, run: Any) -> None:
        """Nothing to do: the optimizer's step was the pruner's."""

    def on_epoch_end(self, run: Any) -> None:
        """Nothing to do: pruning counts optimizer steps."""

    def on_train_end(self, run: Any) -> None:
        """Bake the zeros in."""
        assert self._attached is not None
        self._attached.finalize()

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs besides the model; empty before training began."""
        return {} if self._attached is None else self._attached.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume; before training begins."""
        self._pending = state


def make_trainer_callback(factory: PrunerFactory) -> Any:
    """A `transformers.TrainerCallback` around a pruner that ``factory(model, optimizer)`` makes.

    Every checkpoint is a plain sparse model, with the pruner's state in a file beside it.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import TrainerCallback

    class TrainerPruning(TrainerCallback):
        """Lets a pruner stand in the optimizer's place and finalizes it at the end of training."""

        attached: Attached | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if args.load_best_model_at_end:
                raise ValueError(
                    "load_best_model_at_end = True: expected False, because the masks of the last "
                    "step do not belong to the weights of the best one"
                )
            saved = None
            if state.global_step > 0:
                file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE
                if not file.exists():
                    raise ValueError(f"cannot resume pruning: {file} is missing")
                saved = load_state(file)
            self.attached = Attached(factory, kwargs["model"], kwargs["optimizer"], saved)

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.attached is not None and state.is_world_process_zero:
                folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                save_state(self.attached.state_dict(), folder / STATE_FILE)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert self.attached is not None
            self.attached.finalize()

    return TrainerPruning()


def make_lightning_callback(factory: PrunerFactory, network: str = "") -> Any:
    """A `lightning.pytorch.Callback` around a pruner that ``factory(module, optimizer)`` makes.

    Every checkpoint is of a plain sparse module and holds the pruner's state as the callback's.

    Args:
        factory: makes the pruner.
        network: name of the module to prune within the `LightningModule`. By default it is the
            whole, and names of weights begin with its attributes'. A method that has a teacher
            (gpusq-vit) needs the network whose `forward` gives the class scores.

    Raises:
        ImportError: Lightning is not installed.
    """
    from lightning.pytorch import Callback

    class LightningPruning(Callback):
        """Lets a pruner stand in the optimizer's place and finalizes it at the end of training."""

        attached: Attached | None = None
        pending: Mapping[str, Any] | None = None

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            if len(trainer.optimizers) != 1:
                raise ValueError(f"expected one optimizer, got {len(trainer.optimizers)}")
            (optimizer,) = trainer.optimizers
            module = pl_module.get_submodule(network)
            self.attached = Attached(factory, module, optimizer, self.pending)
            self.pending = None

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            assert self.attached is not None
            self.attached.finalize()
            self.attached = None

        def state_dict(self) -> dict[str, Any]:
            return {} if self.attached is None else self.attached.state_dict()

        def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
            self.pending = state_dict

    return LightningPruning()
