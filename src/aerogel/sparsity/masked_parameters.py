"""Parameters under masks: which mask acts on which, and what pruned entries hold meanwhile."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.kernels import zero_pruned_
from aerogel.sparsity.coupling import Coupling
from aerogel.sparsity.keep import Keep, keep_factor, mask_optimizer_state
from aerogel.sparsity.masks import MaskSet
from aerogel.sparsity.ownership import claim, release
from aerogel.sparsity.select import ParamRef, ParamSelection

# Their step leaves an entry's state at zero where its weight, gradient and state are zero.
_ENTRYWISE = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop)


class MaskedParameters:
    """The parameters of one controller, with their masks attached as the coupling says.

    Args:
        selection: the parameters; claimed for ``owner``.
        coupling: how masks act.
        masks: masks that fit the selection; from now on these tensors act.
        owner: who holds them.
        wants_dense: told of every gradient that arrives under a coupling that masks it; whether it
            shall stay dense for now. A bound method of the owner.

    Raises:
        ValueError: a parameter is claimed or parametrized already. Nothing is left attached.
    """

    def __init__(
        self,
        selection: ParamSelection,
        coupling: Coupling,
        masks: MaskSet,
        owner: object,
        wants_dense: Callable[[], bool],
    ) -> None:
        self.selection = selection
        self.coupling = coupling
        self.parameters = selection.parameters()
        self._masks = masks
        self._holders: dict[str, tuple[nn.Module, str]] = {}
        self._in_place: set[str] = set()
        self._gradient_hooks: list[Any] = []
        # Where a gradient was masked as it arrived, and its version then.
        self._arrived: dict[str, tuple[int, int]] = {}
        self._state_masked = False  # by the masks in force
        self._wants_dense = weakref.WeakMethod(wants_dense)
        # Only of parameters that have zeros, the others need nothing between updates; made when
        # first asked for after the masks changed.
        self._keeps: dict[str, Keep] | None = None
        # What pruned entries hold under a coupling that freezes them (0 where kept).
        self._held: dict[str, Tensor] = {}
        claim(self.parameters, owner)
        self._attach_all()
        self._begin()

    # ------------------------------------------------------------------------------ what acts now

    @property
    def masks(self) -> MaskSet:
        """The masks in force (the tensors themselves)."""
        return MaskSet({name: self.mask(name) for name in self.selection})

    def mask(self, name: str) -> Tensor:
        """The mask that acts: module buffers move with the model, so they are asked."""
        holder = self._holders.get(name)
        mask = self._masks[name] if holder is None else holder[0].get_buffer(holder[1])
        device = self.parameters[name].device
        if mask.device != device:
            mask = mask.to(device)
        self._masks[name] = mask
        return mask

    def weight(self, name: str) -> Tensor:
        """The stored weight, with what pruned entries hold."""
        leaf = self.parameters[name].detach()
        if name not in self._in_place or name not in self._held:
            return leaf
        whole = leaf.clone()
        self.keep(name).join_(whole, self._held[name])
        return whole

    def weights(self) -> dict[str, Tensor]:
        """All stored weights."""
        return {name: self.weight(name) for name in self.selection}

    def acting(self) -> list[tuple[str, Keep]]:
        """Name and mask of every parameter that has zeros; none if the coupling needs none."""
        if not self.coupling.acts_on_steps:
            return []
        leaves = self.parameters
        return [
            (name, keep if keep.mask.device == leaves[name].device else self.keep(name))
            for name, keep in list(self._spread().items())
        ]

    def keep(self, name: str) -> Keep:
        """The mask of a parameter that has zeros, fit for zeroing."""
        keeps, leaf = self._spread(), self.parameters[name]
        keep = keeps[name]
        if not keep.fits(leaf):  # the model was moved or converted since
            keep = keeps[name] = Keep(self.mask(name), leaf)
            if name in self._held:
                self._held[name] = self._held[name].to(leaf)
        return keep

    # ---------------------------------------------------------------------------- around a step

    def hold_new(self) -> None:
        """Note what pruned entries hold, where that is not known yet (after loading)."""
        if not self.coupling.freezes:
            return
        for name, keep in self.acting():
            if name not in self._held:
                self._held[name] = keep.pruned_part(self.parameters[name])

    def to_change(self) -> list[tuple[nn.Parameter, Keep]]:
        """Those of `acting` whose gradient was not masked as it arrived, or touched since."""
        found = []
        for name in self._spread() if self.coupling.acts_on_steps else ():
            leaf, arrived = self.parameters[name], self._arrived.get(name)
            gradient = leaf.grad if arrived else None
            if gradient is None or arrived != (gradient.data_ptr(), gradient._version):
                found.append((leaf, self.keep(name)))
        return found

    def restore_held(self) -> None:
        """Undo what momentum and weight decay did to frozen entries in the optimizer step."""
        for name, held in self._held.items():
            leaf, keep = self.parameters[name], self.keep(name)
            if name in self._in_place:
                keep.zero_(leaf)
            else:
                keep.join_(leaf, held)

    def mask_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Zero the optimizer state of pruned entries, as far as the coupling says."""
        for name, keep in self.acting():
            leaf = self.parameters[name]
            state = optimizer.state.get(leaf, {})
            mask_optimizer_state(state, leaf, keep, self.coupling.state_mask)
        self._state_masked = self.coupling.state_mask == "all"

    def state_stays_masked(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether a step on masked gradients leaves the state as masked as it is."""
        return self._state_masked and self.coupling.masks_gradient and type(optimizer) in _ENTRYWISE

    def replace(
        self, new: Mapping[str, Tensor], weights: Mapping[str, Tensor], zero_grown: bool
    ) -> None:
        """Let other masks act.

        Args:
            new: a mask for every parameter.
            weights: stored weights of this moment (of `weights`).
            zero_grown: entries that come back start at 0 instead of what they hold.
        """
        for name, weight in weights.items():
            mask = self.mask(name)
            if zero_grown:
                zero_pruned_(weight, mask | ~new[name])
            if name in self._in_place:
                self.parameters[name].copy_(weight)
            if new[name] is not mask:
                mask.copy_(new[name])
            self.coupling.masks_changed(self.selection[name], weight)
        self._held.clear()
        self._keeps = None
        self._arrived.clear()
        self._state_masked = False
        for name, keep in self.acting() if self.coupling.freezes else ():
            self._hold(name, keep)

    def release(self, final: MaskSet) -> None:
        """Bake ``W * final`` into the parameters and take everything off them."""
        for name, ref in self.selection.items():
            self.coupling.detach(ref, final[name])
        for handle in self._gradient_hooks:
            handle.remove()
        release(self.parameters)
        self._keeps = None
        self._held.clear()

    # -------------------------------------------------------------------------------- persistence

    def held_in_place(self) -> dict[str, Tensor]:
        """What pruned entries hold, of the parameters that hold zeros instead."""
        return {n: value.clone() for n, value in self._held.items() if n in self._in_place}

    def load(self, masks: MaskSet, held: Mapping[str, Tensor]) -> None:
        """Take masks and held values that were saved; the parameters are loaded already."""
        for name in self.selection:
            self.mask(name).copy_(masks[name])
        self._held = {name: self.like(name, value) for name, value in held.items()}
        self._keeps = None
        self._arrived.clear()
        self._state_masked = False
        for name, ref in self.selection.items():
            self.coupling.masks_changed(ref, self.weight(name))

    def like(self, name: str, value: Tensor) -> Tensor:
        """A copy of a saved tensor on its parameter's device.

        Raises:
            ValueError: it has another shape.
        """
        leaf = self.parameters.get(name)
        if leaf is None or leaf.shape != value.shape:
            raise ValueError(f"saved state of {name!r} does not fit this model")
        return value.to(leaf.device, copy=True)

    # ------------------------------------------------------------------------------------- pieces

    def _attach_all(self) -> None:
        attached: list[ParamRef] = []
        try:
            for name, ref in self.selection.items():
                if self.coupling.works_in_place(ref):
                    self._in_place.add(name)
                else:
                    self.coupling.attach(ref, self._masks[name])
                    attached.append(ref)
                    holder = self.coupling.mask_holder(ref)
                    if holder is not None:
                        self._holders[name] = holder
        except ValueError:
            for ref in attached:
                self.coupling.detach(ref, torch.ones_like(self._masks[ref.name]))
            release(self.parameters)
            raise

    @torch.no_grad()
    def _begin(self) -> None:
        """Let the starting masks act before the first forward pass."""
        for name in self._in_place:
            self._hook_gradient(name, self.parameters[name])
        for name, leaf in self.parameters.items() if self.coupling.acts_on_steps else ():
            self._hook_arrival(name, leaf)
        for name, keep in self.acting():
            if self.coupling.freezes:
                self._hold(name, keep)
            elif self.coupling.state_mask != "none":
                keep.zero_(self.parameters[name])
        for name, ref in self.selection.items():
            self.coupling.masks_changed(ref, self.weight(name))

    def _hook_gradient(self, name: str, leaf: nn.Parameter) -> None:
        owner = weakref.ref(self)

        def mask_gradient(gradient: Tensor) -> Tensor:
            masked = owner()
            if masked is None or name not in masked._spread():
                return gradient
            return gradient * keep_factor(masked.mask(name), gradient.dtype)

        self._gradient_hooks.append(leaf.register_hook(mask_gradient))

    def _hook_arrival(self, name: str, leaf: nn.Parameter) -> None:
        """Mask what ``backward`` left in ``grad``, unless an update wants it dense.

        Wrappers reduce gradients after this hook. The same masks act on all ranks, so the average
        is masked as well; a dense gradient taken here would be this rank's own, which is why
        `MaskController` takes it later.
        """
        if not leaf.requires_grad:  # frozen by the user: no hook can be had, and nothing arrives
            return
        owner = weakref.ref(self)

        def mask_arrived(leaf: Tensor) -> None:
            masked = owner()
            if masked is not None:
                masked._mask_arrived(name, leaf.grad)

        self._gradient_hooks.append(leaf.register_post_accumulate_grad_hook(mask_arrived))

    def _mask_arrived(self, name: str, gradient: Tensor | None) -> None:
        self._arrived.pop(name, None)
        if gradient is None or not self.coupling.masks_gradient or self._dense_wanted():
            return
        keep = self._spread().get(name)
        if keep is None or gradient.is_sparse:
            return
        keep.zero_(gradient)
        self._arrived[name] = gradient.data_ptr(), gradient._version

    def _dense_wanted(self) -> bool:
        wants = self._wants_dense()
        return wants is None or wants()

    def _hold(self, name: str, keep: Keep) -> None:
        """Note what pruned entries hold; where zeros are kept in place, make them so."""
        leaf = self.parameters[name]
        self._held[name] = keep.pruned_part(leaf)
        if name in self._in_place:
            keep.zero_(leaf)

    def _spread(self) -> dict[str, Keep]:
        """The bits of every mask that has zeros."""
        if self._keeps is None:
            self._keeps = {
                name: Keep(self.mask(name), parameter)
                for name, parameter in self.parameters.items()
                if int(torch.count_nonzero(self.mask(name))) < parameter.numel()
            }
        return self._keeps
