"""How to train: one frozen description, and the learning rate as a function of the step."""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the outcome of a training run.

    Args:
        epochs: passes over the training data; fractions are allowed. Ignored if `steps` is given.
        steps: optimizer steps; None takes `epochs`.
        batch_size: samples a step, over all processes and accumulated micro-batches.
        grad_accumulation: micro-batches a step; batch norm sees one micro-batch at a time.
        optimizer: "sgd" (Nesterov momentum) or "adamw".
        lr: peak learning rate.
        momentum: of SGD; first beta of AdamW.
        weight_decay: on weights; biases, norms and `model.no_weight_decay()` are left out.
        schedule: "cosine" (linear warm-up, cosine to 0), "onecycle" (the same curve from lr/25,
            momentum falling and rising against it) or "constant" (after the warm-up).
        warmup: fraction of the steps over which the rate rises.
        label_smoothing: share of the target spread over all classes.
        gradient_clip: largest gradient norm; None does not clip.
        distill_alpha: share of the loss that is the teacher's, if there is a teacher.
        temperature: softens both outputs in the teacher's share of a classification loss.
        distill_features: patterns of module names; the student also learns their outputs from the
            teacher's like-named modules (`FeatureMatch`).
        feature_weight: what that loss is multiplied by before it is added.
        augment: "none", "flip", "standard" or "strong", as the data set understands it.
        seed: decides the order of the samples, augmentation and dropout.
        channels_last: lay out images and weights channel by channel innermost, which trains
            MobileNets on a CPU 1.2 to 1.5 times as fast.
        eval_samples: test samples scored at the end of each epoch, to watch; None takes all,
            0 none.
    """

    epochs: float = 8.0
    steps: int | None = None
    batch_size: int = 128
    grad_accumulation: int = 1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["cosine", "onecycle", "constant"] = "cosine"
    warmup: float = 0.1
    label_smoothing: float = 0.0
    gradient_clip: float | None = None
    distill_alpha: float = 0.5
    temperature: float = 2.0
    distill_features: tuple[str, ...] = ()
    feature_weight: float = 1.0
    augment: str = "none"
    seed: int = 0
    channels_last: bool = True
    eval_samples: int | None = 2000

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                near = difflib.get_close_matches(str(value), choices, n=5, cutoff=0.0)
                raise ValueError(f"{name} = {value!r} is unknown; nearest: {', '.join(near)}")
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value!r}")
        if self.steps is None and not self.epochs > 0:
            raise ValueError(f"epochs must be positive, got {self.epochs!r}")
        if self.batch_size % self.grad_accumulation:
            raise ValueError(
                f"batch_size = {self.batch_size} is not a multiple of "
                f"grad_accumulation = {self.grad_accumulation}"
            )

    def steps_per_epoch(self, samples: int) -> int:
        """Full batches in one pass; the incomplete last one is dropped.

        Raises:
            ValueError: the data set is smaller than one batch.
        """
        if samples < self.batch_size:
            raise ValueError(
                f"batch_size = {self.batch_size} is larger than the {samples} training samples"
            )
        return samples // self.batch_size

    def total_steps(self, samples: int) -> int:
        """Optimizer steps of the whole run on a training set of this many samples."""
        per_epoch = self.steps_per_epoch(samples)
        return self.steps if self.steps is not None else max(1, round(self.epochs * per_epoch))

    def lr_at(self, step: int, total: int) -> float:
        """Learning rate of step 0..total-1: a pure function, so that resuming needs no state."""
        if total <= 0:
            raise ValueError(f"total must be positive, got {total}")
        peak = self.warmup * total
        if step < peak:
            start = 1 / _ONE_CYCLE_DIVISOR if self.schedule == "onecycle" else 0.0
            return self.lr * (start + (1 - start) * (step + 1) / (peak + 1))
        if self.schedule == "constant":
            return self.lr
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - peak) / (total - peak)))

    def momentum_at(self, step: int, total: int) -> float:
        """Momentum of a step: constant, or against the rate between 0.95 and 0.85 ("onecycle")."""
        if self.schedule != "onecycle":
            return self.momentum
        return 0.95 - 0.1 * self.lr_at(step, total) / self.lr

    def fingerprint(self) -> dict[str, Any]:
        """The values that must agree between a saved state and the run that resumes it."""
        return dataclasses.asdict(self)


_ONE_CYCLE_DIVISOR = 25.0  # Smith, Topin, "Super-Convergence", arXiv 1708.07120
_CHOICES: dict[str, tuple[str, ...]] = {
    "optimizer": ("sgd", "adamw"),
    "schedule": ("cosine", "onecycle", "constant"),
}
_RANGES: dict[str, tuple[float, float]] = {
    "steps": (1, math.inf),
    "batch_size": (1, math.inf),
    "grad_accumulation": (1, math.inf),
    "lr": (math.ulp(0.0), 1e6),
    "momentum": (0.0, 1.0),
    "weight_decay": (0.0, 1e6),
    "warmup": (0.0, 1.0),
    "label_smoothing": (0.0, 1.0),
    "gradient_clip": (math.ulp(0.0), math.inf),
    "distill_alpha": (0.0, 1.0),
    "temperature": (math.ulp(0.0), math.inf),
    "feature_weight": (0.0, math.inf),
    "eval_samples": (0, math.inf),
}
