"""Dynamic sparse training: RigL, SET and ITOP, on the shared drop-and-grow step.

    trainer = RigL(model, optimizer, 0.9, total_steps=10_000)
    ...
    loss.backward()
    trainer.mask_gradients()          # before gradients are clipped, if they are
    trainer.step()                    # in place of optimizer.step()

Training starts from a random mask; every `update_every` steps the smallest kept weights of each
layer are dropped and as many grown elsewhere, so the number of weights never changes and the
network explores many masks at the cost of one.

| | grows by | drop fraction | weights kept by |
| --- | --- | --- | --- |
| RigL | largest dense gradient | cosine 0.3 -> 0 at 75% of training | hard |
| SET | uniform random | same | hard |
| ITOP | gradient or random, long intervals | cosine 0.5 -> 0.005 over all of it | hard_dense_grad |

RigL is the default choice; SET needs no dense gradient at all. The order inside a step (gradients
captured, gradients masked, optimizer, masks, weights and optimizer state masked) is
`MaskController`'s.

Reference: Evci et al., RigL, ICML 2020, arXiv 1911.11134; Mocanu et al., SET, Nature
Communications 2018; Liu et al., "Do We Actually Need Dense Over-Parameterization?", ICML 2021,
arXiv 2102.02887 (ITOP).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from aerogel.arguments import check_count, check_number
from aerogel.sparsity.allocation import allocate
from aerogel.sparsity.controlled import ControlledTrainer
from aerogel.sparsity.controller import MaskController
from aerogel.sparsity.masks import MaskSet, build_masks, random_masks
from aerogel.sparsity.schedules import Cosine, CosineFloor, Schedule
from aerogel.sparsity.scores import compute_scores
from aerogel.sparsity.select import ParamSelection, select_parameters, unknown_name
from aerogel.sparsity.updates import Allocation, Death, DropGrow, Growth, UpdateContext

Init = Literal["random", "bernoulli", "topk"]

RIGL_DROP_FRACTION = 0.3  # arXiv 1911.11134, section 4
RIGL_END = 0.75  # share of training after which the mask stays
ITOP_DROP_FRACTION = 0.5  # arXiv 2102.02887
ITOP_FLOOR = 0.005


@dataclass
class TrackedDropGrow(DropGrow):
    """`DropGrow` that remembers which entries have been kept ever since the start."""

    always: MaskSet = field(default_factory=MaskSet)

    def update(self, ctx: UpdateContext) -> MaskSet:
        """The next masks; entries that leave are no longer among `always`."""
        new = super().update(ctx)
        before = self.always if len(self.always) else ctx.masks
        self.always = before & new
        return new

    def state_dict(self) -> dict[str, Any]:
        """`always`, packed."""
        return {"always": self.always.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `always`."""
        self.always = MaskSet.from_state_dict(state["always"])


