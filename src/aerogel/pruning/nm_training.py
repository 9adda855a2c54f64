"""N:M training: masks chosen anew from the dense weights after every optimizer step.

What the N:M systems share, and their two common baselines: `STE` (straight-through) and `SRSTE`
(the same with pruned weights pulled to zero).

    trainer = SRSTE(model, optimizer, 2, 4)
    ...
    loss.backward()
    trainer.step()                    # in place of optimizer.step()
    trainer.finalize()                # a plain model, n of every m kept
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from aerogel.arguments import check_number
from aerogel.sparsity.controlled import ControlledTrainer
from aerogel.sparsity.controller import MaskController
from aerogel.sparsity.coupling import SR_STE_LAMBDA, Coupling
from aerogel.sparsity.coupling import SRSTE as SRSTECoupling
from aerogel.sparsity.coupling import STE as STECoupling
from aerogel.sparsity.masks import MaskSet
from aerogel.sparsity.patterns import NM
from aerogel.sparsity.schedules import Constant
from aerogel.sparsity.select import ParamSelection, select_parameters
from aerogel.sparsity.updates import UpdateContext, UpdateRule

PatternAt = Callable[[str, int], NM | None]
"""The pattern of a named weight in the forward pass of a step; None while it is dense."""


class Reselect(UpdateRule):
    """The masks of the next step: the largest of every group of the weights as they are now.

    Args:
        pattern_at: see `PatternAt`.
        coupling: how the masks act; it may write them where they act, and prepare products.
    """

    def __init__(self, pattern_at: PatternAt, coupling: Coupling) -> None:
        self.pattern_at = pattern_at
        self.coupling = coupling

    def update(self, ctx: UpdateContext) -> MaskSet:
        """Masks for the forward pass of step ``ctx.t + 1``."""

        def select(name: str, weight: torch.Tensor, pattern: NM) -> torch.Tensor:
            return self.coupling.select_largest(ctx.selection[name], weight, pattern)

        return select_masks(ctx.weights, self.pattern_at, ctx.t + 1, select)


def select_masks(
    weights: Mapping[str, torch.Tensor],
    pattern_at: PatternAt,
    step: int,
    select: Callable[[str, torch.Tensor, NM], torch.Tensor] = lambda _, w, p: p.select_largest(w),
) -> MaskSet:
    """The n largest magnitudes of every group of m, all ones where there is no pattern yet.

    Args:
        weights: by name.
        pattern_at: see `PatternAt`.
        step: whose forward pass the masks are for.
        select: the mask of a named weight and a pattern.
    """
    masks = {}
    for name, weight in weights.items():
        pattern = pattern_at(name, step)
        masks[name] = (
            torch.ones_like(weight, dtype=torch.bool)
            if pattern is None
            else select(name, weight, pattern)
        )
    return MaskSet(masks)


class NMTrainer(ControlledTrainer):
    """Trains with N:M masks that follow the weights; `step` stands for ``optimizer.step()``.

    Args:
        model: any module.
        optimizer: its optimizer.
        selection: the weights.
        coupling: how masks act.
        pattern_at: the pattern of a weight at a step.

    Raises:
        ValueError: a half-precision weight, or a pattern that does not fit (names the weight).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        selection: ParamSelection,
        coupling: Coupling,
        pattern_at: PatternAt,
    ) -> None:
        for name, ref in selection.items():
            if ref.parameter.dtype in (torch.float16, torch.bfloat16):
                raise ValueError(
                    f"{name!r} is {ref.parameter.dtype}: N:M training needs float32 master weights"
                )
        weights = {name: ref.parameter for name, ref in selection.items()}
        controller = MaskController(
            model,
            optimizer,
            selection,
            coupling,
            "uniform",
            Constant(0.0),  # due at every step; the rule knows the patterns
            Reselect(pattern_at, coupling),
            masks=select_masks(weights, pattern_at, 0),
        )
        super().__init__(controller)


class STE(NMTrainer):
    """Strict N:M masks from the first step; the gradient passes straight through to all weights.

    Args:
        model: any module.
        optimizer: its optimizer.
        n: kept of every group.
        m: group length.
        axis: 1 groups along inputs, 0 along outputs.
        include: globs of the weights; all linear and convolution weights by default.
        exclude: globs of weights to leave dense.

    Raises:
        ValueError: not 1 <= n <= m, or an axis that m does not divide (names the weight).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        n: int,
        m: int,
        *,
        axis: Literal[0, 1] = 1,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        self._start(model, optimizer, NM(n, m, axis), STECoupling(), include, exclude)

    def _start(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        pattern: NM,
        coupling: Coupling,
        include: Sequence[str],
        exclude: Sequence[str],
    ) -> None:
        selection = fitting_selection(model, [pattern], include, exclude)
        super().__init__(model, optimizer, selection, coupling, lambda name, step: pattern)


class SRSTE(STE):
    """`STE` with pruned weights pulled to zero: ``lam * (1 - mask) * weight`` joins the gradient.

    Args:
        model: any module.
        optimizer: its optimizer.
        n: kept of every group.
        m: group length.
        lam: strength of the pull; 2e-4 suits SGD at ImageNet's scale.
        decoupled: subtract ``lr * lam * weight`` from pruned weights instead, as AdamW decays.
        axis: 1 groups along inputs, 0 along outputs.
        include: globs of the weights; all linear and convolution weights by default.
        exclude: globs of weights to leave dense.

    Reference:
        Zhou et al., arXiv 2102.04010.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        n: int,
        m: int,
        lam: float = SR_STE_LAMBDA,
        decoupled: bool = False,
        *,
        axis: Literal[0, 1] = 1,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        check_number("lam", lam, "[0, inf)")
        coupling = SRSTECoupling(lam, decoupled)
        self._start(model, optimizer, NM(n, m, axis), coupling, include, exclude)


def fitting_selection(
    model: nn.Module, patterns: Sequence[NM], include: Sequence[str], exclude: Sequence[str]
) -> ParamSelection:
    """The weights named by globs, all of which every pattern must fit.

    Raises:
        ValueError: a glob that matches nothing, or a weight that a pattern does not fit.
    """
    selection = select_parameters(model, include=include, exclude=exclude)
    for name, ref in selection.items():
        for pattern in patterns:
            pattern.validate(ref.shape, name)
    return selection
