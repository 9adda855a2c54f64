"""Sparse model soups: prune, retrain several copies, average them, and prune again.

Paper: Zimmer, Spiegel and Pokutta, "Sparse Model Soups: A Recipe for Improved Pruning via Model
Averaging", ICLR 2024, arXiv 2306.16788.

The idea: the mean of several fine-tuned networks is often better than each of them, at the cost of
one; but averaging networks whose zeros lie in different places destroys their sparsity. Copies that
are retrained from the *same* pruned network share its mask and stay in one valley of the loss, so
their mean is as sparse and good. This is done in every cycle of iterative magnitude pruning.

When to use it: where a trained network is pruned in cycles and machines are idle: the copies are
independent, so that several cost no more time than one on as many workers.

Costs and buys: ``cycles * copies`` retrainings. Inference costs one sparse network. In the paper
the soup gains about a point over the mean of its copies, more at high sparsity; small networks gain
little.

The claim this repository measures (``aerogel reproduce sparse-model-soups``): the soup's test loss
is below the mean of its copies' in every cycle, and its accuracy is no lower, on clean images and
under common corruptions. Two things of the paper do not show at that size: one network retrained as
long as all copies together beats the soup, and averaging networks that were pruned separately loses
1.2 points rather than the 5 that were expected.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aerogel.arguments import check_choice, check_count, check_number
from aerogel.nested import load_state, save_state
from aerogel.pruning.method import Goal, SearchMethod, Trainings, call_with_inputs
from aerogel.sparsity.average import (
    average_models,
    greedy_soup,
    recalibrate_batchnorm,
)
from aerogel.sparsity.blocks import ForwardFn, run_batch
from aerogel.sparsity.masks import MaskSet, build_masks
from aerogel.sparsity.retraining import RETRAINING_CURVES
from aerogel.sparsity.schedules import Geometric
from aerogel.sparsity.scores import compute_scores
from aerogel.sparsity.select import ParamSelection, select_parameters

Vary = Literal["seed", "weight_decay", "lr", "length"]
State = dict[str, Tensor]

_VARY: tuple[Vary, ...] = ("seed", "weight_decay", "lr", "length")


@dataclass(frozen=True)
class Variation:
    """What makes one copy's retraining differ from the others'.

    Attributes:
        cycle: from 1.
        copy: from 0.
        seed: of the order of its data and of dropout; differs for every copy of every cycle unless
            something else is varied, then it is the cycle's.
        vary: what differs.
        value: of what differs: weight decay, initial learning rate, or length (in epochs or steps,
            as the retraining function means it); None if it is the seed.
        schedule: name of the retraining learning rate, see `aerogel.sparsity.retraining_curve`.
    """

    cycle: int
    copy: int
    seed: int
    vary: Vary
    value: float | None
    schedule: str


RetrainFn = Callable[[nn.Module, MaskSet, Variation], nn.Module]
"""``retrain_fn(model, masks, variation)``: retrains with a fresh optimizer, masks held."""


@dataclass(frozen=True)
class CycleResult:
    """One cycle.

    Attributes:
        sparsity: fraction of zeros over the prunable weights.
        masks: ``True`` = kept, the same for every copy and the soup.
        ingredients: state dicts of the copies, batch norm re-estimated.
        soup: state dict of their average, batch norm re-estimated.
        members: which copies are in it, in the order they joined.
        ingredient_scores: of the copies, by ``score_fn``; empty without one.
        soup_score: likewise; None without one.
    """

    sparsity: float
    masks: MaskSet
    ingredients: tuple[State, ...] = field(repr=False)
    soup: State = field(repr=False)
    members: tuple[int, ...]
    ingredient_scores: tuple[float, ...]
    soup_score: float | None


@dataclass(frozen=True)
class SoupResult:
    """All cycles, and the network that the last one left."""

    cycles: list[CycleResult]
    model: nn.Module


class SparseModelSoups:
    """Iterative magnitude pruning whose every cycle ends with an average of retrained copies.

    Args:
        model: the trained dense network, or a function that makes it; copied, never changed.
        retrain_fn: retrains a copy, see `RetrainFn`. With ``workers > 1`` it must be a function of
            an importable module.
        sparsity: fraction of zeros at the end, in (0, 1).
        cycles: prunings, each of the same share of the weights that are left.
        copies: retrained in every cycle, at least 2.
        vary: what differs between them: ``"seed"``, ``"weight_decay"``, ``"lr"`` or ``"length"``.
        values: one for each copy, >= 0; None where the seed differs.
        soup: ``"uniform"`` mean of all copies, or ``"greedy"``: the best, joined by others as long
            as the validation score does not fall.
        scope: who competes when pruning: ``"global"``, or each ``"layer"``.
        schedule: name of the retraining learning rate, handed to ``retrain_fn``.
        batches: of training inputs, to re-estimate batch norm; may be None without batch norm.
        bn_fraction: share of ``batches`` to use, in (0, 1]; 0.2 of the training data in the paper.
        score_fn: validation score of a model, higher is better; "greedy" needs it.
        include: globs of the weights; all linear and convolution weights by default, the first and
            last layers among them.
        exclude: globs of weights that stay dense.
        workers: processes to retrain in, one thread each.
        run_dir: folder to keep every copy in; a run that was killed goes on with the first copy
            that is missing. None keeps nothing.
        seed: the first copy's; the others count up from it.
        forward: how to run one of ``batches``.

    Raises:
        TypeError: an argument that is no number, or ``values`` that are no sequence.
        ValueError: an argument out of range, too few ``values`` or some for ``vary="seed"``,
            "greedy" without ``score_fn``, batch norm without ``batches``, or a ``run_dir`` of
            another run.

    Reference:
        arXiv 2306.16788, section 3.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        retrain_fn: RetrainFn,
        *,
        sparsity: float,
        cycles: int = 3,
        copies: int = 3,
        vary: Vary = "seed",
        values: Sequence[float] | None = None,
        soup: Literal["uniform", "greedy"] = "uniform",
        scope: Literal["global", "layer"] = "global",
        schedule: str = "LLR",
        batches: Iterable[Any] | None = None,
        bn_fraction: float = 0.2,
        score_fn: Callable[[nn.Module], float] | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        workers: int = 1,
        run_dir: str | Path | None = None,
        seed: int = 0,
        forward: ForwardFn = run_batch,
    ) -> None:
        _check(sparsity, cycles, copies, vary, values, soup, scope, score_fn, workers)
        check_number("bn_fraction", bn_fraction, "(0, 1]")
        check_choice("schedule", schedule, RETRAINING_CURVES)
        check_count("seed", seed, 0)
        self._model = model if isinstance(model, nn.Module) else model()
        self._retrain_fn = retrain_fn
        self._ramp = Geometric(sparsity, cycles)
        self.copies, self.vary, self.values = copies, vary, values
        self.soup, self.scope, self.schedule = soup, scope, schedule
        self._batches = None if batches is None else list(batches)
        self._bn_fraction, self._score_fn, self._forward = bn_fraction, score_fn, forward
        self._include, self._exclude = tuple(include), tuple(exclude)
        self.workers, self.seed = workers, seed
        selection = self._select(self._model)
        if any(not ref.parameter.is_floating_point() for ref in selection.values()):
            raise ValueError("weights must be floating point to be averaged")
        if self._has_batch_norm() and not self._batches:
            raise ValueError("the model has batch norm: give batches to re-estimate it")
        self._folder = None if run_dir is None else Path(run_dir)
        self._start = "" if run_dir is None else _digest(self._model)
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)

    def run(self) -> SoupResult:
        """Prune, retrain and average, ``cycles`` times.

        Raises:
            ValueError: a copy came back with other zeros than its mask's.
        """
        model = copy.deepcopy(self._model)
        masks = MaskSet.ones(self._select(model))
        found = []
        for cycle in range(1, self._ramp.rounds + 1):
            masks = self._pruned(model, masks, cycle)
            masks.apply_(model)
            found.append(self._cycle(model, masks, cycle))
            model.load_state_dict(found[-1].soup)
        return SoupResult(found, model)

    def _select(self, model: nn.Module) -> ParamSelection:
        return select_parameters(model, include=self._include, exclude=self._exclude)

    def _pruned(self, model: nn.Module, masks: MaskSet, cycle: int) -> MaskSet:
        scores = compute_scores(self._select(model), "magnitude")
        density = 1.0 - self._ramp.value(cycle)
        return build_masks(scores, density, scope=self.scope, within=masks, rounding="round")

    def _cycle(self, model: nn.Module, masks: MaskSet, cycle: int) -> CycleResult:
        states = self._retrained(model, masks, cycle)
        scores = tuple(self._score(model, state) for state in states) if self._score_fn else ()
        if self.soup == "greedy":
            chosen = greedy_soup(
                states,
                lambda state: self._score(model, state),
                prepare=lambda state: self._settled(model, state),
                masks=masks,
            )
            return CycleResult(
                masks.sparsity(), masks, states, dict(chosen.state), chosen.members, scores,
                chosen.score,
            )  # fmt: skip
        soup = self._settled(model, average_models(states, masks=masks))
        members = tuple(range(self.copies))
        score = self._score(model, soup) if self._score_fn else None
        return CycleResult(masks.sparsity(), masks, states, soup, members, scores, score)

    # ------------------------------------------------------------------------------- the copies

    def _retrained(self, model: nn.Module, masks: MaskSet, cycle: int) -> tuple[State, ...]:
        variations = [self._variation(cycle, index) for index in range(self.copies)]
        states = [self._kept(variation) for variation in variations]
        missing = [v for v, state in zip(variations, states, strict=True) if state is None]
        for variation, state in self._train(model, masks, missing):
            states[variation.copy] = self._settled(model, state)
            self._keep(variation, states[variation.copy])
        return tuple(state for state in states if state is not None)

    def _train(
        self, model: nn.Module, masks: MaskSet, variations: Sequence[Variation]
    ) -> Iterable[tuple[Variation, State]]:
        if self.workers == 1 or len(variations) < 2:
            for variation in variations:
                yield variation, _retrain(self._retrain_fn, model, masks, variation)
            return
        workers = min(self.workers, len(variations))
        with ProcessPoolExecutor(workers, get_context("spawn"), _one_thread) as pool:
            futures: list[Future[State]] = [
                pool.submit(_retrain, self._retrain_fn, model, masks, v) for v in variations
            ]
            for variation, future in zip(variations, futures, strict=True):
                yield variation, future.result()

    def _variation(self, cycle: int, index: int) -> Variation:
        by_seed = self.vary == "seed"
        seed = self.seed + (cycle - 1) * self.copies + (index if by_seed else 0)
        value = None if by_seed or self.values is None else float(self.values[index])
        return Variation(cycle, index, seed, self.vary, value, self.schedule)

    def _settled(self, model: nn.Module, state: Mapping[str, Tensor]) -> State:
        """The state with batch norm re-estimated: statistics are never averaged."""
        if not self._has_batch_norm():
            return dict(state)
        assert self._batches is not None
        probe = copy.deepcopy(model)
        probe.load_state_dict(state)
        recalibrate_batchnorm(probe, self._batches, self._bn_fraction, forward=self._forward)
        return _detached(probe)

    def _score(self, model: nn.Module, state: Mapping[str, Tensor]) -> float:
        assert self._score_fn is not None
        probe = copy.deepcopy(model)
        probe.load_state_dict(state)
        return float(self._score_fn(probe.eval()))

    def _has_batch_norm(self) -> bool:
        kind = nn.modules.batchnorm._BatchNorm
        return any(isinstance(m, kind) and m.track_running_stats for m in self._model.modules())

    # ------------------------------------------------------------------------------ persistence

    def _file(self, variation: Variation) -> Path | None:
        if self._folder is None:
            return None
        return self._folder / f"cycle{variation.cycle}-copy{variation.copy}.safetensors"

    def _settings(self, variation: Variation) -> dict[str, Any]:
        return {
            **asdict(variation),
            "sparsity": self._ramp.s_f,
            "cycles": self._ramp.rounds,
            "copies": self.copies,
            "soup": self.soup,
            "scope": self.scope,
            "start": self._start,
        }

    def _kept(self, variation: Variation) -> State | None:
        path = self._file(variation)
        if path is None or not path.exists():
            return None
        kept = load_state(path)
        if kept["settings"] != self._settings(variation):
            raise ValueError(f"run_dir: {path} belongs to another run ({kept['settings']})")
        return dict(kept["state"])

    def _keep(self, variation: Variation, state: State | None) -> None:
        if (path := self._file(variation)) is not None:
            save_state({"settings": self._settings(variation), "state": state}, path)


