"""Progressive gradient flow: N:M sparsity that tightens while a network trains.

Paper: Bambhaniya et al., "Progressive Gradient Flow for Robust N:M Sparsity Training in
Transformers", 2024, arXiv 2402.04744.

The idea: at high N:M sparsity (1:8 and beyond) straight-through training is noisy, because pruned
weights keep receiving gradients of a network in which they play no part. So their part is taken
away bit by bit. `kind="mask"` (MDGF) multiplies pruned weights in the forward pass by a factor that
decays from 1 to 0; `kind="structure"` (SDGF) starts from a loose pattern and tightens it in rungs.

When to use it: training (or fine-tuning) transformers to 1:8, 1:16 or 1:32 in their feed-forward
layers, where `STE` and `SRSTE` lose accuracy. At 2:4 all recipes are about equal.

Costs and buys: nothing is saved while it trains with `kind="mask"` (the forward pass is dense until
the factor is 0), and a selection of the largest of every group at every step comes on top. The
result is a strict N:M network, which packed kernels run.

The claim this repository measures (``aerogel reproduce progressive-gradient-flow``): the mechanism.
Late in training the second moment of the gradients of the sparse layers, which is what the paper
blames, is far smaller than under SR-STE. The accuracy gains of ImageNet-sized runs do not show at
laptop scale, and the table says so.

Differences from the released code, all mistakes there: groups never run over the end of a row, the
bias stays, feed-forward and attention patterns do not overwrite each other, and a rung that began
before a resumption stays in force.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from aerogel.arguments import check_count, check_names, check_number
from aerogel.pruning.method import Goal, TrainingMethod
from aerogel.pruning.nm_training import NMTrainer
from aerogel.sparsity.controller import GradScaler
from aerogel.sparsity.cost import FlopReport
from aerogel.sparsity.coupling import STE, Coupling, Soft
from aerogel.sparsity.masks import MaskSet
from aerogel.sparsity.parametrizations import SoftMaskedWeight, find_parametrization
from aerogel.sparsity.patterns import NM, parse_pattern
from aerogel.sparsity.schedules import NMLadder
from aerogel.sparsity.select import ParamRef, ParamSelection, select_parameters

Kind = Literal["mask", "structure"]
Decay = Literal["exponential", "linear"]
Ladder = Literal["stepwise", "geometric", "densify"]
Phase = Literal["dense", "middle", "fine-tune"]

# Names in timm, transformers (BERT, ViT, Swin, T5, Llama) and this library.
LOCATIONS: dict[str, tuple[str, ...]] = {
    "ff": (
        "*mlp.fc1.weight",
        "*mlp.fc2.weight",
        "*intermediate.dense.weight",
        "*output.dense.weight",
        "*.wi.weight",
        "*.wi_?.weight",
        "*.wo.weight",
        "*mlp.gate_proj.weight",
        "*mlp.up_proj.weight",
        "*mlp.down_proj.weight",
    ),
    "qkv": (
        "*attn.qkv.weight",
        "*query.weight",
        "*key.weight",
        "*value.weight",
        "*q_proj.weight",
        "*k_proj.weight",
        "*v_proj.weight",
        "*Attention.q.weight",
        "*Attention.k.weight",
        "*Attention.v.weight",
    ),
}
_NOT_FF = ("*attention.output.dense.weight",)

# Shares of the whole training. The released configuration has neither phase; the paper's text has.
DENSE_FRACTION = 0.0125
FINE_TUNE_FRACTION = 0.2
# Over the middle phase, so that beta ends at exp(-8) = 3e-4 (or, if linear, at 0 after 80 %).
EXPONENTIAL_DECAY = 8.0
LINEAR_DECAY = 1 / 0.8
# Of the second moment, as torch's Adam has it.
ADAM_SECOND_DECAY = 0.999


class ProgressiveGradientFlow(NMTrainer):
    """Trains a network to a strict N:M pattern step by step; `step` stands for the optimizer's.

    Args:
        model: any module.
        optimizer: its optimizer.
        n: kept of every group at the end.
        m: group length at the end.
        kind: ``"mask"`` (MDGF) or ``"structure"`` (SDGF).
        decay: of the part that pruned weights play (``"mask"``): ``"exponential"`` or ``"linear"``.
        ladder: of patterns (``"structure"``): ``"stepwise"``, ``"geometric"``, ``"densify"``, or
            {step: (n, m)} of one's own, whose last rung is n:m and begins by the fine-tuning phase.
        total_steps: optimizer steps of the whole training.
        dense_fraction: share of them before any weight is pruned.
        fine_tune_fraction: share at the end with the strict pattern.
        k: decay a step; None is 8 (exponential) or 1.25 (linear) over the middle steps. It belongs
            to the length of a run: values of the paper's 350 epochs do nothing in a short one.
            ``math.inf`` prunes strictly from the end of the dense phase on.
        grad: ``"ste"`` (released code: the gradient reaches pruned weights whole) or ``"chain"``
            (the text: it is multiplied by their part), until the fine-tuning phase.
        axis: 1 groups along inputs, 0 along outputs.
        locations: which weights: ``"ff"`` (both matrices of an MLP), ``"qkv"``; see `LOCATIONS`.
        qkv: another pattern (n, m) for the ``"qkv"`` weights, which it adds.
        include: globs of weights, in place of ``locations``.
        exclude: globs of weights to leave dense.

    Raises:
        ValueError: n > m, a pattern (of any rung) that does not fit a weight, a stepwise ladder
            whose m / n is no power of two, a ladder of one's own that ends elsewhere, phases that
            leave no step between them, k <= 0, locations that match nothing, half-precision
            weights.

    Reference:
        Bambhaniya et al., arXiv 2402.04744.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        n: int,
        m: int,
        *,
        total_steps: int,
        kind: Kind = "mask",
        decay: Decay = "exponential",
        ladder: Ladder | Mapping[int, tuple[int, int]] = "stepwise",
        dense_fraction: float = DENSE_FRACTION,
        fine_tune_fraction: float = FINE_TUNE_FRACTION,
        k: float | None = None,
        grad: Literal["ste", "chain"] = "ste",
        axis: Literal[0, 1] = 1,
        locations: Sequence[str] = ("ff",),
        qkv: tuple[int, int] | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        if kind not in ("mask", "structure"):
            raise ValueError(f"kind must be 'mask' or 'structure', got {kind!r}")
        self.total_steps = total_steps
        self._phases = _phases(total_steps, dense_fraction, fine_tune_fraction)
        begin, end = self._phases
        selection, groups = _selected(model, locations, qkv is not None, include, exclude)
        targets = {"ff": NM(n, m, axis)}
        targets["qkv"] = targets["ff"] if qkv is None else NM(*qkv, axis=axis)
        self._targets = {name: targets[groups[name]] for name in selection}
        self._patterns: dict[str, NMLadder] = {}
        for name, ref in selection.items():
            target = self._targets[name]
            target.validate(ref.shape, name)
            if kind == "structure":
                self._patterns[name] = _ladder(target, ladder, begin, end, ref, name)
        self._beta = _Beta(begin, end, decay, _rate(k, decay, end - begin))
        self._kind = kind

        def pattern_at(name: str, step: int) -> NM | None:
            if step < begin:
                return None
            return self._patterns[name].pattern(step) if self._patterns else self._targets[name]

        coupling: Coupling = STE() if kind == "structure" else _Flow(self._beta, grad, end)
        self._pattern_at = pattern_at
        super().__init__(model, optimizer, selection, coupling, pattern_at)

    def step(self, scaler: GradScaler | None = None, *, unscaled: bool = False) -> bool:
        """One optimizer step, then masks, factor and rung of the next one."""
        if self.t == self.total_steps:
            warnings.warn(
                f"step() was called more than total_steps = {self.total_steps} times; "
                "the pattern stays strict",
                stacklevel=2,
            )
        return super().step(scaler, unscaled=unscaled)

    @property
    def phase(self) -> Phase:
        """The phase of the step that comes."""
        begin, end = self._phases
        return "dense" if self.t < begin else "middle" if self.t < end else "fine-tune"

    @property
    def beta(self) -> float:
        """The part that pruned weights play in the step that comes (0 with ``"structure"``)."""
        return self._beta.value(self.t) if self._kind == "mask" else 0.0

    @property
    def pattern(self) -> NM | None:
        """The (first weight's) pattern in force; None in the dense phase."""
        return self._pattern_at(next(iter(self._targets)), self.t)

    @contextmanager
    def strict(self) -> Iterator[None]:
        """The network as if it were finished now: every weight under its final pattern.

        For evaluation in the course of training, where the network as it stands still leans on
        weights that will be pruned. Masks and factors are as before afterwards.
        """
        now, weights = self.masks, self.controller.stored_weights()
        before = now.clone()
        with torch.no_grad():
            for name, mask in now.items():
                mask.copy_(self._targets[name].select(weights[name].abs()))
        self._set_step(self._phases[1])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, mask in now.items():
                    mask.copy_(before[name])
            self._set_step(self.t)

    def training_flops(self, report: FlopReport) -> float:
        """FLOPs of one training step, averaged over the whole training, to compare at equal cost.

        Only the forward product skips zeros: under `"mask"` in the fine-tuning phase (or once the
        factor is 0), under `"structure"` as the rungs tighten. Both backward products are dense.

        Args:
            report: of `inference_flops` of the model with the `masks`, before or after training.

        Returns:
            FLOPs of a forward and both backward products, for the report's batch.

        Raises:
            ValueError: a report that lacks one of the weights.
        """
        missing = [name for name in self._targets if name not in report.layers]
        if missing:
            raise ValueError(f"report has no FLOPs of {missing[0]!r}: count them with these masks")
        saved = 0.0
        for name in self._targets:
            shares = [self._forward_share(name, step) for step in range(self.total_steps)]
            saved += report.layers[name][0] * (1.0 - sum(shares) / self.total_steps)
        return 3.0 * report.dense - saved

    def _forward_share(self, name: str, step: int) -> float:
        """Share of a weight's forward product that a step computes."""
        pattern = self._pattern_at(name, step)
        leaning = self._kind == "mask" and self._beta.value(step) > 0.0
        return 1.0 if pattern is None or leaning else pattern.fixed_density

    def _set_step(self, step: int) -> None:
        for ref in self.controller.selection.values():
            self.controller.coupling.set_step(ref, step)

    def finalize(self) -> MaskSet:
        """Bake the zeros into the weights and leave a plain model; returns the masks.

        Raises:
            RuntimeError: before the fine-tuning phase, when the pattern is not strict yet.
        """
        if self.phase != "fine-tune":
            raise RuntimeError(
                f"finalized after {self.t} of {self.total_steps} steps, in the {self.phase} phase: "
                f"the pattern is strict from step {self._phases[1]} on"
            )
        return super().finalize()


