"""BDWP: N:M weights in the forward and in the input-gradient product, chosen for each direction.

Paper: Fang, Sun, Zhou and Wang, "Efficient N:M Sparse DNN Training Using Algorithm, Architecture,
and Dataflow Co-Design", 2023, arXiv 2309.13015 (IEEE TCAD).

The idea: usual N:M training makes only the forward product sparse. Here the weights are pruned for
both products that read them: along input channels for the forward pass, and along output channels,
which is what the input-gradient product sums over. The product that makes the weight gradient stays
dense and straight through, and both masks follow the weights after every step.

When to use it: training from scratch to 2:4, 2:8 or 1:8 where two of the three products of a
training step are to be sparse. The recipe of the dense network stays as it is.

Costs and buys: with n:m the multiplications of a step fall from 3f to (1 + 2n/m)f: by 1.5 at 2:4
and by 2 at 2:8. Linear layers in float32 on a CPU skip the zeros where groups keep a quarter at
most and a batch has at least 16 rows; everything else is computed densely with zeros. Both masks
and both packed forms of a step come from one reading of the weights, right after the update; what
that takes beside the products, and the limit of memory under it, ``benchmarks/nm.py`` measures. The
analytical model of the paper's accelerator, `aerogel.insight.SATModel`, says what hardware made for
it would gain. The trained network is a strict N:M network, which packed kernels run.

The claim this repository measures (``aerogel reproduce bdwp``): 2:8 training loses at most a point
against dense training and beats pruning a dense network to 2:8 at once; by its cycle model the
accelerator trains ResNet-18 about twice as fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from aerogel.arguments import check_number
from aerogel.pruning.method import Goal, TrainingMethod
from aerogel.pruning.nm_training import NMTrainer
from aerogel.sparsity.blocks import ForwardFn, run_batch
from aerogel.sparsity.cost import inference_flops, nm_training_flops
from aerogel.sparsity.coupling import SR_STE_LAMBDA, SRSTE, Bidirectional, Coupling
from aerogel.sparsity.masks import MaskSet
from aerogel.sparsity.patterns import NM, parse_pattern
from aerogel.sparsity.select import ParamRef, ParamSelection, select_parameters, unknown_name

Mode = Literal["bdwp", "sr_ste", "sdwp", "sdgp"]

MODES: tuple[Mode, ...] = ("bdwp", "sr_ste", "sdwp", "sdgp")
FIRST = "first"


class BidirectionalNM(NMTrainer):
    """Trains with N:M weights in two directions; `step` stands for ``optimizer.step()``.

    | mode | forward | input gradient | weight gradient |
    | --- | --- | --- | --- |
    | bdwp | N:M weights (inputs) | N:M weights (outputs) | dense |
    | sr_ste | N:M weights (inputs) | the same weights | dense, with a pull to zero |
    | sdwp | dense | N:M weights (outputs) | dense |
    | sdgp | dense | N:M gradients (outputs) | dense |

    Args:
        model: any module; linear and convolution layers are changed in place until `finalize`.
        optimizer: its optimizer.
        n: kept of every group.
        m: group length.
        mode: see the table; ``"sr_ste"``, ``"sdwp"`` and ``"sdgp"`` are the paper's baselines.
        include: globs of the weights; by default all linear and convolution weights but those of
            depthwise and grouped convolutions, and a last linear layer whose classes m does not
            divide.
        exclude: globs of weights to leave dense, and ``"first"`` for the first layer.
        sr_ste_lambda: strength of the pull (``"sr_ste"`` only).

    Raises:
        ValueError: an unknown mode, a negative ``sr_ste_lambda``, n > m, an axis that m does not
            divide (names the weight and the axis), a grouped convolution in ``include``,
            half-precision weights.

    Reference:
        Fang et al., arXiv 2309.13015.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        n: int = 2,
        m: int = 8,
        *,
        mode: Mode = "bdwp",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (FIRST,),
        sr_ste_lambda: float = SR_STE_LAMBDA,
    ) -> None:
        if mode not in MODES:
            raise ValueError(unknown_name("mode", mode, MODES))
        check_number("sr_ste_lambda", sr_ste_lambda, "[0, inf)")
        self.mode, self.n, self.m = mode, n, m
        self._model = model
        forward, backward = NM(n, m, axis=1), NM(n, m, axis=0)
        selection = _selected(model, m, include, exclude)
        for name, ref in selection.items():
            if mode in ("bdwp", "sr_ste"):
                forward.validate(ref.shape, f"{name} (inputs, axis 1)")
            if mode != "sr_ste":
                backward.validate(ref.shape, f"{name} (outputs, axis 0)")
        couplings: dict[str, Coupling] = {
            "bdwp": Bidirectional(backward),
            "sr_ste": SRSTE(sr_ste_lambda),
            "sdwp": Bidirectional(backward),
            "sdgp": Bidirectional(None, gradient=forward),
        }
        dense_forward = mode in ("sdwp", "sdgp")
        self._pattern_at = lambda name, step: None if dense_forward else forward
        super().__init__(model, optimizer, selection, couplings[mode], self._pattern_at)

    @torch.no_grad()
    def refresh(self) -> None:
        """Choose the masks anew from the weights as they are, if something else changed them."""
        controller = self.controller
        weights = controller.stored_weights()
        for name, mask in controller.masks.items():
            ref, weight = controller.selection[name], weights[name]
            pattern = self._pattern_at(name, self.t)
            if pattern is None:
                mask.fill_(True)
            else:
                mask.copy_(controller.coupling.select_largest(ref, weight, pattern))
            controller.coupling.masks_changed(ref, weight)

    @property
    def backward_masks(self) -> MaskSet:
        """The masks of the input-gradient product (empty in the mode ``"sr_ste"``)."""
        if self.mode == "sr_ste":
            return MaskSet()
        refs = self.controller.selection.items()
        return MaskSet({name: ref.module.get_buffer("mask_backward") for name, ref in refs})

    def flops_per_step(self, batch: Any, *, forward: ForwardFn = run_batch) -> float:
        """FLOPs of the matrix products of one training step, zeros skipped.

        Args:
            batch: one batch as `run_batch` takes it; divide by its size for FLOPs per sample.
            forward: how to run it.

        Reference:
            arXiv 2309.13015, section III: dense 3f, sr_ste (2 + n/m)f, sdwp and sdgp (2 + n/m)f,
            bdwp (1 + 2n/m)f.
        """
        everything = MaskSet.ones(self.controller.selection)
        report = inference_flops(self._model, everything, batch, forward=forward)
        sparse = float(sum(whole for whole, _ in report.layers.values()))
        rest = 3.0 * (report.dense - sparse)
        return rest + nm_training_flops(sparse, self.n, self.m, self.mode)


