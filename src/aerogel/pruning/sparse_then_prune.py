"""Sparse then prune: fine-tune a vision transformer under a penalty, then prune it at once.

Paper: Prasetyo, Yudistira, Widodo, "Sparse then Prune: Toward Efficient Vision Transformers",
2023, arXiv 2307.11988.

The idea: while a pre-trained ViT is fine-tuned, 0.01 * mean(ln(1 + A^2)) of the last block's
attention probabilities A joins the loss. Afterwards the smallest weights of all layers together are
zeroed, and nothing is trained after that.

When to use it: fine-tuning a ViT that shall also become smaller in the same run. With
``penalty="weight-log"`` (ours: ln(1 + w^2) of the weights themselves) it prepares weights for
magnitude pruning; the paper's own penalty does little, see below.

Costs and buys: a few per cent of the time of a step, no memory to speak of. Unstructured zeros at
10-50 % save storage (a bit per weight and the values kept), not time; from 60-70 % on
`aerogel.compile` measures, layer by layer, whether sparse kernels win.

What the penalty can do: rows of A sum to 1 and ln(1 + p^2) is convex below 1, so it is smallest for
uniform rows, about 1 / n^2 for n tokens, and largest, ln(2) / n, for one-hot rows. It spreads
attention; it makes no zeros. With 577 tokens and the published weight it is below 1.3e-5.

The claim this repository measures (``aerogel reproduce sparse-then-prune``): the published penalty
changes accuracy by no more than seeds do, a large weight makes attention uniform, and the weight
penalty makes pruning to 70 % cheaper.

What that leaves out: the gain of the penalty on weights was found with PyTorch's default initial
weights. From weights drawn as timm does (deviation 0.02) a network without any penalty keeps 93 %
at 70 % zeros, and the penalty gained nothing in the one seed that was tried.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aerogel.arguments import check_count, check_number
from aerogel.pruning.method import Goal, TrainingMethod
from aerogel.sparsity.blocks import find_blocks
from aerogel.sparsity.masks import MaskSet, build_masks
from aerogel.sparsity.penalties import AttentionLogPenalty, WeightL1, WeightLogPenalty
from aerogel.sparsity.select import WEIGHT_TYPES, ParamRef, ParamSelection, select_parameters

Penalty = Literal["attention", "weight-log", "weight-l1"]
Blocks = Literal["last", "all"] | Sequence[int]
Batches = Iterable[tuple[Tensor, Tensor]]

# The published recipe.
LAMBDA = 0.01
EPOCHS = 20
MAX_LR = 1e-3
WARMUP_STEPS = 500
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4
# "Averaged over several ratios" of the paper; the list is ours.
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)


@dataclass(frozen=True)
class Loaders:
    """Batches (inputs, class numbers) that can be walked through again and again.

    Attributes:
        train: Of the fine-tuning.
        test: For every figure that is reported.
        validation: For choosing the best epoch; None chooses by the training loss, as published.
    """

    train: Batches
    test: Batches
    validation: Batches | None = None


@dataclass(frozen=True)
class PruneResult:
    """What `sparse_then_prune` found.

    Attributes:
        masks: Of the wanted ratio, `True` = kept; applied to the model.
        dense_metrics: "accuracy" (per cent) and "loss" of the fine-tuned model on the test data.
        pruned_metrics: The same at the wanted ratio.
        curve: The same at every ratio, from the one fine-tuned model.
        train_losses: Mean loss of every epoch, penalty included.
        best_epoch: Number of the epoch whose weights were kept, from 0.
    """

    masks: MaskSet
    dense_metrics: dict[str, float]
    pruned_metrics: dict[str, float]
    curve: dict[float, dict[str, float]] = field(default_factory=dict)
    train_losses: tuple[float, ...] = ()
    best_epoch: int = 0


class _Value(Protocol):
    def value(self) -> Tensor:
        """The penalty of the last forward pass."""


def sparse_then_prune(
    model: nn.Module,
    loaders: Loaders,
    *,
    lam: float = LAMBDA,
    blocks: Blocks = "last",
    epochs: int = EPOCHS,
    ratio: float = 0.5,
    ratios: Sequence[float] = RATIOS,
    include_norm: bool = True,
    penalty: Penalty = "attention",
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    max_lr: float = MAX_LR,
    warmup_steps: int = WARMUP_STEPS,
) -> PruneResult:
    """Fine-tune a classifier under a penalty, then zero its smallest weights; in place.

    Args:
        model: a classifier with pre-trained weights and a head for the task; ours,
            transformers' or any whose attention `AttentionLogPenalty` can read.
        loaders: training and test batches.
        lam: weight of the penalty, >= 0.
        blocks: whose attention is penalised: "last" (as released), "all" or block numbers.
        epochs: of the fine-tuning; 0 only prunes.
        ratio: fraction of the candidates that become zero, in [0, 1).
        ratios: further ratios to evaluate from the same fine-tuned model.
        include_norm: whether gains of the blocks' norms compete (as published). They start at 1
            and are rarely among the smallest; False is the cleaner choice.
        penalty: "attention" (published), or on the weights (ours): "weight-log", "weight-l1".
        optimizer: makes one; None is SGD with momentum 0.9 and weight decay 1e-4.
        max_lr: peak of the one-cycle learning rate.
        warmup_steps: steps until it; at most half of all steps.

    Returns:
        Masks and metrics; the model is left pruned, in eval mode, without anything attached.

    Raises:
        ValueError: lam < 0, a ratio outside [0, 1), a block that does not exist, an unknown
            penalty, no weight to prune, an empty loader; in training, when the model gets back its
            weights, a loss that is not finite, attention that holds NaN or is never shown (names
            the module).

    Reference:
        Prasetyo, Yudistira, Widodo, arXiv 2307.11988.
    """
    for each in (ratio, *ratios):
        _check_ratio(each)
    wanted = [*dict.fromkeys([*ratios, ratio])]
    check_number("lam", lam, "[0, inf)")
    check_count("epochs", epochs, 0)
    check_number("max_lr", max_lr, "(0, inf)")
    check_count("warmup_steps", warmup_steps, 0)
    _check_loaders(loaders, epochs)
    selection = prunable_weights(model, include_norm=include_norm)
    losses: tuple[float, ...] = ()
    best = 0
    if epochs:
        make = optimizer or _published_optimizer
        with _kept_on_error(model), _penalised(model, penalty, lam, blocks, selection) as term:
            losses, best = _fine_tune(
                model, loaders, term, make(model), epochs, max_lr, warmup_steps
            )
    dense = evaluate(model, loaders.test)
    curve, masks = {}, {}
    for each in sorted(wanted):
        masks[each] = global_masks(selection, each)
        pruned = copy.deepcopy(model)
        masks[each].apply_(pruned)
        curve[each] = evaluate(pruned, loaders.test)
    masks[ratio].apply_(model)
    return PruneResult(masks[ratio], dense, curve[ratio], curve, losses, best)


def prunable_weights(model: nn.Module, *, include_norm: bool = True) -> ParamSelection:
    """The weights that compete: linear and convolution layers, and the blocks' norms if wanted.

    Biases, position embedding, class token and the last norm never do.

    Args:
        model: any module.
        include_norm: see `sparse_then_prune`.

    Raises:
        ValueError: the model has none.
    """
    plain = select_parameters(model, WEIGHT_TYPES)
    norms = _block_norms(model) if include_norm else []
    found = {ref.name: ref for ref in (*plain.values(), *norms)}
    order = [f"{name}.weight" if name else "weight" for name, _ in model.named_modules()]
    return ParamSelection([found[name] for name in order if name in found])


def global_masks(selection: ParamSelection, ratio: float) -> MaskSet:
    """Masks that prune exactly round(ratio * weights), the smallest of all tensors together.

    Args:
        selection: the weights that compete.
        ratio: fraction that becomes zero, in [0, 1).

    Raises:
        ValueError: a ratio outside [0, 1), weights that are not finite.
    """
    _check_ratio(ratio)
    scores = {name: weight.abs() for name, weight in selection.weights().items()}
    return build_masks(scores, 1.0 - ratio, scope="global", rounding="round")


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches) -> dict[str, float]:
    """ "accuracy" in per cent and mean "loss"; leaves the model in eval mode.

    Raises:
        ValueError: no batch.
    """
    model.eval()
    right, loss, count = 0, 0.0, 0
    for inputs, labels in batches:
        logits = _logits(model(inputs))
        right += int((logits.argmax(1) == labels).sum())
        loss += float(F.cross_entropy(logits.float(), labels, reduction="sum"))
        count += len(labels)
    if count == 0:
        raise ValueError("batches is empty: expected at least one batch to evaluate on")
    return {"accuracy": 100.0 * right / count, "loss": loss / count}


class PenalisedPruner:
    """The same for a training loop of one's own: `step` stands for the optimizer's.

    The penalty's gradient is added in the backward pass (attention) or before the step (weights),
    so that the loop's loss stays as it is. `finalize` prunes.

    Args:
        model: any module.
        optimizer: its optimizer.
        sparsity: fraction of zeros at the end, in [0, 1).
        lam: weight of the penalty, >= 0.
        penalty: see `sparse_then_prune`.
        blocks: see `sparse_then_prune`.
        include: globs of the weights that compete; none takes `prunable_weights`.

    Raises:
        ValueError: as `sparse_then_prune`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        sparsity: float,
        *,
        lam: float = LAMBDA,
        penalty: Penalty = "attention",
        blocks: Blocks = "last",
        include: Sequence[str] = (),
    ) -> None:
        check_number("sparsity", sparsity, "[0, 1)")
        check_number("lam", lam, "[0, inf)")
        self.optimizer, self.sparsity = optimizer, sparsity
        self._model = model
        self._selection = (
            select_parameters(model, include=include) if include else prunable_weights(model)
        )
        self._attached = contextlib.ExitStack()
        self._weights: _Value | None = None
        if penalty == "attention":
            self._attached.enter_context(AttentionLogPenalty(model, lam, blocks, attach=True))
        else:
            self._weights = _weight_penalty(penalty, lam, self._selection)

    def step(self) -> None:
        """One optimizer step."""
        if self._weights is not None and (term := self._weights.value()).requires_grad:
            term.backward()
        self.optimizer.step()

    def finalize(self) -> MaskSet:
        """Detach the penalty, zero the smallest weights, and return the masks."""
        self._attached.close()
        masks = global_masks(self._selection, self.sparsity)
        masks.apply_(self._model)
        return masks

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the model and the optimizer hold all there is."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume; there is nothing to restore."""