def gradient_noise(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Mean second moment of the gradients of the weights under masks, as Adam keeps it.

    Args:
        model: in training, with N:M masks on some weights; all linear weights if none has any.
        optimizer: Adam or AdamW, or another one under `track_gradient_noise`; after a step.

    Raises:
        ValueError: an optimizer that keeps no second moments.
    """
    total, count = 0.0, 0
    for ref in _noisy(model):
        moment = optimizer.state[ref.parameter].get("exp_avg_sq")
        if not isinstance(moment, Tensor):
            raise ValueError(
                f"optimizer must keep second moments (Adam, AdamW), or take them with "
                f"track_gradient_noise, got {type(optimizer).__name__}"
            )
        total += float(moment.sum())
        count += moment.numel()
    return total / count


def track_gradient_noise(
    model: nn.Module, optimizer: torch.optim.Optimizer, decay: float = ADAM_SECOND_DECAY
) -> RemovableHandle:
    """Keep second moments of gradients beside an optimizer that has none, for `gradient_noise`.

    They are the running mean that Adam takes, in the optimizer's own state, and so are saved and
    resumed with it. Nothing else about the training changes.

    Args:
        model: in training, with its masks on.
        optimizer: SGD, for example.
        decay: of the running mean, in [0, 1).

    Returns:
        A handle whose ``remove()`` ends it.

    Raises:
        ValueError: a decay out of range.
    """
    check_number("decay", decay, "[0, 1)")
    leaves = [ref.parameter for ref in _noisy(model)]

    @torch.no_grad()
    def update(*_: object) -> None:
        for leaf in leaves:
            if leaf.grad is not None:
                state = optimizer.state[leaf]
                moment = state.setdefault("exp_avg_sq", torch.zeros_like(leaf))
                moment.mul_(decay).addcmul_(leaf.grad, leaf.grad, value=1.0 - decay)

    return optimizer.register_step_pre_hook(update)


def _noisy(model: nn.Module) -> list[ParamRef]:
    """The weights under masks; all of them if none is."""
    refs = list(select_parameters(model).values())
    masked = [ref for ref in refs if find_parametrization(ref.module, ref.attribute) is not None]
    return masked or refs


@dataclass(frozen=True)
class _Beta:
    """1 while dense, decaying in the middle phase, 0 while fine-tuning."""

    begin: int
    end: int
    decay: Decay
    k: float

    def value(self, t: int) -> float:
        if t < self.begin:
            return 1.0
        if t >= self.end or math.isinf(self.k):
            return 0.0
        tau = t - self.begin
        return max(0.0, 1.0 - self.k * tau) if self.decay == "linear" else math.exp(-self.k * tau)

    def due(self, t: int) -> bool:
        return True


@dataclass(frozen=True)
class _Flow(Soft):
    """`Soft` whose gradient passes straight through from the fine-tuning phase on."""

    fine_tune: int = 0
    name: ClassVar[str] = "soft"

    def set_step(self, ref: ParamRef, t: int) -> None:
        super().set_step(ref, t)
        own = find_parametrization(ref.module, ref.attribute)
        if isinstance(own, SoftMaskedWeight):
            own.grad = "ste" if t >= self.fine_tune else self.grad


def _phases(total_steps: int, dense: float, fine_tune: float) -> tuple[int, int]:
    """First step of the middle phase and of the fine-tuning phase."""
    check_count("total_steps", total_steps)
    for argument, value in (("dense_fraction", dense), ("fine_tune_fraction", fine_tune)):
        check_number(argument, value, "[0, 1)")
    begin, end = round(dense * total_steps), total_steps - round(fine_tune * total_steps)
    if begin >= end:
        raise ValueError(
            f"dense_fraction={dense} and fine_tune_fraction={fine_tune} leave none of "
            f"{total_steps} steps between them"
        )
    return begin, end


def _rate(k: float | None, decay: Decay, steps: int) -> float:
    if decay not in ("exponential", "linear"):
        raise ValueError(f"decay must be 'exponential' or 'linear', got {decay!r}")
    if k is None:
        return (EXPONENTIAL_DECAY if decay == "exponential" else LINEAR_DECAY) / steps
    check_number("k", k, "(0, inf]")
    return k


def _selected(
    model: nn.Module,
    locations: Sequence[str],
    with_qkv: bool,
    include: Sequence[str],
    exclude: Sequence[str],
) -> tuple[ParamSelection, dict[str, str]]:
    """The weights, and the location whose pattern each takes."""
    check_names("locations", locations)
    wanted = dict.fromkeys([*locations, *(["qkv"] if with_qkv else [])])
    unknown = [name for name in wanted if name not in LOCATIONS]
    if unknown:
        raise ValueError(f"locations must be of {tuple(LOCATIONS)}, got {unknown[0]!r}")
    found = {name: _at(model, name) for name in LOCATIONS}
    groups = {weight: name for name, weights in found.items() for weight in weights}
    names = include or [weight for name in wanted for weight in found[name]]
    if not names:
        raise ValueError(
            f"locations={tuple(locations)} match no weight of {type(model).__name__}: "
            "name them with include"
        )
    selection = select_parameters(model, include=tuple(names), exclude=tuple(exclude))
    return selection, {name: groups.get(name, "ff") for name in selection}


def _at(model: nn.Module, location: str) -> list[str]:
    names = list(select_parameters(model))
    skipped = _NOT_FF if location == "ff" else ()
    return [
        name
        for name in names
        if any(fnmatchcase(f".{name}", glob) for glob in LOCATIONS[location])
        and not any(fnmatchcase(f".{name}", glob) for glob in skipped)
    ]


def _ladder(
    target: NM,
    kind: Ladder | Mapping[int, tuple[int, int]],
    begin: int,
    end: int,
    ref: ParamRef,
    name: str,
) -> NMLadder:
    length = int(ref.shape[target.axis])
    ladder = NMLadder(target.n, target.m, kind, begin, end, target.axis, length)
    if ladder.pattern(end) != target:
        raise ValueError(
            f"ladder={kind!r} must reach {target}, the pattern of {name!r}, "
            f"by step {end}, when fine-tuning begins"
        )
    for pattern in ladder.patterns:
        pattern.validate(ref.shape, name)
    return ladder


def _build(
    model: nn.Module, optimizer: torch.optim.Optimizer, goal: Goal
) -> ProgressiveGradientFlow:
    pattern = parse_pattern(goal.pattern)
    if not isinstance(pattern, NM):
        raise ValueError(f"pattern must be n:m, got {goal.pattern!r}")
    return ProgressiveGradientFlow(
        model, optimizer, pattern.n, pattern.m, total_steps=goal.steps, include=goal.parameters
    )


def _proposed(model: nn.Module) -> tuple[str, ...]:
    return tuple(_at(model, "ff"))


METHOD = TrainingMethod(
    slug="progressive-gradient-flow",
    build=_build,
    patterns=("n:m",),
    pattern="1:4",
    proposes=_proposed,
)
