"""What methods are given that do not simply step in the optimizer's place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aerogel import data, train
from aerogel.compress.console import Task
from aerogel.sparsity import MaskSet, StaticSparseTrainer, select_parameters

# As many samples as Wanda and SparseGPT take sequences.
CALIBRATION_SAMPLES = 128
CALIBRATION_BATCH = 32
# Share of the training data on which methods compare the networks that they train.
HELD_OUT = 0.1


def calibration_batches(dataset: data.Dataset) -> list[tuple[Any, ...]]:
    """Inputs of the first training samples of a fixed shuffle, in batches."""
    order = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(0))
    parts = order[:CALIBRATION_SAMPLES].split(CALIBRATION_BATCH)
    return [tuple(dataset.train.batch(part).inputs) for part in parts]


def masks_of_zeros(model: nn.Module, parameters: Sequence[str]) -> MaskSet:
    """Masks that keep what is not zero in the weights of these names."""
    selection = select_parameters(model, include=tuple(parameters))
    return MaskSet({name: ref.parameter.detach() != 0 for name, ref in selection.items()})


class RecipeTrainings:
    """`aerogel.pruning.method.Trainings` by a recipe's pruning phase.

    A tenth of the training data is held out, so that the test data decides nothing.

    Args:
        dense: The trained dense network.
        fresh: Makes the network with initial weights of a seed.
        dataset: Labelled data.
        config: One whole training.
        state: Folder for what has to survive a kill.
        task: Progress.

    Raises:
        ValueError: The data has no labels.
    """

    def __init__(
        self,
        dense: nn.Module,
        fresh: Callable[[int], nn.Module],
        dataset: data.Dataset,
        config: train.TrainConfig,
        state: Path,
        task: Task,
    ) -> None:
        if dataset.task != "classification":
            raise ValueError(f"data = {dataset.name!r} has no labels to compare networks by")
        self.folder = state / "method"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.fresh = fresh
        self._dense, self._config, self._state = dense, config, state
        self._task = task
        order = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(0))
        held = max(1, round(HELD_OUT * len(order)))
        self._data = replace(
            dataset,
            train=dataset.train.select(order[held:].sort().values),
            test=dataset.train.select(order[:held].sort().values),
        )

    def trained(self) -> nn.Module:
        """A copy of the trained dense network."""
        return copy.deepcopy(self._dense)

    def train(self, model: nn.Module, masks: MaskSet | None, name: str, seed: int) -> float:
        """Train `model` in place with fixed masks; returns its accuracy on the held-out data."""
        config = replace(self._config, seed=seed)
        pruners: list[StaticSparseTrainer] = []

        def wrap(model: nn.Module, optimizer: torch.optim.Optimizer) -> StaticSparseTrainer:
            assert masks is not None
            pruners.append(StaticSparseTrainer(model, optimizer, masks))
            return pruners[-1]

        train.fit(
            model,
            self._data,
            config,
            optimizer_wrapper=None if masks is None else wrap,
            resume_dir=self._state / "trainings" / name,
            on_progress=lambda p: self._task.update(p.step, p.total, f"{name}, loss {p.loss:.3f}"),
        )
        for pruner in pruners:
            pruner.finalize()
        return self.score(model)

    def score(self, model: nn.Module) -> float:
        """Accuracy on the held-out data."""
        return train.evaluate(model, self._data)["accuracy"]

    def inputs(self) -> Iterator[Any]:
        """Batches of inputs, for statistics."""
        yield from calibration_batches(self._data)
