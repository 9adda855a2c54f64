"""The recipe of GPUSQ-ViT: the loss, what becomes sparse and how fine, and how long it trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from aerogel.arguments import check_count, check_names, check_number
from aerogel.pruning.gpusq_student import block_stages, parse_nm
from aerogel.sparsity.distillation import (
    DistillationObjective,
    Scores,
    TaskLoss,
    class_scores,
    hard_loss,
)

BITS = (8, 4)
EXPERIMENTAL_BITS = (3, 2)
LATE = "late"
LATE_SHARE = 0.25
LEAST_LATE_BLOCKS = 2


@dataclass(frozen=True)
class Stage:
    """How long and how fast a stage trains: AdamW, cosine learning rate to 0.

    Attributes:
        epochs: passes over the data; 0 only prunes, or only rounds.
        lr: first learning rate.
        weight_decay: on matrices.
    """

    epochs: int
    lr: float
    weight_decay: float = 0.05

    def __post_init__(self) -> None:
        check_count("epochs", self.epochs, 0)
        check_number("lr", self.lr, "(0, inf)")
        check_number("weight_decay", self.weight_decay, "[0, inf)")


@dataclass(frozen=True)
class GPUSQConfig:
    """The recipe.

    Attributes:
        alpha, beta, gamma: weights of labels, softened scores and features.
        tau: temperature of the scores.
        critical_layers: whose outputs are features: "late" (the last quarter of the blocks, at
            least 2), or names or globs of modules.
        bits: 8 or 4, of weights and inputs of the sparse layers; 3 and 2 with `experimental`.
        pattern: "2:4", or "pair": 2 of every 4 pairs of neighbours, the 4-bit form.
        supervised: whether labels are used.
        quantise_attention: also round the operands of both products of attention, to 8 bits.
        include, exclude: globs of the weights; by default the linear layers of the blocks.
        skip_incompatible: leave weights dense whose inputs the pattern does not divide.
        percentile: of the magnitudes of activations that their range covers; None is all.
        experimental: allow 3 and 2 bits.
        calibration_batches: batches that find the ranges of activations before stage 2.
        prune, quantise: the stages; as for DeiT, whose dense training has 300 epochs at 1e-3.
        task_loss: (output, targets) -> scalar, the hard term.
        scores: class scores (..., classes) of an output, for the soft term.
    """

    alpha: float = 1.0
    beta: float = 10.0
    gamma: float = 5.0
    tau: float = 3.0
    critical_layers: Literal["late"] | Sequence[str] = LATE
    bits: int = 8
    pattern: str = "2:4"
    supervised: bool = True
    quantise_attention: bool = True
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    skip_incompatible: bool = False
    percentile: float | None = None
    experimental: bool = False
    calibration_batches: int = 8
    prune: Stage = Stage(90, 1e-4)
    quantise: Stage = Stage(14, 1e-5)
    task_loss: TaskLoss = hard_loss
    scores: Scores = class_scores

    def __post_init__(self) -> None:
        allowed = BITS + (EXPERIMENTAL_BITS if self.experimental else ())
        if self.bits not in allowed:
            raise ValueError(
                f"bits must be one of {allowed}, got {self.bits!r} "
                "(experimental=True allows 3 and 2)"
            )
        for name in ("alpha", "beta", "gamma"):
            check_number(name, getattr(self, name), "[0, inf)")
        check_number("tau", self.tau, "(0, inf)")
        if self.percentile is not None:
            check_number("percentile", self.percentile, "(0, 100]")
        check_count("calibration_batches", self.calibration_batches)
        if not isinstance(self.critical_layers, str):
            check_names("critical_layers", self.critical_layers)
        elif self.critical_layers != LATE:
            raise ValueError(
                f"critical_layers must be 'late' or names, got {self.critical_layers!r}"
            )
        parse_nm(self.pattern)

    def layers(self, model: nn.Module) -> Sequence[str]:
        """Names or globs of the critical layers of a network."""
        if self.critical_layers != LATE:
            return self.critical_layers
        return late_blocks(model) if self.gamma > 0 else ()

    def objective(
        self, student: nn.Module, teacher: nn.Module, *, attach: bool = False
    ) -> DistillationObjective:
        """The loss of both stages."""
        return DistillationObjective(
            student,
            teacher,
            self.layers(teacher),
            alpha=self.alpha,
            beta=self.beta,
            gamma=self.gamma,
            temperature=self.tau,
            task_loss=self.task_loss if self.supervised and not attach else None,
            scores=self.scores,
            attach=attach,
        )


def late_blocks(model: nn.Module) -> tuple[str, ...]:
    """Names of the last quarter of the blocks, at least 2; of a Swin, the last of each late stage.

    Raises:
        ValueError: the network has no list of equal blocks.
    """
    stages = block_stages(model)
    count = max(LEAST_LATE_BLOCKS, int(LATE_SHARE * len(stages)))
    return tuple(stage[-1] for stage in stages[-count:])
