"""Learning rates for retraining after pruning (P13).

`original` is the learning-rate curve of the first training, T values. A retraining of K steps gets:

| name | curve |
| --- | --- |
| FT   | the last value, constant |
| LRW  | the last K values ("rewinding") |
| SLR  | the whole curve squeezed into K steps ("scaled") |
| CLR  | 10% cosine warm-up from 0 to the largest value, then cosine to the smallest |
| LLR  | 10% linear warm-up from 0 to the largest value, then linear to 0 |
| ALLR | LLR with a peak adapted to how much the pruning step hurt |

    curve = LLR(original, steps=1200)
    scheduler = RetrainingLR(optimizer, curve)      # stepped after every optimizer.step()

Reference: Zimmer, Spiegel, Pokutta, "How I Learned to Stop Worrying and Love Retraining",
ICLR 2023, arXiv 2111.00843 (LLR, ALLR); Renda et al., arXiv 2003.02389 (FT, LRW);
Le & Hua, arXiv 2105.03193 (SLR, CLR).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from aerogel.arguments import check_count, check_number

WARMUP_SHARE = 0.1  # arXiv 2111.00843: "10% of the retraining budget"


class RetrainingCurve:
    """A learning rate as a function of the retraining step, `value(t)` for t in [0, steps].

    Args:
        original: learning rate of every step of the original training (T positive numbers; zeros
            are allowed except everywhere).
        steps: number K of retraining steps, at least 1.

    Raises:
        ValueError: empty, negative or non-finite `original`, or steps < 1.
    """

    name = ""

    def __init__(self, original: Sequence[float], steps: int) -> None:
        if isinstance(original, (str, Mapping)) or not isinstance(original, Iterable):
            raise TypeError(f"original must be a sequence of learning rates, got {original!r}")
        values = tuple(float(v) for v in original)
        if not values:
            raise ValueError("original is empty; it must hold one learning rate per training step")
        if any(not math.isfinite(v) or v < 0 for v in values) or max(values) == 0:
            raise ValueError("original must hold finite learning rates >= 0, not all zero")
        check_count("steps", steps)
        self.original = values
        self.steps = int(steps)

    @property
    def peak(self) -> float:
        """Largest learning rate of the curve's warm-up."""
        return max(self.original)

    def value(self, t: float) -> float:
        """Learning rate of retraining step t; steps past the end keep the last value."""
        check_number("t", t, "[0, inf)")
        return self._value(min(t, self.steps))

    def _value(self, t: float) -> float:
        raise NotImplementedError


class FT(RetrainingCurve):
    """Fine-tuning: the last learning rate of the original training, constant."""

    name = "FT"

    def _value(self, t: float) -> float:
        return self.original[-1]


class LRW(RetrainingCurve):
    """Learning-rate rewinding: the last `steps` values of the original curve.

    Raises:
        ValueError: steps is larger than the original training.
    """

    name = "LRW"

    def __init__(self, original: Sequence[float], steps: int) -> None:
        super().__init__(original, steps)
        if self.steps > len(self.original):
            raise ValueError(
                f"steps={steps} exceeds the original training of {len(self.original)} steps; "
                "LRW can only replay its end (use SLR or LLR)"
            )

    def _value(self, t: float) -> float:
        start = len(self.original) - self.steps
        return self.original[min(start + int(t), len(self.original) - 1)]


class SLR(RetrainingCurve):
    """Scaled: the whole original curve squeezed (or stretched) into `steps`."""

    name = "SLR"

    def _value(self, t: float) -> float:
        total = len(self.original)
        return self.original[min(int(t * total / self.steps), total - 1)]


class CLR(RetrainingCurve):
    """Cyclic: cosine warm-up over 10% from 0 to the maximum, then cosine to the minimum."""

    name = "CLR"

    def _value(self, t: float) -> float:
        warm = WARMUP_SHARE * self.steps
        if t < warm:
            return self.peak * 0.5 * (1.0 - math.cos(math.pi * t / warm))
        low = min(self.original)
        done = (t - warm) / (self.steps - warm)
        return low + (self.peak - low) * 0.5 * (1.0 + math.cos(math.pi * done))


class LLR(RetrainingCurve):
    """Linear: warm-up over 10% from 0 to the maximum, then linear to 0."""

    name = "LLR"

    def _value(self, t: float) -> float:
        warm = WARMUP_SHARE * self.steps
        if t < warm:
            return self.peak * t / warm
        return self.peak * (self.steps - t) / (self.steps - warm)


