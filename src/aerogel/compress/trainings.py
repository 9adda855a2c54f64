"""What methods are given that do not simply step in the optimizer's place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aerogel import data, train
from aerogel.compress.console import Task
from aerogel.pruning import Goal
from aerogel.sparsity import MaskController, MaskSet, select_parameters

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


class FixedMasks:
    """Trains a network whose zeros stay where they are.

    Args:
        model: The network.
        optimizer: Its optimizer.
        goal: Names the pruned weights.
        masks: `True` = kept; what is not zero by default.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        goal: Goal,
        masks: MaskSet | None = None,
    ) -> None:
        selection = select_parameters(model, include=goal.parameters)
        if masks is None:
            masks = MaskSet({name: ref.parameter.detach() != 0 for name, ref in selection.items()})
        self.controller = MaskController(model, optimizer, selection, "hard", masks=masks)

    def step(self) -> bool:
        """One optimizer step, after which masked weights are zero again."""
        return self.controller.step()

    def finalize(self) -> MaskSet:
        """Let go of the model; returns the masks."""
        return self.controller.finalize()

    def state_dict(self) -> dict[str, Any]:
        """What has to survive a kill; the masks are part of it."""
        return self.controller.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume."""
        self.controller.load_state_dict(state)


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
        goal: Names the pruned weights.

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
        goal: Goal,
    ) -> None:
        if dataset.task != "classification":
            raise ValueError(f"data = {dataset.name!r} has no labels to compare networks by")
        self.folder = state / "method"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.fresh = fresh
        self._dense, self._config, self._state = dense, config, state
        self._task, self._goal = task, goal
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
        pruners: list[FixedMasks] = []

        def wrap(model: nn.Module, optimizer: torch.optim.Optimizer) -> FixedMasks:
            pruners.append(FixedMasks(model, optimizer, self._goal, masks))
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