def _check_ratio(ratio: float) -> None:
    check_number("ratio", ratio, "[0, 1)")


def _check_loaders(loaders: Loaders, epochs: int) -> None:
    used = {"train": loaders.train if epochs else None, "test": loaders.test}
    for name, batches in (used | {"validation": loaders.validation}).items():
        if isinstance(batches, Sized) and len(batches) == 0:
            raise ValueError(f"loaders.{name} is empty: expected at least one batch")


@contextlib.contextmanager
def _kept_on_error(model: nn.Module) -> Iterator[None]:
    """The weights and modes from before, should training fail half way."""
    modes = [(module, module.training) for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    try:
        yield
    except BaseException:
        model.load_state_dict(before)
        for module, mode in modes:
            module.training = mode
        raise


def _block_norms(model: nn.Module) -> list[ParamRef]:
    try:
        path, _ = find_blocks(model)
    except ValueError:  # a network without a chain of blocks has no norms of blocks
        return []
    return [
        ParamRef(f"{name}.weight", module, "weight")
        for name, module in model.named_modules()
        if name.startswith(f"{path}.")
        and isinstance(module, (nn.LayerNorm, nn.RMSNorm))
        and module.weight is not None
    ]


def _weight_penalty(penalty: str, lam: float, selection: ParamSelection) -> _Value:
    kinds = {"weight-log": WeightLogPenalty, "weight-l1": WeightL1}
    if penalty not in kinds:
        raise ValueError(f"penalty must be 'attention', {', '.join(map(repr, kinds))}: {penalty!r}")
    return kinds[penalty](selection, lam)


def _penalised(
    model: nn.Module, penalty: str, lam: float, blocks: Blocks, selection: ParamSelection
) -> contextlib.AbstractContextManager[_Value]:
    if penalty == "attention":
        return AttentionLogPenalty(model, lam, blocks)
    return contextlib.nullcontext(_weight_penalty(penalty, lam, selection))


def _published_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), MAX_LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