class DynamicSparseTrainer(ControlledTrainer):
    """Trains a sparse network whose mask moves; the common part of RigL, SET and ITOP.

    Args:
        model: any module.
        optimizer: any `torch.optim` optimizer over its parameters.
        sparsity: fraction of zeros over the selected weights, in (0, 1).
        rule: how masks change.
        schedule: when, and which fraction of a layer's kept weights is swapped then.
        coupling: how masks act, a name of `coupling.COUPLINGS`.
        allocation: how the density is shared over layers: "uniform", "erk", ... or name -> density.
        init: the first mask: "random" (exact counts), "bernoulli" (independent draws, as in several
            released codes; the first update restores the exact count) or "topk" (largest initial
            weights).
        masks: the first masks themselves, instead of `sparsity` shared out by `allocation`.
        selection: the weights; None takes linear and convolution weights by include and exclude.
        include: globs of names, see `select_parameters`.
        exclude: globs of names.
        update_replaces_step: on update steps the optimizer does not step (the original RigL).
        generator: source of all randomness, on the CPU; seeded 0 by default, equal on all ranks.

    Raises:
        ValueError: sparsity outside (0, 1), a schedule that never fires, nothing selected, a
            parameter already under a mask controller.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        sparsity: float,
        rule: TrackedDropGrow,
        schedule: Schedule,
        *,
        coupling: Literal["hard", "hard_dense_grad"] = "hard",
        allocation: Allocation = "uniform",
        init: Init = "random",
        masks: MaskSet | None = None,
        selection: ParamSelection | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        update_replaces_step: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        check_number("sparsity", sparsity, "(0, 1)")
        if selection is not None and (include or exclude):
            raise ValueError("give selection or include/exclude, not both")
        chosen = selection or select_parameters(model, include=include, exclude=exclude)
        source = generator or torch.Generator().manual_seed(0)
        densities = _densities(chosen, 1.0 - sparsity, allocation, masks)
        start = masks if masks is not None else _first_masks(chosen, densities, init, source)
        self.rule = rule
        controller = MaskController(
            model,
            optimizer,
            chosen,
            coupling,
            densities,
            schedule,
            rule,
            masks=start,
            update_replaces_step=update_replaces_step,
            generator=source,
        )
        super().__init__(controller)

    def itop(self) -> float:
        """In-time over-parameterisation rate: share of the weights that were ever kept."""
        return self.controller.fired_rate()

    def degree_of_constraint(self) -> float:
        """Share of the weights that were kept all the time."""
        return (self.rule.always if len(self.rule.always) else self.masks).density()


class RigL(DynamicSparseTrainer):
    """Drops the smallest weights and grows where the dense gradient is largest.

    Args:
        model: any module.
        optimizer: any `torch.optim` optimizer over its parameters.
        sparsity: fraction of zeros over the selected weights, in (0, 1).
        total_steps: optimizer steps of the whole training.
        allocation: how the density is shared over layers; the paper's best is "erk".
        update_every: steps between mask updates (at t = update_every, 2 * update_every, ... < end).
        end: share of `total_steps` after which the mask stays, in (0, 1].
        drop_fraction: share of a layer's kept weights swapped at the start; falls by a cosine to 0.
        grad_accum: steps before and including an update whose dense gradients are averaged.
        update_replaces_step: on update steps the optimizer does not step (the original RigL).
        drop_noise: standard deviation of noise on the drop score (1e-5 in the original).
        options: init, masks, selection, include, exclude, generator of `DynamicSparseTrainer`.

    Raises:
        ValueError: arguments out of range, no update within `end`, grad_accum >= update_every.

    Reference: arXiv 1911.11134, algorithm 1.
    """

    growth: Growth = "gradient"

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        sparsity: float,
        *,
        total_steps: int,
        allocation: Allocation = "uniform",
        update_every: int = 100,
        end: float = RIGL_END,
        drop_fraction: float = RIGL_DROP_FRACTION,
        grad_accum: int = 1,
        update_replaces_step: bool = False,
        drop_noise: float = 0.0,
        **options: Any,
    ) -> None:
        check_number("end", end, "(0, 1]")
        check_count("total_steps", total_steps)
        last = round(end * total_steps)
        _check_updates(update_every, last, drop_fraction, grad_accum)
        rule = TrackedDropGrow(
            growth=self.growth, gradient_window=grad_accum, drop_noise=drop_noise
        )
        schedule = Cosine(drop_fraction, 0, last, update_every)
        super().__init__(
            model,
            optimizer,
            sparsity,
            rule,
            schedule,
            allocation=allocation,
            update_replaces_step=update_replaces_step,
            **options,
        )


class SET(RigL):
    """Drops the smallest weights and grows at random; arguments as `RigL`.

    Reference: Mocanu et al., Nature Communications 9, 2383, 2018.
    """

    growth: Growth = "random"


class ITOP(DynamicSparseTrainer):
    """Few, large mask updates over the whole training, so that most weights are tried in time.

    Choose `update_every` so long that new weights can grow before they are judged, and watch
    `itop()`: accuracy follows how much of the network was explored in time.

    Args:
        model: any module.
        optimizer: any `torch.optim` optimizer over its parameters.
        sparsity: fraction of zeros over the selected weights, in (0, 1).
        total_steps: optimizer steps of the whole training.
        update_every: steps between mask updates.
        growth: "gradient" (RigL-ITOP), "random" (SET-ITOP), "momentum", "random_unfired".
        death: what is dropped, see `DropGrow`.
        allocation: how the density is shared over layers.
        drop_fraction: share of a layer's kept weights swapped at the start, falling by a cosine to
            0.005 at the end.
        options: init, masks, selection, include, exclude, generator of `DynamicSparseTrainer`.

    Raises:
        ValueError: arguments out of range, or no update within `total_steps`.

    Reference: arXiv 2102.02887, section 3.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        sparsity: float,
        *,
        total_steps: int,
        update_every: int,
        growth: Growth = "gradient",
        death: Death = "magnitude",
        allocation: Allocation = "erk",
        drop_fraction: float = ITOP_DROP_FRACTION,
        **options: Any,
    ) -> None:
        check_count("total_steps", total_steps)
        _check_updates(update_every, total_steps, drop_fraction, 1)
        rule = TrackedDropGrow(growth=growth, death=death)
        schedule = CosineFloor(
            drop_fraction, total_steps, min(ITOP_FLOOR, drop_fraction), update_every
        )
        super().__init__(
            model,
            optimizer,
            sparsity,
            rule,
            schedule,
            coupling="hard_dense_grad",
            allocation=allocation,
            **options,
        )


def _check_updates(update_every: int, last: int, drop_fraction: float, grad_accum: int) -> None:
    check_count("update_every", update_every)
    check_count("grad_accum", grad_accum)
    check_number("drop_fraction", drop_fraction, "(0, 1)")
    if update_every >= last:
        raise ValueError(
            f"update_every={update_every} leaves no mask update before step {last}; "
            "make it smaller, or train with a fixed mask"
        )
    if grad_accum > 1 and grad_accum >= update_every:
        raise ValueError(f"grad_accum must be below {update_every=}, got {grad_accum}")


def _densities(
    selection: ParamSelection, density: float, allocation: Allocation, masks: MaskSet | None
) -> dict[str, float]:
    if masks is not None:
        return {name: max(part, 1e-12) for name, part in masks.layer_density().items()}
    if isinstance(allocation, Mapping):
        return allocate(selection, density, "fixed", densities=allocation)
    return allocate(selection, density, allocation)


def _first_masks(
    selection: ParamSelection, densities: dict[str, float], init: Init, generator: torch.Generator
) -> MaskSet:
    if init == "topk":
        return build_masks(compute_scores(selection, "magnitude"), densities)
    if init not in ("random", "bernoulli"):
        raise ValueError(unknown_name("init", init, ("random", "bernoulli", "topk")))
    return random_masks(selection, densities, exact=init == "random", generator=generator)
