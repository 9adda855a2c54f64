"""What a training run leaves to look at: curves and progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class History:
    """Curves of one run; plain numbers, ready for JSON.

    Args:
        steps: `{"step", "epoch", "loss", "lr", "sparsity"}` about 200 times; loss is the mean
            since the entry before.
        epochs: `{"step", "epoch", "sparsity", ...metrics of evaluate}` at the end of each epoch.
        seconds: time spent in training steps, over all resumed parts.
    """

    steps: list[dict[str, float]] = field(default_factory=list)
    epochs: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """All curves as plain lists and dicts."""
        return {"steps": self.steps, "epochs": self.epochs, "seconds": self.seconds}


@dataclass(frozen=True)
class Progress:
    """Where a run stands, for a progress bar."""

    step: int  # steps done
    total: int  # steps of the whole run
    epoch: int
    loss: float
    lr: float
    sparsity: float
    samples_per_second: float
    seconds_left: float


OnProgress = Callable[[Progress], None]


def zero_fraction(model: Any) -> float:
    """Fraction of zeros over the weights that pruning may touch.

    Those of `model.prune_targets()`, or all weights of rank 2 or more if it has no such method.
    """
    if hasattr(model, "prune_targets"):
        weights = [model.get_submodule(name).weight for name, _ in model.prune_targets()]
    else:
        weights = [p for p in model.parameters() if p.dim() > 1]
    total = sum(weight.numel() for weight in weights)
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return zeros / total if total else 0.0
