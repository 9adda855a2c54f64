"""The training loop: one plain loop on Accelerate, the same on one process and on many.

Everything random is a function of (seed, epoch, step, sample), so a run that was killed and resumed
ends with the same bits as one that was not.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from aerogel.train.allocator import keep_freed_memory
from aerogel.train.batches import epoch_order, shares, take
from aerogel.train.clock import Clock
from aerogel.train.config import TrainConfig
from aerogel.train.evaluate import evaluate
from aerogel.train.features import FeatureMatch
from aerogel.train.history import History, OnProgress
from aerogel.train.losses import training_loss
from aerogel.train.run import Callback, Run, Stepper
from aerogel.train.state import load_state, save_state, seed_step
from aerogel.train.sync_batchnorm import synchronized_batch_norm

_CURVE_POINTS = 200
_ALL_RANKS = -1


def fit(
    model: nn.Module,
    dataset: Any,
    config: TrainConfig,
    *,
    optimizer_wrapper: Callable[[nn.Module, torch.optim.Optimizer], Stepper] | None = None,
    callbacks: Sequence[Callback] = (),
    teacher: nn.Module | None = None,
    resume_dir: str | Path | None = None,
    save_seconds: float = 30.0,
    on_progress: OnProgress | None = None,
) -> History:
    """Train a model in place; under `torchrun` or `accelerate launch`, on all processes.

    Args:
        model: the network; its outputs are logits, or embeddings if the data has no targets.
        dataset: with `train` and `test` splits (see `aerogel.data.Dataset`).
        config: how to train.
        optimizer_wrapper: called once as `(model, optimizer)`; the `step()` of what it returns is
            called in place of the optimizer's, e.g. a `GradualPruner`. Its state is saved too.
        callbacks: hooks, see `Callback`.
        teacher: a frozen network to learn from; called with the same inputs.
        resume_dir: folder of the run's state. A state found there is resumed; a finished one
            returns at once. None keeps no state.
        save_seconds: least time between two saved states; one is saved after each epoch as well.
        on_progress: called by the first process about four times a second.

    Returns:
        The curves of the run.

    Raises:
        ValueError: the batch does not divide over the processes, the data set is smaller than a
            batch, or the saved state belongs to another run (the differences are listed).
        FloatingPointError: the loss is no longer finite.
    """
    keep_freed_memory()
    torch_rng = torch.random.get_rng_state()
    try:
        loop = _Loop(model, dataset, config, optimizer_wrapper, callbacks, teacher, resume_dir)
        with synchronized_batch_norm(model), loop:
            return loop.run(save_seconds, on_progress)
    finally:
        torch.random.set_rng_state(torch_rng)
        for network in (model, teacher):
            if network is not None:
                _lay_out(network, torch.contiguous_format)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD or AdamW with weight decay on weights only (not on biases, norms, or what the model
    names in `no_weight_decay()`)."""
    skip: set[str] = getattr(model, "no_weight_decay", set)()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if p.dim() > 1 and name not in skip]
    plain = [p for name, p in named if p.dim() <= 1 or name in skip]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("the model has no parameter that requires a gradient")
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999))
    return torch.optim.SGD(
        groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0
    )


