"""One call for every pruning method: a network and data in, a sparse network out."""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aerogel.arguments import check_count, check_number
from aerogel.pruning.method import (
    METHODS,
    Goal,
    Method,
    OneShotMethod,
    RewritingMethod,
    SearchMethod,
    TrainingMethod,
    method_slug,
)
from aerogel.pruning.selection import parameters_for
from aerogel.sparsity import parse_pattern
from aerogel.sparsity.blocks import run_batch, to_device
from aerogel.sparsity.masks import MaskSet
from aerogel.sparsity.rewind import reinitialize
from aerogel.sparsity.static import StaticSparseTrainer

LossFn = Callable[[nn.Module, Any], Tensor]
OptimizerFn = Callable[[nn.Module], torch.optim.Optimizer]
ProgressFn = Callable[[int, int, str], None]

# Fine-tuning keeps what a network knows; initial weights and whole retrainings have further to go.
LEARNING_RATES = {"near": 1e-4, "far": 1e-3}


class _Batches(Protocol):
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...


def prune(
    model: nn.Module,
    method: str,
    sparsity: float | None = None,
    *,
    data: Iterable[Any] = (),
    steps: int | None = None,
    loss: LossFn | None = None,
    optimizer: OptimizerFn | None = None,
    pattern: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    fresh: Callable[[int], nn.Module] | None = None,
    score: Callable[[nn.Module], float] | None = None,
    folder: str | Path | None = None,
    on_progress: ProgressFn | None = None,
    **options: Any,
) -> nn.Module:
    """A copy of a network, pruned by any method of `METHODS` in the way that its kind asks for.

        sparse = prune(model, "wanda", 0.5, data=batches)
        sparse = prune(model, "gradual-pruning", 0.9, data=loader, steps=5000)

    One-shot methods prune at once. Those that train do so in a plain loop, with their masks from
    the first step to the last; those that start from initial weights (`Method.from_scratch`) train
    the network as it is given. For a learning rate that falls, augmentation or a teacher step the
    method's own trainer in a loop of your own (`pruner_factory`), or write a recipe
    (`aerogel compress`).

    Args:
        model: trained, or with initial weights where the method trains from scratch; left as it is.
        method: slug, a key of `METHODS`.
        sparsity: fraction of zeros of the pruned weights, in [0, 1). None takes what the pattern
            fixes (0.5 for 2:4).
        data: batches, gone through as often as needed: tensors, (input, target) pairs, or mappings
            of keyword arguments. One-shot methods look at the inputs alone, and at all batches;
            those that do without (`OneShotMethod.needs_data`) need none.
        steps: optimizer steps of one training; None is one pass over `data`.
        loss: ``loss(model, batch)``, a scalar. None takes the ``"loss"`` that the model returns for
            a mapping; for pairs cross-entropy with integer targets, the mean square otherwise.
        optimizer: ``optimizer(model)``; None is AdamW with a learning rate of 1e-4, or 1e-3 for
            methods that train from scratch or several networks.
        pattern: what is zero together: "unstructured", "2:4", "4x1", ...; None takes the method's
            own, else "unstructured".
        include: globs of the weights to prune; none takes what model or method propose, else every
            linear and convolution weight that the pattern fits.
        exclude: globs of weights to leave dense.
        fresh: ``fresh(seed)``, the network with initial weights, for methods that train several;
            None draws those of `model` anew by its modules' `reset_parameters`.
        score: of a network on held-out data, higher is better, for methods that train several;
            None is minus the mean loss on `data`.
        folder: where methods that train several keep the networks they have finished, and go on
            with them; None keeps nothing.
        on_progress: called as (done, in all, name) after each layer or step.
        options: more attributes of a `Goal`: ``begin``, ``end``, ``initial_sparsity``, ``updates``,
            ``power``, ``seed``. Random choices depend on the seed alone.

    Returns:
        The sparse network, plain and in evaluation mode. A `RewritingMethod` returns another one.

    Raises:
        ValueError: an unknown method, a sparsity out of range or other than the pattern's, a
            pattern that the method does not prune by, a network it is not for, no weight to prune,
            no data for a method that needs some, or `steps` below 1.
        TypeError: a batch of no known shape, or an unknown option.
    """
    chosen = _chosen(method)
    by = _pattern(chosen, pattern)
    zeros = _sparsity(by, sparsity)
    batches = _counted(data)
    length = _steps(chosen, batches, steps)
    goal = Goal((), zeros, by, length, **options)
    silent = on_progress or (lambda done, total, name: None)
    loop = _Loop(model, chosen, batches, length, loss or task_loss, optimizer, fresh, score, silent)
    with torch.enable_grad(), torch.random.fork_rng(devices=_devices(model)):
        torch.manual_seed(goal.seed)
        network = copy.deepcopy(model)
        names = parameters_for(chosen, network, by, include, exclude)
        if isinstance(chosen, RewritingMethod):
            network = chosen.rewrite(network, names, zeros)
            names = chosen.masked(network)
        goal = replace(goal, parameters=names)
        if chosen.prepare is not None:
            example = _inputs(next(iter(batches)))
            chosen.prepare(network.eval(), copy.deepcopy(network), example, goal)
        return loop.run(network, goal, folder).eval()