def _selected(
    model: nn.Module, m: int, include: Sequence[str], exclude: Sequence[str]
) -> ParamSelection:
    globs = tuple(glob for glob in exclude if glob != FIRST)
    chosen = select_parameters(
        model, include=tuple(include), exclude=globs, skip_first=FIRST in exclude and not include
    )
    if include:
        return chosen
    names = [name for name, ref in chosen.items() if getattr(ref.module, "groups", 1) == 1]
    if names and _is_odd_classifier(chosen[names[-1]], m):
        names.pop()
    if not names:
        raise ValueError(f"nothing to prune in {type(model).__name__}: name weights with include")
    return select_parameters(model, include=tuple(names))


def _is_odd_classifier(ref: ParamRef, m: int) -> bool:
    return isinstance(ref.module, nn.Linear) and ref.shape[0] % m != 0


def _build(model: nn.Module, optimizer: torch.optim.Optimizer, goal: Goal) -> BidirectionalNM:
    pattern = parse_pattern(goal.pattern)
    if not isinstance(pattern, NM):
        raise ValueError(f"pattern must be n:m, got {goal.pattern!r}")
    return BidirectionalNM(
        model, optimizer, pattern.n, pattern.m, include=goal.parameters, exclude=()
    )


def _proposed(model: nn.Module) -> tuple[str, ...]:
    """Weights that groups of 8 fit both ways."""
    chosen = _selected(model, 8, (), (FIRST,))
    return tuple(name for name, ref in chosen.items() if not any(d % 8 for d in ref.shape[:2]))


METHOD = TrainingMethod(
    slug="bdwp",
    build=_build,
    patterns=("n:m",),
    pattern="2:8",
    proposes=_proposed,
    starts="fresh",
)