class _Loop:
    """One call of `fit`: set up in `__init__`, run in `run`."""

    def __init__(
        self,
        model: nn.Module,
        dataset: Any,
        config: TrainConfig,
        wrapper: Callable[[nn.Module, torch.optim.Optimizer], Stepper] | None,
        callbacks: Sequence[Callback],
        teacher: nn.Module | None,
        resume_dir: str | Path | None,
    ) -> None:
        # With batch norm synchronised, all buffers are equal already: nothing to broadcast.
        plain = DistributedDataParallelKwargs(broadcast_buffers=False)
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[plain])
        self.rank = self.accelerator.process_index
        self.world = self.accelerator.num_processes
        if config.batch_size % (self.world * config.grad_accumulation):
            raise ValueError(
                f"batch_size = {config.batch_size} does not divide over {self.world} processes "
                f"with grad_accumulation = {config.grad_accumulation}"
            )
        self.dataset, self.config, self.callbacks = dataset, config, callbacks
        self.folder = None if resume_dir is None else Path(resume_dir)
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        _lay_out(model.to(self.accelerator.device).train(), layout)
        self.teacher = teacher
        if teacher is not None:
            _lay_out(teacher.to(self.accelerator.device).eval(), layout)
        self.features: FeatureMatch | None = None
        optimizer = make_optimizer(model, config)
        stepper = wrapper(model, optimizer) if wrapper is not None else None
        self.per_epoch = config.steps_per_epoch(len(dataset.train))
        total = config.total_steps(len(dataset.train))
        self.state = Run(model, optimizer, stepper, config, total, History(), self.accelerator)
        self._resume()
        # Wrapped last: a pruner may have registered parametrizations on the model.
        self.wrapped = self.accelerator.prepare_model(model) if self.world > 1 else model

    def __enter__(self) -> _Loop:
        if self.config.distill_features:
            if self.teacher is None:
                raise ValueError("distill_features: expected a teacher to learn them from")
            names = self.config.distill_features
            self.features = FeatureMatch(self.state.model, self.teacher, names)
        return self

    def __exit__(self, *error: object) -> None:
        if self.features is not None:
            self.features.remove()

    def run(self, save_seconds: float, on_progress: OnProgress | None) -> History:
        run = self.state
        if run.step >= run.total_steps:
            return run.history
        self._call("on_train_begin")
        clock = Clock(run.step, save_seconds)
        losses: list[float] = []
        while run.step < run.total_steps:
            run.epoch, first = divmod(run.step, self.per_epoch)
            order = self._order(run.epoch)
            last = min(self.per_epoch, first + run.total_steps - run.step)
            for step in range(first, last):
                with clock.timed(run.history):
                    losses.append(self._train_step(order, step))
                self._call("on_optimizer_step")
                losses = self._log(losses)
                if on_progress is not None and self.rank == 0:
                    clock.report(run, losses, on_progress, self.config)
                if step + 1 < last and self._all_agree(clock.is_time_to_save()):
                    self._save(losses)
            self._end_epoch()
            self._save(losses)
        self._call("on_train_end")
        return run.history

    def _order(self, epoch: int) -> Tensor:
        split, config = self.dataset.train, self.config
        lengths = getattr(split, "lengths", None)
        return epoch_order(len(split), config.seed, epoch, config.batch_size, lengths)

    def _train_step(self, order: Tensor, step: int) -> float:
        run, config = self.state, self.config
        seed_step(config.seed, run.step, self.rank)
        for group in run.optimizer.param_groups:
            group["lr"] = config.lr_at(run.step, run.total_steps)
            if config.schedule == "onecycle" and "momentum" in group:
                group["momentum"] = config.momentum_at(run.step, run.total_steps)
        parts = config.grad_accumulation
        micro = shares(order, step, config.batch_size, self.rank, self.world, parts)
        run.optimizer.zero_grad(set_to_none=True)
        mean = 0.0
        for number, indices in enumerate(micro):
            with self._last_syncs(number + 1 == parts):
                loss = self._loss(indices) / parts
                self.accelerator.backward(loss)
            mean += float(loss.detach())
        mean = self._mean_over_processes(mean)
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"loss is {mean} at step {run.step}; lower lr = {config.lr:g} or set gradient_clip"
            )
        if config.gradient_clip is not None:
            mask_gradients = getattr(run.stepper, "mask_gradients", None)
            if mask_gradients is not None:
                mask_gradients()
            nn.utils.clip_grad_norm_(_parameters(run.optimizer), config.gradient_clip)
        # A pruner that breaks ties by chance must break them alike on all processes.
        seed_step(config.seed, run.step, _ALL_RANKS)
        (run.stepper or run.optimizer).step()
        run.step += 1
        return mean

    def _loss(self, indices: Tensor) -> Tensor:
        run, config = self.state, self.config
        inputs, target = take(
            self.dataset.train,
            indices,
            self.accelerator.device,
            augment=config.augment,
            seed=config.seed,
            epoch=run.epoch,
            channels_last=config.channels_last,
        )
        taught = None
        if self.teacher is not None:
            with torch.no_grad():
                taught = self.teacher(*inputs)
        loss = training_loss(self.wrapped(*inputs), target, taught, config)
        if self.features is not None:
            loss = loss + config.feature_weight * self.features.loss()
        return loss

    def _last_syncs(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        if last or self.world == 1:
            return contextlib.nullcontext()
        return self.accelerator.no_sync(self.wrapped)

    def _mean_over_processes(self, value: float) -> float:
        if self.world == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.accelerator.device)
        torch.distributed.all_reduce(total)
        return float(total) / self.world

    def _all_agree(self, wish: bool) -> bool:
        """Whether to save is the first process's decision: clocks differ."""
        if self.world == 1:
            return wish
        flag = torch.tensor([int(wish)], device=self.accelerator.device)
        torch.distributed.broadcast(flag, src=0)
        return bool(flag)

    def _call(self, hook: str) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self.state)

    def _log(self, losses: list[float]) -> list[float]:
        run = self.state
        every = max(1, run.total_steps // _CURVE_POINTS)
        if run.step % every and run.step != run.total_steps:
            return losses
        run.history.steps.append(
            {
                "step": run.step,
                "epoch": run.step / self.per_epoch,
                "loss": math.fsum(losses) / len(losses),
                "lr": self.config.lr_at(run.step - 1, run.total_steps),
                "sparsity": run.sparsity,
            }
        )
        return []

    def _end_epoch(self) -> None:
        run = self.state
        limit = self.config.eval_samples
        metrics = {} if limit == 0 else evaluate(run.model, self.dataset, limit=limit)
        row = {"step": run.step, "epoch": run.step / self.per_epoch, "sparsity": run.sparsity}
        run.history.epochs.append({**row, **metrics})
        self._call("on_epoch_end")

    def _save(self, losses: list[float]) -> None:
        if self.folder is None:
            return
        if self.rank == 0:
            run = self.state
            state = {
                "about": self._about(),
                "step": run.step,
                "model": dict(run.model.state_dict()),
                "optimizer": run.optimizer.state_dict(),
                "stepper": run.stepper.state_dict() if run.stepper is not None else None,
                "callbacks": [callback.state_dict() for callback in self.callbacks],
                "history": run.history.to_dict(),
                "losses": losses,
            }
            save_state(self.folder, state)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        if self.folder is None:
            return
        state = load_state(self.folder)
        if state is None:
            return
        _check_same(self._about(), state["about"], self.folder)
        run = self.state
        run.model.load_state_dict(state["model"])
        run.optimizer.load_state_dict(state["optimizer"])
        _lay_out_state(run.optimizer)
        if run.stepper is not None:
            run.stepper.load_state_dict(state["stepper"])
        for callback, saved in zip(self.callbacks, state["callbacks"], strict=True):
            callback.load_state_dict(saved)
        run.history = History(**state["history"])
        run.step = state["step"]

    def _about(self) -> dict[str, Any]:
        data = {"data": getattr(self.dataset, "name", ""), "samples": len(self.dataset.train)}
        names = {"callbacks": [type(callback).__name__ for callback in self.callbacks]}
        stepper = type(self.state.stepper).__name__
        return {**self.config.fingerprint(), **data, **names, "optimizer_wrapper": stepper}


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _lay_out(model: nn.Module, layout: torch.memory_format) -> None:
    """Change the memory layout of all convolution weights in place."""
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=layout)


def _lay_out_state(optimizer: torch.optim.Optimizer) -> None:
    """Give restored optimizer state the layout of its parameter, as it had when it was saved:
    the last bit of a result can depend on the order in which memory is walked."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _check_same(ours: dict[str, Any], saved: dict[str, Any], folder: Path) -> None:
    differ = [
        f"{key} is {ours.get(key)!r}, was {saved.get(key)!r}"
        for key in sorted(ours.keys() | saved.keys())
        if ours.get(key) != saved.get(key)
    ]
    if differ:
        raise ValueError(
            f"the state in {str(folder)!r} belongs to another run: {'; '.join(differ)}; "
            "remove it to start this training anew"
        )