@dataclass
class _Loop:
    """What each kind of method is given; `Trainings` for those that train several networks."""

    model: nn.Module
    method: Method
    batches: _Batches
    steps: int
    loss: LossFn
    make_optimizer: OptimizerFn | None
    make_fresh: Callable[[int], nn.Module] | None
    scored: Callable[[nn.Module], float] | None
    progress: ProgressFn
    folder: Path = Path()

    def run(self, network: nn.Module, goal: Goal, folder: str | Path | None) -> nn.Module:
        """The network as the method leaves it."""
        method = self.method
        if isinstance(method, OneShotMethod):
            method.prune(network.eval(), self.inputs(), goal, self.progress)
            return network
        if isinstance(method, SearchMethod):
            scratch = tempfile.TemporaryDirectory() if folder is None else nullcontext(str(folder))
            with scratch as name:
                self.folder = Path(name)
                return method.search(self, goal)
        assert isinstance(method, TrainingMethod)
        optimizer = self._optimizer(network)
        pruner = method.build(network, optimizer, goal)
        self._train(network, optimizer, pruner.step, method.slug)
        pruner.finalize()
        return network

    def fresh(self, seed: int) -> nn.Module:
        """The network with initial weights of this seed."""
        if self.make_fresh is not None:
            return self.make_fresh(seed)
        model = copy.deepcopy(self.model)
        try:
            reinitialize(model, generator=torch.Generator().manual_seed(seed))
        except ValueError as error:
            cause = str(error).partition(";")[0]
            raise ValueError(f"initial weights cannot be drawn, {cause}: pass fresh=") from error
        return model

    def trained(self) -> nn.Module:
        """A copy of the given network."""
        return copy.deepcopy(self.model)

    def train(self, model: nn.Module, masks: MaskSet | None, name: str, seed: int) -> float:
        """A whole training in place, with fixed masks; returns the network's score."""
        optimizer = self._optimizer(model)
        with torch.random.fork_rng(devices=_devices(model)):
            torch.manual_seed(seed)
            if masks is None:
                self._train(model, optimizer, optimizer.step, name)
            else:
                trainer = StaticSparseTrainer(model, optimizer, masks)
                self._train(model, optimizer, trainer.step, name)
                trainer.finalize()
        return self.score(model)

    def score(self, model: nn.Module) -> float:
        """How good a network is, higher is better."""
        model.eval()
        with torch.no_grad():
            if self.scored is not None:
                return self.scored(model)
            losses = [float(self.loss(model, batch)) for batch in self.batches]
        return -sum(losses) / len(losses)

    def inputs(self) -> Iterator[Any]:
        """What the model is called with, batch by batch."""
        return map(_inputs, self.batches)

    def _train(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        step: Callable[[], object],
        name: str,
    ) -> None:
        model.train()
        passes = itertools.chain.from_iterable(itertools.repeat(self.batches))
        for number, batch in enumerate(itertools.islice(passes, self.steps)):
            optimizer.zero_grad()
            self.loss(model, batch).backward()
            step()
            self.progress(number + 1, self.steps, name)
        model.eval()

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        if self.make_optimizer is not None:
            return self.make_optimizer(model)
        far = self.method.from_scratch or isinstance(self.method, SearchMethod)
        return torch.optim.AdamW(model.parameters(), LEARNING_RATES["far" if far else "near"])


