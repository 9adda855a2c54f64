"""MaskController: the order of one training step, for every method that trains with masks.

1. dense gradients are captured if an update is due; 2. gradients are changed if the coupling says
so; 3. the optimizer steps; 4. if due, masks are decided anew; 5. masks act on weights and optimizer
state; 6. t += 1. Weight decay and momentum live in the optimizer's step, so masks act after it.

Nothing here depends on the rank: scores come from weights and reduced gradients, which are equal on
all ranks, and random choices from a generator seeded equally. So are the masks.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from aerogel.sparsity.coupling import Coupling, make_coupling, mask_optimizer_state
from aerogel.sparsity.masks import MaskSet
from aerogel.sparsity.ownership import claim, fitted_masks, release
from aerogel.sparsity.schedules import Schedule
from aerogel.sparsity.select import ParamRef, ParamSelection
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
        self._parameters = selection.parameters()
        self._hooks: list[Any] = []
        self._gradient_hooks: list[Any] = []
        self._check(schedule, update_rule)
        start = MaskSet.ones(selection) if masks is None else fitted_masks(masks, selection)
        self._holders: dict[str, tuple[nn.Module, str]] = {}
        self._masks = start
        claim(self._parameters, self)
        self._attach_all()
        self._sparse = self._names_with_zeros()
        self._target = self._allocated(masks)
        self._fired = self._masks.clone() if self.rule.tracks_fired else MaskSet()
        self._captured: dict[str, Tensor] = {}
        # What masked entries held when they were masked: `Frozen` puts it back after each step.
        self._frozen: dict[str, Tensor] = {}
        self._stored: dict[str, Tensor] = {}
        self._begin()

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
        ran: list[bool] = []
        hook = self._inner.register_step_post_hook(lambda *_: ran.append(True))
        try:
            self.optimizer.step() if scaler is None else scaler.step(self._inner)
        finally:
            hook.remove()
        if ran:
            self.after_optimizer_step()
        else:
            self._captured = {}
        return bool(ran)

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

    @torch.no_grad()
    def before_optimizer_step(self) -> None:
        """Points 1 and 2: capture dense gradients, then change them as the coupling says."""
        self._alive()
        if self.rule.needs_gradient and self._in_window():
            self._capture()
        for name in self._sparse:
            leaf, mask = self._parameters[name], self._mask(name)
            if self.coupling.freezes and name not in self._frozen:
                self._freeze(name)
            self.coupling.before_step(leaf, mask)

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        """Points 4 to 6: decide masks if due, let them act, advance ``t``."""
        self._alive()
        self._restore_frozen()
        # State is masked by the old masks first: what weight decay put into the state of a masked
        # entry must be gone before the entry may return.
        self._mask_state()
        if self.due:
            self._update()
            self._mask_state()
        rates = self._learning_rates()
        for name in self._sparse:
            leaf, mask = self._parameters[name], self._mask(name)
            if name in self._stored:
                leaf.masked_fill_(~mask, 0.0)
            self.coupling.after_step(leaf, mask, rates.get(id(leaf), 0.0))
        self.t += 1
        for ref in self.selection.values():
            self.coupling.set_step(ref, self.t)

    @property
    def due(self) -> bool:
        """Whether masks change in the step that comes."""
        return self.schedule is not None and self.schedule.due(self.t)

    # ------------------------------------------------------------------------------ what it knows

    @property
    def masks(self) -> MaskSet:
        """The masks in force (the tensors themselves, not copies)."""
        return MaskSet({name: self._mask(name) for name in self.selection})

    @property
    def fired(self) -> MaskSet:
        """Entries that were ever kept (empty unless the rule tracks them)."""
        return self._fired

    def fired_rate(self) -> float:
        """In-time over-parameterisation rate: share of entries that were ever kept."""
        return self._fired.density()

    def stored_weights(self) -> dict[str, Tensor]:
        """What every weight holds, masked entries included where the coupling keeps them."""
        return {name: self._weight(name) for name in self.selection}

    def finalize(self) -> MaskSet:
        """Bake W * m into the parameters, remove every trace, and return the final masks."""
        self._alive()
        final = self.masks.clone()
        self.unfollow_optimizer()
        for name, ref in self.selection.items():
            self.coupling.detach(ref, final[name])
        for handle in self._gradient_hooks:
            handle.remove()
        release(self._parameters)
        self._stored.clear()
        self._frozen.clear()
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
            "stored": {name: value.clone() for name, value in self._stored.items()},
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
        for name, mask in self._masks.items():
            mask.copy_(loaded[name])
        if self.rule.tracks_fired:
            self._fired = fitted_masks(MaskSet.from_state_dict(state["fired"]), self.selection)
        self.t = int(state["t"])
        self._target = {name: int(count) for name, count in state["target"].items()}
        self._stored = {name: self._like(name, value) for name, value in state["stored"].items()}
        self._captured = {n: self._like(n, value) for n, value in state["captured"].items()}
        self.generator.set_state(state["generator"].cpu())
        self.rule.load_state_dict(state["rule"])
        self._sparse = self._names_with_zeros()
        self._frozen.clear()
        for name, ref in self.selection.items():
            self.coupling.masks_changed(ref, self._weight(name))
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
        missing = [name for name, p in self._parameters.items() if id(p) not in known]
        if missing and known:
            raise ValueError(f"the optimizer does not train {missing}")

    def _attach_all(self) -> None:
        attached: list[ParamRef] = []
        try:
            for name, ref in self.selection.items():
                if not self.coupling.works_in_place(ref):
                    self.coupling.attach(ref, self._masks[name])
                    attached.append(ref)
                    holder = self.coupling.mask_holder(ref)
                    if holder is not None:
                        self._holders[name] = holder
        except ValueError:
            for ref in attached:
                self.coupling.detach(ref, torch.ones_like(self._masks[ref.name]))
            release(self._parameters)
            raise

    @torch.no_grad()
    def _begin(self) -> None:
        """Let the starting masks act before the first forward pass."""
        for name, ref in self.selection.items():
            leaf, mask = self._parameters[name], self._mask(name)
            if self.coupling.works_in_place(ref):
                self._stored[name] = leaf.detach().clone()
                self._hook_gradient(name, leaf)
                leaf.masked_fill_(~mask, 0.0)
            elif self.coupling.state_mask != "none" and not self.coupling.freezes:
                leaf.masked_fill_(~mask, 0.0)
            self.coupling.masks_changed(ref, self._weight(name))

    def _hook_gradient(self, name: str, leaf: nn.Parameter) -> None:
        owner = weakref.ref(self)

        def mask_gradient(gradient: Tensor) -> Tensor:
            controller = owner()
            if controller is None:
                return gradient
            return torch.where(controller._mask(name), gradient, 0.0)

        self._gradient_hooks.append(leaf.register_hook(mask_gradient))

    def _allocated(self, masks: MaskSet | None) -> dict[str, int]:
        """Counts to hold: the allocated ones, so that masks drawn at random are repaired."""
        if masks is not None and isinstance(self.allocation, Mapping):
            densities = self.allocation
            return {n: kept_count(m.numel(), densities[n]) for n, m in self._masks.items()}
        return {name: int(mask.sum()) for name, mask in self._masks.items()}

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
        for name, ref in self.selection.items():
            self._replace(name, ref, new[name])
        self._captured = {}
        self._sparse = self._names_with_zeros()
        self._frozen.clear()
        for name in self._sparse if self.coupling.freezes else ():
            self._freeze(name)

    def _replace(self, name: str, ref: ParamRef, new: Tensor) -> None:
        mask, leaf = self._mask(name), self._parameters[name]
        if self.rule.init_value == "zero":
            grown = new & ~mask
            leaf.masked_fill_(grown, 0.0)
            if name in self._stored:
                self._stored[name].masked_fill_(grown, 0.0)
        if name in self._stored:
            leaf.copy_(self._stored[name])
        mask.copy_(new)
        if self.rule.tracks_fired:
            self._fired[name] |= new
        self.coupling.masks_changed(ref, self._weight(name))

    def _restore_frozen(self) -> None:
        """Undo what momentum and weight decay did to masked entries in the optimizer step."""
        for name, frozen in self._frozen.items():
            leaf = self._parameters[name].data
            torch.where(self._mask(name), leaf, frozen, out=leaf)
        for name, stored in self._stored.items():
            torch.where(self._mask(name), self._parameters[name].data, stored, out=stored)

    def _mask_state(self) -> None:
        for name in self._sparse:
            leaf = self._parameters[name]
            state = self._inner.state.get(leaf, {})
            mask_optimizer_state(state, leaf, self._mask(name), self.coupling.state_mask)

    def _freeze(self, name: str) -> None:
        if name not in self._stored:
            self._frozen[name] = self._parameters[name].detach().clone()

    def _capture(self) -> None:
        for name, leaf in self._parameters.items():
            if leaf.grad is None:
                raise ValueError(f"{name!r} has no gradient to grow by at step {self.t}")
            if leaf.grad.is_sparse:
                raise ValueError(f"{name!r} has a sparse gradient; use sparse=False embeddings")
            seen = self._captured.get(name)
            self._captured[name] = leaf.grad.clone() if seen is None else seen.add_(leaf.grad)

    def _in_window(self) -> bool:
        schedule = self.schedule
        ahead = range(self.rule.gradient_window)
        return schedule is not None and any(schedule.due(self.t + step) for step in ahead)

    def _finite(self) -> bool:
        return all(bool(torch.isfinite(g).all()) for g in self._captured.values())

    def _weight(self, name: str) -> Tensor:
        return self._stored[name] if name in self._stored else self._parameters[name].detach()

    def _mask(self, name: str) -> Tensor:
        """The mask that acts: module buffers move with the model, so they are asked."""
        holder = self._holders.get(name)
        mask = self._masks[name] if holder is None else holder[0].get_buffer(holder[1])
        device = self._parameters[name].device
        if mask.device != device:
            mask = mask.to(device)
        self._masks[name] = mask
        return mask

    def _like(self, name: str, value: Tensor) -> Tensor:
        leaf = self._parameters.get(name)
        if leaf is None or leaf.shape != value.shape:
            raise ValueError(f"saved state of {name!r} does not fit this model")
        return value.to(leaf.device, copy=True)

    def _names_with_zeros(self) -> list[str]:
        return [name for name in self.selection if not bool(self._mask(name).all())]

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
