"""MaskController: the order of one training step, for every method that trains with masks.

1. dense gradients are captured if an update is due; 2. gradients are changed if the coupling says
so; 3. the optimizer steps; 4. if due, masks are decided anew; 5. masks act on weights and optimizer
state; 6. t += 1. Weight decay and momentum live in the optimizer's step, so masks act after it.

Where the coupling masks gradients, they are masked as ``backward`` leaves them, except on steps
whose dense gradient an update needs.

Nothing here depends on the rank: scores come from weights and reduced gradients, which are equal on
all ranks, and random choices from a generator seeded equally. So are the masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from aerogel.sparsity.coupling import Coupling, make_coupling
from aerogel.sparsity.masked_parameters import MaskedParameters
from aerogel.sparsity.masks import MaskSet
from aerogel.sparsity.ownership import fitted_masks
from aerogel.sparsity.schedules import Schedule
from aerogel.sparsity.select import ParamSelection
from aerogel.sparsity.topk import kept_count
from aerogel.sparsity.updates import Allocation, UpdateContext, UpdateRule


class GradScaler(Protocol):
    """What the controller needs of `torch.amp.GradScaler`."""

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None: ...

    def step(self, optimizer: torch.optim.Optimizer) -> object: ...


class MaskController:
    """Keeps masks on some parameters of a model while an optimizer trains it.

    Call ``loss.backward(); controller.step()`` where ``optimizer.step()`` stood. Under a trainer
    that owns the optimizer step, `follow_optimizer` does the same from the optimizer's own hooks.

    To clip gradients, call `mask_gradients` before: on steps whose masks grow by the gradient,
    ``grad`` stays dense until then or until `step`. It is not captured during ``backward``, because
    a hook there sees what one process computed in one micro-batch, before data-parallel wrappers
    average it over process groups that are theirs, before a scaler's factor is taken out, and
    without knowing of a ``zero_grad`` that drops it.

    Args:
        model: the model; named in errors only, the selection holds its parameters.
        optimizer: any `torch.optim` optimizer over them (or Accelerate's wrapper of one).
        selection: the parameters; each may be under one controller at a time.
        coupling: how masks act, a `Coupling` or its name.
        allocation: how a sparsity is shared over layers (kind, or densities per name).
        schedule: when masks change, and the sparsity or fraction then; ``None`` = never.
        update_rule: how they change.
        masks: masks to start from; all ones by default.
        update_replaces_step: on update steps the optimizer does not step (the first RigL).
        generator: CPU generator of random choices; seeded 0 by default, so equal on all ranks.

    Raises:
        ValueError: a parameter under two controllers, masks that do not fit, or a rule that needs
            dense gradients under a coupling that has none.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        selection: ParamSelection,
        coupling: Coupling | str,
        allocation: Allocation = "uniform",
        schedule: Schedule | None = None,
        update_rule: UpdateRule | None = None,
        *,
        masks: MaskSet | None = None,
        update_replaces_step: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.selection = selection
        self.coupling = make_coupling(coupling)
        self.allocation: Allocation = allocation
        self.schedule = schedule
        self.rule = update_rule or UpdateRule()
        self.update_replaces_step = update_replaces_step
        self.generator = generator or torch.Generator().manual_seed(0)
        self.t = 0
        self.finalized = False
        self._inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        self._hooks: list[Any] = []
        self._check(schedule, update_rule)
        start = MaskSet.ones(selection) if masks is None else fitted_masks(masks, selection)
        self._masked = MaskedParameters(
            selection, self.coupling, start, self, self._gradient_arrived
        )
        self._target = self._allocated(masks)
        self._fired = start.clone() if self.rule.tracks_fired else MaskSet()
        self._captured: dict[str, Tensor] = {}
        self._state_stays = False  # the optimizer step that comes keeps its state masked
        self._window = -1, False  # `_in_window`, and of which step
        self._prepared = False  # `mask_gradients` did points 1 and 2 of this step

    # ------------------------------------------------------------------------------------ stepping

    def step(self, scaler: GradScaler | None = None, *, unscaled: bool = False) -> bool:
        """One optimizer step with the masks around it.

        Args:
            scaler: of mixed precision; gradients are unscaled before anything looks at them. Call
                ``scaler.update()`` afterwards as usual.
            unscaled: the caller has unscaled already (to clip gradients).

        Returns:
            Whether a step was taken; ``False`` if the scaler skipped it for infinite gradients or a
            wrapper is still accumulating. Then nothing changed and ``t`` stays.
        """
        if self._hooks:
            raise RuntimeError(
                "the controller follows the optimizer's hooks: call optimizer.step()"
            )
        if not self._synchronises():
            self.optimizer.step()
            return False
        if scaler is not None and not unscaled:
            scaler.unscale_(self._inner)
        self.before_optimizer_step()
        if self.update_replaces_step and self.due and self._finite():
            self.after_optimizer_step()
            return True
        ran = self._optimizer_step(scaler)
        if ran:
            self.after_optimizer_step()
        else:
            self._forget()
        return ran

    def follow_optimizer(self) -> None:
        """Run around every ``optimizer.step()`` from now on, whoever calls it.

        Raises:
            ValueError: with ``update_replaces_step``, which a hook cannot do.
        """
        if self.update_replaces_step:
            raise ValueError("update_replaces_step=True needs controller.step(), not hooks")
        if not self._hooks:
            before = self._inner.register_step_pre_hook(lambda *_: self.before_optimizer_step())
            after = self._inner.register_step_post_hook(lambda *_: self.after_optimizer_step())
            self._hooks = [before, after]

    def unfollow_optimizer(self) -> None:
        """Undo `follow_optimizer`."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def mask_gradients(self) -> None:
        """Mask the gradients of this step now, so that a norm to clip by is the masked one's.

        Call it after the step's last ``backward`` (and after ``scaler.unscale_(optimizer)``):

            loss.backward()
            controller.mask_gradients()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            controller.step()

        Does nothing under couplings that do not mask gradients.
        """
        self._alive()
        if self.coupling.masks_gradient and self._synchronises():
            self.before_optimizer_step()
            self._prepared = True

    @torch.no_grad()
    def before_optimizer_step(self) -> None:
        """Points 1 and 2: capture dense gradients, then change them as the coupling says."""
        self._alive()
        if self._prepared:
            return
        if self.rule.needs_gradient and self._in_window():
            self._capture()
        self._masked.hold_new()
        for leaf, keep in self._masked.to_change():
            self.coupling.before_step(leaf, keep)
        self._state_stays = self._masked.state_stays_masked(self._inner)

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        """Points 4 to 6: decide masks if due, let them act, advance ``t``."""
        self._alive()
        self._prepared = False
        self._masked.restore_held()
        due = self.due
        # State is masked by the old masks first: what weight decay put into the state of a masked
        # entry must be gone before the entry may return.
        if due or not self._state_stays:
            self._masked.mask_state(self._inner)
        self._state_stays = False
        if due:
            self._update()
            self._masked.mask_state(self._inner)
        coupling, leaves = self.coupling, self._masked.parameters
        rates = self._learning_rates() if coupling.reads_lr else {}
        # The last weights are still in the cache, and the first ones are wanted there next.
        for name, keep in reversed(self._masked.acting()):
            coupling.after_step(leaves[name], keep, rates.get(id(leaves[name]), 0.0))
        self.t += 1
        if type(coupling).set_step is not Coupling.set_step:
            for ref in self.selection.values():
                coupling.set_step(ref, self.t)

    @property
    def due(self) -> bool:
        """Whether masks change in the step that comes."""
        return self.schedule is not None and self.schedule.due(self.t)

    # ------------------------------------------------------------------------------ what it knows

    @property
    def masks(self) -> MaskSet:
        """The masks in force (the tensors themselves, not copies)."""
        return self._masked.masks

    @property
    def fired(self) -> MaskSet:
        """Entries that were ever kept (empty unless the rule tracks them)."""
        return self._fired

    def fired_rate(self) -> float:
        """In-time over-parameterisation rate: share of entries that were ever kept."""
        return self._fired.density()

    def stored_weights(self) -> dict[str, Tensor]:
        """What every weight holds, masked entries included where the coupling keeps them."""
        return self._masked.weights()

    def finalize(self) -> MaskSet:
        """Bake W * m into the parameters, remove every trace, and return the final masks."""
        self._alive()
        final = self.masks.clone()
        self.unfollow_optimizer()
        self._masked.release(final)
        self.finalized = True
        return final

    # -------------------------------------------------------------------------------- persistence

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to resume bit for bit, as nested dicts of tensors and plain numbers."""
        return {
            "t": self.t,
            "masks": self.masks.state_dict(),
            "fired": self._fired.state_dict(),
            "target": dict(self._target),
            "held": self._masked.held_in_place(),
            "captured": {name: value.clone() for name, value in self._captured.items()},
            "generator": self.generator.get_state(),
            "rule": self.rule.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume; load the model's and the optimizer's state first.

        Raises:
            ValueError: masks of other names or shapes.
        """
        self._alive()
        loaded = fitted_masks(MaskSet.from_state_dict(state["masks"]), self.selection)
        if self.rule.tracks_fired:
            self._fired = fitted_masks(MaskSet.from_state_dict(state["fired"]), self.selection)
        self.t = int(state["t"])
        self._target = {name: int(count) for name, count in state["target"].items()}
        self._masked.load(loaded, state["held"])
        self._captured = {n: self._masked.like(n, value) for n, value in state["captured"].items()}
        self.generator.set_state(state["generator"].cpu())
        self.rule.load_state_dict(state["rule"])
        for ref in self.selection.values():
            self.coupling.set_step(ref, self.t)

    # ------------------------------------------------------------------------------------- pieces

    def _check(self, schedule: Schedule | None, rule: UpdateRule | None) -> None:
        if (schedule is None) != (rule is None):
            raise ValueError("schedule and update_rule belong together: give both or neither")
        if self.rule.needs_gradient and not self.coupling.dense_gradient:
            raise ValueError(
                f"the update rule needs dense gradients, which coupling {self.coupling.name!r} "
                f"masks; use 'hard'"
            )
        known = {id(p) for group in self._inner.param_groups for p in group["params"]}
        missing = [name for name, p in self.selection.parameters().items() if id(p) not in known]
        if missing and known:
            raise ValueError(f"the optimizer does not train {missing}")

    def _allocated(self, masks: MaskSet | None) -> dict[str, int]:
        """Counts to hold: the allocated ones, so that masks drawn at random are repaired."""
        if masks is not None and isinstance(self.allocation, Mapping):
            densities = self.allocation
            return {n: kept_count(m.numel(), densities[n]) for n, m in self.masks.items()}
        return {name: int(torch.count_nonzero(mask)) for name, mask in self.masks.items()}

    def _update(self) -> None:
        assert self.schedule is not None
        ctx = UpdateContext(
            t=self.t,
            value=self.schedule.value(self.t),
            selection=self.selection,
            masks=self.masks,
            weights=self.stored_weights(),
            gradients=self._captured,
            optimizer=self._inner,
            generator=self.generator,
            fired=self._fired,
            target=self._target,
            allocation=self.allocation,
        )
        new = self.rule.update(ctx)
        self._masked.replace(new, ctx.weights, zero_grown=self.rule.init_value == "zero")
        if self.rule.tracks_fired:
            self._fired = self._fired | new
        self._captured = {}

    def _capture(self) -> None:
        for name, leaf in self._masked.parameters.items():
            if leaf.grad is None:
                raise ValueError(f"{name!r} has no gradient to grow by at step {self.t}")
            if leaf.grad.is_sparse and self.rule.gradient_window == 1:
                # One step touches a few rows only; all others would never grow.
                raise ValueError(
                    f"{name!r} has a sparse gradient; use sparse=False embeddings, or a rule that "
                    "sums the gradients of several steps"
                )
            gradient = leaf.grad.to_dense() if leaf.grad.is_sparse else leaf.grad
            seen = self._captured.get(name)
            self._captured[name] = gradient.clone() if seen is None else seen.add_(gradient)

    def _forget(self) -> None:
        """Drop what was captured for a step that was not taken."""
        self._captured, self._prepared = {}, False

    def _gradient_arrived(self) -> bool:
        """Whether the gradient that arrives shall stay dense."""
        if self._prepared:  # the step that it was masked for was not taken
            self._forget()
        return self.rule.needs_gradient and self._in_window()

    def _in_window(self) -> bool:
        """Whether an update looks at the gradient of this step; every gradient asks."""
        if self._window[0] != self.t:
            schedule, ahead = self.schedule, range(self.rule.gradient_window)
            within = schedule is not None and any(schedule.due(self.t + step) for step in ahead)
            self._window = self.t, within
        return self._window[1]

    def _finite(self) -> bool:
        return all(bool(torch.isfinite(g).all()) for g in self._captured.values())

    def _optimizer_step(self, scaler: GradScaler | None) -> bool:
        """Let the optimizer step, and say whether it did."""
        if scaler is None and self.optimizer is self._inner:
            self.optimizer.step()
            return True
        ran: list[bool] = []
        hook = self._inner.register_step_post_hook(lambda *_: ran.append(True))
        try:
            self.optimizer.step() if scaler is None else scaler.step(self._inner)
        finally:
            hook.remove()
        return bool(ran)

    def _learning_rates(self) -> dict[int, float]:
        return {
            id(p): float(group.get("lr", 0.0))
            for group in self._inner.param_groups
            for p in group["params"]
        }

    def _synchronises(self) -> bool:
        state = getattr(self.optimizer, "gradient_state", None)
        return state is None or bool(state.sync_gradients)

    def _alive(self) -> None:
        if self.finalized:
            raise RuntimeError("the controller is finalized: its masks are baked into the weights")