def _retrain(
    retrain_fn: RetrainFn, model: nn.Module, masks: MaskSet, variation: Variation
) -> State:
    """One copy's retraining, in whatever process; processes share the tensors of `model`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(variation.seed)
        return _detached(retrain_fn(copy.deepcopy(model), masks.clone(), variation))


def _digest(model: nn.Module) -> str:
    """Of all parameters and buffers, so that another dense network's copies are not mixed in."""
    sha = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()


def _detached(model: nn.Module) -> State:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _one_thread() -> None:
    torch.set_num_threads(1)


def _check(
    sparsity: float,
    cycles: int,
    copies: int,
    vary: str,
    values: Sequence[float] | None,
    soup: str,
    scope: str,
    score_fn: object,
    workers: int,
) -> None:
    check_number("sparsity", sparsity, "(0, 1)")
    check_count("cycles", cycles)
    check_count("copies", copies, 2)
    check_count("workers", workers)
    check_choice("vary", vary, _VARY)
    _check_values(values, vary, copies)
    check_choice("soup", soup, ("uniform", "greedy"))
    if soup == "greedy" and score_fn is None:
        raise ValueError("soup='greedy' needs a validation score: give score_fn")
    check_choice("scope", scope, ("global", "layer"))


def _check_values(values: Sequence[float] | None, vary: str, copies: int) -> None:
    if vary == "seed":
        if values is not None:
            raise ValueError(
                f"values: vary='seed' takes none, its seeds count up from seed; got {values!r}"
            )
        return
    if values is not None and not isinstance(values, Sequence):
        raise TypeError(f"values must be a sequence of numbers, got {values!r}")
    given = 0 if values is None else len(values)
    if values is None or given < copies:
        raise ValueError(
            f"values: vary={vary!r} needs one for each of {copies} copies, got {given}"
        )
    for each in values:
        check_number("each of values", each, "[0, inf)")


def _search(trainings: Trainings, goal: Goal) -> nn.Module:
    def retrain(model: nn.Module, masks: MaskSet, variation: Variation) -> nn.Module:
        name = f"cycle{variation.cycle}-copy{variation.copy}"
        trainings.train(model, masks, name, variation.seed)
        return model

    soups = SparseModelSoups(
        trainings.trained(),
        retrain,
        sparsity=goal.sparsity,
        batches=trainings.inputs(),
        bn_fraction=1.0,  # these batches are a share of the training data already
        include=goal.parameters,
        run_dir=trainings.folder / "soups",
        seed=goal.seed,
        forward=call_with_inputs,
    )
    return soups.run().model


METHOD = SearchMethod(slug="sparse-model-soups", search=_search, patterns=("unstructured",))
