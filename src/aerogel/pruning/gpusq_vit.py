"""GPUSQ-ViT: 2:4 sparsity, then integers, both taught by the dense vision transformer.

Paper: Yu, Chen, Gan and Fan, "Boost Vision Transformer with GPU-Friendly Sparsity and
Quantization", CVPR 2023, arXiv 2305.10727.

The idea: of every four consecutive weights the two smallest are pruned at once, and the network
trains on; then it trains a little more with weights and activations rounded to 8 or 4 bits. In both
stages the dense network is the teacher, of softened class scores and of the features of the late
blocks. A block whose features moved most while pruning is guarded most while quantising.

When to use it: a trained vision transformer that is to run on hardware with 2:4 products in
integers, or whose weights are to take a sixth (8 bits) or a thirteenth (4 bits) of their bytes.
Labels are not needed (`supervised=False`), and other tasks give their loss as `task_loss`.

Costs and buys: a teacher's forward pass in every step, a third as much again as training alone.
A 2:4 weight takes 0.5625 of its bytes in float16 and 0.625 of those in int8; on a CPU that halves
what a product on one to a few vectors reads (`aerogel.compile` measures), and buys nothing for many
tokens at once. The packed network is `export_nm`'s; torch's and TensorRT's 2:4 kernels want a GPU.

From a recipe (``aerogel compress --method gpusq-vit``) one training phase holds both stages, in 8
bits with ``2:4`` and in 4 with ``2:4:pairs``. What it saves is a plain network: weights that int8
holds without loss, activations in float.

The claim this repository measures (``aerogel reproduce gpusq-vit``): distillation brings a 2:4
network back to within 2 points of dense, 8 bits cost at most 1.5 points, training with 4 bits
beats rounding afterwards, and at 3 bits the teacher is worth a point over labels alone on average,
though not with every seed. Which of its terms does it, and what the layer factors add, three seeds
do not tell.

What the paper leaves open and is chosen here: temperature 3, factors of mean 1, AdamW at a tenth of
the dense learning rate for 30 % of its epochs, a hundredth for 15 % of those, 8 bits for the
operands of both products of attention whatever the layers have.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn

from aerogel.arguments import check_count, check_number
from aerogel.pruning.gpusq_recipe import GPUSQConfig, Stage
from aerogel.pruning.gpusq_student import (
    GPUSQCost,
    bake_student,
    bake_student_,
    export_nm,
    gpusq_cost,
    has_attention,
    linear_weights,
    mask_student,
    parse_nm,
    proposed_weights,
    quantise_student,
    require_attention,
    student_masks,
)
from aerogel.pruning.method import Goal, TrainingMethod
from aerogel.sparsity.blocks import find_blocks
from aerogel.sparsity.distillation import (
    DistillationObjective,
    layer_factors,
    matching_modules,
)
from aerogel.sparsity.fake_quantize import (
    activation_quantisers,
    calibrate_activations,
    enable_quantisers,
)
from aerogel.sparsity.masks import MaskSet
from aerogel.sparsity.patterns import NM, NMPairs

__all__ = [
    "GPUSQConfig",
    "GPUSQCost",
    "GPUSQResult",
    "GPUSQTrainer",
    "Stage",
    "bake_student",
    "export_nm",
    "gpusq",
    "gpusq_cost",
    "gpusq_prune",
    "gpusq_quantise",
]

PAPER = GPUSQConfig()
# Of one phase of training under `GPUSQTrainer`: where the integers begin, and how much of the
# pruning stage before that its layer errors are the mean of.
QUANTISE_FROM = 0.6
ERROR_SHARE = 0.2


@dataclass(frozen=True)
class GPUSQResult:
    """What `gpusq` made.

    Attributes:
        student: in integers, as it trained: see `export_nm` and `bake_student`.
        sparse: the student of the first stage, in floating point.
        layer_errors: by critical layer, of the end of the first stage.
    """

    student: nn.Module
    sparse: nn.Module
    layer_errors: dict[str, float]


def gpusq(model: nn.Module, loader: Iterable[Any], config: GPUSQConfig = PAPER) -> GPUSQResult:
    """Both stages, with the dense model as teacher; the model is unchanged.

    Args:
        model: the trained dense network.
        loader: batches (inputs, targets) that can be walked through again and again; without
            labels, inputs alone will do.
        config: the recipe.

    Raises:
        ValueError: as the two stages.

    Reference:
        Yu et al., arXiv 2305.10727.
    """
    teacher = copy.deepcopy(model).eval()
    sparse, errors = gpusq_prune(model, teacher, loader, config)
    return GPUSQResult(gpusq_quantise(sparse, teacher, loader, errors, config), sparse, errors)


def gpusq_prune(
    model: nn.Module,
    teacher: nn.Module,
    loader: Iterable[Any],
    config: GPUSQConfig = PAPER,
) -> tuple[nn.Module, dict[str, float]]:
    """Stage 1: a copy of the model in 2:4, trained with the teacher.

    Args:
        model: the trained dense network; unchanged.
        teacher: the same, in eval mode; never changed. It may be the model itself.
        loader: as for `gpusq`.
        config: the recipe.

    Returns:
        The student with its masks attached, in eval mode, and by critical layer the mean squared
        error of its features over the last epoch (empty with gamma = 0 or without an epoch).

    Raises:
        ValueError: a weight whose inputs the pattern does not divide, critical layers that match
            nothing or have other shapes in the teacher, a teacher in training mode, an empty
            loader, a loss that is not finite.
    """
    student = copy.deepcopy(model)
    pattern = parse_nm(config.pattern)
    selection = linear_weights(
        student, pattern, config.include, config.exclude, config.skip_incompatible
    )
    mask_student(student, selection, pattern)
    with config.objective(student, teacher) as objective:
        errors = _train(student, objective, loader, config.prune)
    return student.eval(), errors


def gpusq_quantise(
    student: nn.Module,
    teacher: nn.Module,
    loader: Iterable[Any],
    layer_errors: Mapping[str, float],
    config: GPUSQConfig = PAPER,
) -> nn.Module:
    """Stage 2: a copy of the sparse student that trains in integers, its masks fixed.

    Args:
        student: of `gpusq_prune`; unchanged.
        teacher: the dense network still, in eval mode.
        loader: as for `gpusq`.
        layer_errors: of `gpusq_prune`.
        config: the recipe; `quantise.epochs=0` only rounds (post-training quantisation).

    Returns:
        The student with quantisers, in eval mode.

    Raises:
        ValueError: a student without masks of the pattern (names the weight), layer errors for
            other layers, an empty loader.
    """
    pattern = parse_nm(config.pattern)
    for name, mask in student_masks(student)[1].items():
        if not pattern.is_satisfied(mask, exact=True):
            raise ValueError(f"the mask of {name!r} is not {pattern}: prune with gpusq_prune first")
    quantised = copy.deepcopy(student)
    quantise_student(
        quantised,
        config.bits,
        attention=config.quantise_attention,
        percentile=config.percentile,
    )
    calibration = (_inputs(batch) for batch in islice(loader, config.calibration_batches))
    calibrate_activations(quantised, calibration, forward=lambda model, args: model(*args))
    with config.objective(quantised, teacher) as objective:
        if objective.layers and config.quantise.epochs:
            objective.factors = _factors(layer_errors, objective.layers)
        _train(quantised, objective, loader, config.quantise)
    return quantised.eval()


class GPUSQTrainer:
    """Both stages in one run of someone else's training loop: `step` stands for the optimizer's.

    The loop's own loss is the hard term (alpha = 1, and it must not be scaled, as accumulating
    gradients does); the teacher's terms join it in the backward pass. The first part of the steps
    trains the sparse network, the rest with integers.

    Args:
        model: the trained dense network; a copy of it becomes the teacher.
        optimizer: its optimizer.
        total_steps: of the whole run.
        config: the recipe; its stages and `alpha` are the loop's.
        quantise_from: share of the steps after which the integers begin.

    Raises:
        ValueError: as `gpusq_prune`; steps that leave one of the stages empty.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        config: GPUSQConfig = PAPER,
        *,
        quantise_from: float = QUANTISE_FROM,
    ) -> None:
        check_count("total_steps", total_steps, 2)
        check_number("quantise_from", quantise_from, "(0, 1)")
        self.first_quantised = round(quantise_from * total_steps)
        if not 0 < self.first_quantised < total_steps:
            raise ValueError(
                f"quantise_from={quantise_from} of total_steps={total_steps} leaves a stage empty"
            )
        self.model, self.optimizer, self.t = model, optimizer, 0
        matching_modules(model, config.layers(model), "critical_layers")
        if config.quantise_attention:
            require_attention(model)
        teacher = copy.deepcopy(model).eval().requires_grad_(False)
        pattern = parse_nm(config.pattern)
        selection = linear_weights(
            model, pattern, config.include, config.exclude, config.skip_incompatible
        )
        self.masks: MaskSet = mask_student(model, selection, pattern)
        quantise_student(
            model,
            config.bits,
            attention=config.quantise_attention,
            percentile=config.percentile,
        )
        enable_quantisers(model, False)
        self.objective = config.objective(model, teacher, attach=True)
        self._sums: dict[str, float] = dict.fromkeys(self.objective.layers, 0.0)
        self._measure_from = round(self.first_quantised * (1.0 - ERROR_SHARE))

    @property
    def quantising(self) -> bool:
        """Whether the step that comes is one of the second stage."""
        return self.t >= self.first_quantised

    def step(self) -> None:
        """One optimizer step, and at its time the change of stages.

        Raises:
            RuntimeError: the loop does not call the model that this trainer was given.
        """
        if not self.objective.called:
            raise RuntimeError(
                f"no forward pass of {type(self.model).__name__} came before this step: give the "
                "trainer the network whose forward gives the class scores"
            )
        self.optimizer.step()
        if self._measure_from <= self.t < self.first_quantised:
            for name, error in _over_ranks(self.objective.errors).items():
                self._sums[name] += error
        self.t += 1
        if self.t == self.first_quantised:
            self._begin_quantising()

    def finalize(self) -> MaskSet:
        """Leave a plain network, its weights whole multiples of a scale for every output.

        Raises:
            RuntimeError: before the second stage.
        """
        if not self.quantising:
            raise RuntimeError(
                f"finalized after {self.t} steps: the integers begin after {self.first_quantised}"
            )
        masks = student_masks(self.model)[1].clone()
        self.objective.close()
        bake_student_(self.model)
        return masks

    def state_dict(self) -> dict[str, Any]:
        """What has to survive a kill, beside the stored weights and the optimizer."""
        return {
            "t": self.t,
            "errors": dict(self._sums),
            "masks": self.masks.state_dict(),
            "ranges": {name: q.largest.clone() for name, q in activation_quantisers(self.model)},
            "teacher": {name: v.clone() for name, v in self.objective.teacher.state_dict().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume; load the model's and the optimizer's state first."""
        if set(state["errors"]) != set(self._sums):
            raise ValueError(
                f"state has errors of {sorted(state['errors'])}, expected {sorted(self._sums)}"
            )
        self.t, self._sums = int(state["t"]), dict(state["errors"])
        self.masks.load_state_dict(state["masks"])
        self.objective.teacher.load_state_dict(state["teacher"])
        for name, quantiser in activation_quantisers(self.model):
            quantiser.largest.copy_(state["ranges"][name])
        if self.quantising:
            self._begin_quantising()

    def _begin_quantising(self) -> None:
        enable_quantisers(self.model)
        if self._sums:
            self.objective.factors = _factors(self._sums, self.objective.layers)


def _factors(errors: Mapping[str, float], layers: Sequence[str]) -> dict[str, float] | None:
    """Of the layers, in stage 2; None where all are equal."""
    if set(errors) != set(layers):
        raise ValueError(
            f"layer_errors name {sorted(errors)}, but the critical layers are {sorted(layers)}"
        )
    factors = layer_factors(errors)
    if factors is None:
        warnings.warn("all layer_errors are zero: every layer weighs the same", stacklevel=3)
    return factors


def _inputs(batch: Any) -> tuple[Any, ...]:
    """The networks' arguments: the first of a batch, which may be several."""
    first = batch[0] if isinstance(batch, (tuple, list)) else batch
    return tuple(first) if isinstance(first, (tuple, list)) else (first,)


def _targets(batch: Any) -> Any:
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise ValueError("a batch has no targets: give (inputs, targets), or supervised=False")
    return batch[1]


def _train(
    student: nn.Module,
    objective: DistillationObjective,
    loader: Iterable[Any],
    stage: Stage,
) -> dict[str, float]:
    """One stage; returns the mean errors of the layers over its last epoch."""
    if stage.epochs == 0:
        return {}
    if not isinstance(loader, Iterable):
        raise TypeError(f"loader must be an iterable of batches, got {loader!r}")
    steps = len(loader) if isinstance(loader, Sized) else sum(1 for _ in loader)
    if steps == 0:
        raise ValueError("loader is empty: expected at least one batch in every epoch")
    optimizer = _optimizer(student, stage)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps * stage.epochs)
    sums: dict[str, float] = {}
    student.train()
    for _ in range(stage.epochs):
        sums, count = {}, 0
        for batch in loader:
            inputs = _inputs(batch)
            targets = _targets(batch) if objective.needs_targets else None
            optimizer.zero_grad()
            loss = objective(inputs, targets)
            if not math.isfinite(float(loss.detach())):
                raise ValueError(f"the loss became {float(loss.detach())}: is lr={stage.lr} high?")
            loss.backward()
            optimizer.step()
            schedule.step()
            size = len(inputs[0])
            count += size
            for name, error in objective.errors.items():
                sums[name] = sums.get(name, 0.0) + size * error
    return {name: total / count for name, total in sums.items()}


def _optimizer(student: nn.Module, stage: Stage) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [
        {"params": [p for p in student.parameters() if p.dim() > 1]},
        {"params": [p for p in student.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=stage.lr, weight_decay=stage.weight_decay)


def _over_ranks(errors: Mapping[str, float]) -> dict[str, float]:
    """Means over the processes of a distributed training."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or not errors:
        return dict(errors)
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    total = torch.tensor(list(errors.values()), dtype=torch.float64, device=device)
    distributed.all_reduce(total)
    return dict(zip(errors, (total / distributed.get_world_size()).tolist(), strict=True))


def _build(model: nn.Module, optimizer: torch.optim.Optimizer, goal: Goal) -> GPUSQTrainer:
    pattern = parse_nm(goal.pattern)
    config = GPUSQConfig(
        bits=4 if isinstance(pattern, NMPairs) else 8,
        pattern=pattern.spec,
        include=goal.parameters,
        quantise_attention=has_attention(model),
    )
    return GPUSQTrainer(model, optimizer, goal.steps, config)


def _proposes(model: nn.Module) -> tuple[str, ...]:
    return proposed_weights(model) if _unfit(model) is None else ()


def _unfit(model: nn.Module) -> str | None:
    try:
        find_blocks(model)
        linear_weights(model, NM(2, 4), skip_incompatible=True)
    except ValueError as error:
        return str(error)
    return None


METHOD = TrainingMethod(
    slug="gpusq-vit",
    build=_build,
    patterns=("n:m",),
    pattern="2:4",
    proposes=_proposes,
    unfit=_unfit,
)