def task_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that a batch itself tells of.

    Args:
        model: any module.
        batch: a mapping of keyword arguments for which the model returns a mapping with a
            ``"loss"``; or (input, target), where integer targets (N, ...) are classes of the
            model's output (N, classes, ...), and others what the output should be.

    Raises:
        TypeError: any other batch, or a model that returns no loss for a mapping.
    """
    output = run_batch(model, batch)
    if isinstance(batch, Mapping):
        try:
            return output["loss"]
        except (KeyError, TypeError, IndexError):
            raise TypeError(
                f"the model returned no 'loss' for a batch of {', '.join(batch)}: give it the "
                "labels, or pass loss="
            ) from None
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(
            f"to train on, a batch must be (input, target) or a mapping, got "
            f"{type(batch).__name__}; pass loss= for others"
        )
    target = to_device(batch[1], output.device)
    if target.is_floating_point():
        return F.mse_loss(output, target)
    return F.cross_entropy(output, target)


def _inputs(batch: Any) -> Any:
    """What the model is called with, as `call_with_inputs` takes it."""
    if isinstance(batch, Mapping):
        return batch
    return (batch[0] if isinstance(batch, (tuple, list)) else batch,)


def _chosen(method: str) -> Method:
    slug = method_slug(method)
    if slug not in METHODS:
        raise ValueError(f"method = {method!r} is unknown; known: {', '.join(sorted(METHODS))}")
    return METHODS[slug]


def _pattern(method: Method, pattern: str | None) -> str:
    chosen = pattern or method.pattern or "unstructured"
    if not method.prunes_by(chosen):
        kinds = ", ".join(method.patterns)
        raise ValueError(f"pattern = {chosen!r}: {method.slug} prunes by {kinds}")
    return chosen


def _sparsity(pattern: str, sparsity: float | None) -> float:
    fixed = parse_pattern(pattern).fixed_density
    if sparsity is None:
        if fixed is None:
            raise ValueError(f"sparsity is missing: pattern = {pattern!r} takes any in [0, 1)")
        return 1.0 - fixed
    check_number("sparsity", sparsity, "[0, 1)")
    if fixed is not None and abs(sparsity - (1.0 - fixed)) > 1e-9:
        raise ValueError(
            f"sparsity = {sparsity} contradicts pattern = {pattern!r}, which means {1 - fixed:g}"
        )
    return sparsity


def _counted(data: Iterable[Any]) -> _Batches:
    """`data` itself if its length is known, else its batches in a list."""
    if not isinstance(data, Iterable):
        raise TypeError(f"data must be an iterable of batches, got {data!r}")
    if isinstance(data, Sized):
        try:
            len(data)
        except TypeError:  # a DataLoader of a stream
            return list(data)
        return data
    return list(data)


def _steps(method: Method, batches: _Batches, steps: int | None) -> int:
    needs = not isinstance(method, OneShotMethod) or method.needs_data
    if needs and len(batches) == 0:
        what = "batches of inputs" if method.one_shot else "(input, target) batches to train on"
        raise ValueError(f"method = {method.slug!r} needs data: {what}")
    if steps is not None:
        check_count("steps", steps)
    return steps or max(1, len(batches))


def _devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