class ALLR(LLR):
    """Adaptive linear: LLR from clip(max*norm_drop/sqrt(p), max*min(K/T, 1), max).

    Args:
        original: as in `RetrainingCurve`.
        steps: as in `RetrainingCurve`.
        norm_drop: relative L2 norm of what the pruning step removed, `norm_drop(before, after)`.
        pruned_fraction: share p in (0, 1] of the alive weights that this step removed.

    Raises:
        ValueError: norm_drop negative or not finite, pruned_fraction outside (0, 1].
    """

    name = "ALLR"

    def __init__(
        self, original: Sequence[float], steps: int, *, norm_drop: float, pruned_fraction: float
    ) -> None:
        super().__init__(original, steps)
        check_number("norm_drop", norm_drop, "[0, inf)")
        check_number("pruned_fraction", pruned_fraction, "(0, 1]")
        self.norm_drop = float(norm_drop)
        self.pruned_fraction = float(pruned_fraction)

    @property
    def peak(self) -> float:
        """Largest learning rate: small after harmless pruning or for short retraining."""
        top = max(self.original)
        floor = top * min(self.steps / len(self.original), 1.0)
        wanted = top * self.norm_drop / math.sqrt(self.pruned_fraction)
        return min(max(wanted, floor), top)


RETRAINING_CURVES: Mapping[str, type[RetrainingCurve]] = {
    curve.name: curve for curve in (FT, LRW, SLR, CLR, LLR, ALLR)
}


def retraining_curve(
    name: str, original: Sequence[float], steps: int, **options: float
) -> RetrainingCurve:
    """The curve called `name` (FT, LRW, SLR, CLR, LLR, ALLR; any case).

    Raises:
        ValueError: unknown name (lists the nearest).
    """
    kind = RETRAINING_CURVES.get(str(name).upper())
    if kind is None:
        near = get_close_matches(str(name).upper(), RETRAINING_CURVES, n=3, cutoff=0.1)
        raise ValueError(
            f"unknown retraining schedule {name!r}; expected one of {', '.join(RETRAINING_CURVES)}"
            + (f" (nearest: {', '.join(near)})" if near else "")
        )
    return kind(original, steps, **options)


class RetrainingLR(LRScheduler):
    """Drives an optimizer along a `RetrainingCurve`; stepped once per optimizer step.

    Several parameter groups keep the ratios of their initial learning rates; the group with the
    largest one follows the curve itself.

    Args:
        optimizer: its current learning rates only set the ratios between groups.
        curve: the curve to follow.
        last_epoch: step to resume after, -1 to start.
    """

    def __init__(self, optimizer: Optimizer, curve: RetrainingCurve, last_epoch: int = -1) -> None:
        self.curve = curve
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """Learning rate of each group at the current step."""
        base = [float(lr) for lr in self.base_lrs]
        top = max(base)
        value = self.curve.value(max(self.last_epoch, 0))
        return [value * (lr / top if top > 0 else 1.0) for lr in base]

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers only; the curve is rebuilt by the caller."""
        return {
            "last_epoch": self.last_epoch,
            "base_lrs": [float(lr) for lr in self.base_lrs],
            "_step_count": self._step_count,
            "_last_lr": [float(lr) for lr in self._last_lr],
        }


def learning_rate_curve(
    make_scheduler: Callable[[Optimizer], LRScheduler], lr: float, steps: int
) -> list[float]:
    """Record what a scheduler does over `steps` steps, to serve as `original`.

    Args:
        make_scheduler: builds the scheduler for a given optimizer.
        lr: initial learning rate.
        steps: number of steps T of the original training.
    """
    check_number("lr", lr, "[0, inf)")
    check_count("steps", steps)
    optimizer = torch.optim.SGD([torch.zeros((), requires_grad=True)], lr=lr)
    scheduler = make_scheduler(optimizer)
    values = []
    for _ in range(steps):
        values.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return values


def norm_drop(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """Relative L2 drop ||before - after|| / ||before|| over all tensors, as ALLR needs it.

    Args:
        before: weights ahead of the pruning step.
        after: the same weights behind it.

    Raises:
        ValueError: names or shapes differ, or all weights were zero already.
    """
    if set(before) != set(after):
        raise ValueError(
            f"before and after differ in names: {sorted(set(before) ^ set(after))[:5]}"
        )
    lost = total = 0.0
    for name, tensor in before.items():
        if tensor.shape != after[name].shape:
            raise ValueError(
                f"{name}: shapes {tuple(tensor.shape)} and {tuple(after[name].shape)} differ"
            )
        dense = tensor.detach().double()
        lost += float((dense - after[name].detach().double()).square().sum())
        total += float(dense.square().sum())
    if total == 0:
        raise ValueError("all weights in before are zero; a relative norm drop is undefined")
    return math.sqrt(lost / total)