def _fine_tune(
    model: nn.Module,
    loaders: Loaders,
    penalty: _Value,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    max_lr: float,
    warmup_steps: int,
) -> tuple[tuple[float, ...], int]:
    """Train; the model ends with the weights of its best epoch. Returns losses and that epoch."""
    total = sum(1 for _ in loaders.train) * epochs
    if total == 0:
        raise ValueError("loaders.train is empty: expected at least one batch")
    rise = min(warmup_steps / total, 0.5)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr, total_steps=total, pct_start=rise
    )
    losses: list[float] = []
    lowest, best, kept = math.inf, 0, copy.deepcopy(model.state_dict())
    for epoch in range(epochs):
        losses.append(_epoch(model, loaders.train, penalty, optimizer, schedule))
        chosen = losses[-1]
        if loaders.validation is not None:
            chosen = evaluate(model, loaders.validation)["loss"]
        if chosen < lowest:
            lowest, best, kept = chosen, epoch, copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)
    return tuple(losses), best


def _epoch(
    model: nn.Module,
    batches: Batches,
    penalty: _Value,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> float:
    model.train()
    total, count = 0.0, 0
    for inputs, labels in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(_logits(model(inputs)), labels) + penalty.value()
        loss.backward()
        optimizer.step()
        schedule.step()
        total, count = total + float(loss.detach()) * len(labels), count + len(labels)
    if not math.isfinite(total):
        raise ValueError(f"the loss became {total / count}: is max_lr too high?")
    return total / count


def _logits(output: Any) -> Tensor:
    """Of a model that returns them alone, or within an output of transformers."""
    return output if isinstance(output, Tensor) else output.logits


def _build(model: nn.Module, optimizer: torch.optim.Optimizer, goal: Goal) -> PenalisedPruner:
    return PenalisedPruner(model, optimizer, goal.sparsity, include=goal.parameters)


def _unfit(model: nn.Module) -> str | None:
    try:
        AttentionLogPenalty(model).close()
    except ValueError as error:
        return str(error)
    return None


METHOD = TrainingMethod(
    slug="sparse-then-prune",
    build=_build,
    patterns=("unstructured",),
    unfit=_unfit,
)
