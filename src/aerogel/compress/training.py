"""The two training phases: the dense network, and the same network while it becomes sparse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aerogel import data, train
from aerogel.compress.console import Console, Task
from aerogel.compress.loading import example_inputs
from aerogel.compress.recipe import Distillation, Recipe, Training
from aerogel.compress.trainings import RecipeTrainings, calibration_batches, masks_of_zeros
from aerogel.pruning import (
    METHODS,
    Goal,
    Method,
    OneShotMethod,
    RewritingMethod,
    SearchMethod,
    TrainingMethod,
)
from aerogel.pruning.selection import pruned_parameters
from aerogel.sparsity import StaticSparseTrainer

CURVES = ("loss", "lr", "sparsity")


def train_dense(
    model: nn.Module, dataset: data.Dataset, recipe: Recipe, state: Path, task: Task
) -> list[dict[str, Any]]:
    """Train the dense network in place.

    Args:
        model: The network.
        dataset: Its data.
        recipe: `recipe.dense` says how.
        state: Folder that a killed run goes on from.
        task: Progress.

    Returns:
        Training curves, as `report.Curve` reads them.

    Raises:
        ValueError: The data has no targets to train on.
    """
    if dataset.task != "classification":
        raise ValueError(
            f"data = {dataset.name!r} has no labels, so a dense network cannot be trained on it; "
            "set dense.epochs to 0 and start from a trained network (model.weights)"
        )
    config = _config(recipe, recipe.dense)
    history = train.fit(
        model, dataset, config, resume_dir=state, on_progress=lambda p: _show(task, p)
    )
    return _curves(history, "dense")


def train_sparse(
    model: nn.Module,
    dense: nn.Module,
    dataset: data.Dataset,
    recipe: Recipe,
    state: Path,
    console: Console,
    fresh: Callable[[int], nn.Module],
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Make the network sparse, with its zeros baked in at the end.

    A method of training does so in place while it trains on. A one-shot method prunes first; if the
    recipe has training steps, the network then trains with its masks fixed.

    Args:
        model: The network, with dense weights.
        dense: The same network again, to learn from where the recipe or the data wants that.
        dataset: Its data.
        recipe: Method, pattern, schedule and `recipe.prune`.
        state: Folder that a killed run goes on from.
        console: Shows progress: layer by layer of a one-shot method, step by step of training.
        fresh: Makes the network with initial weights of a seed.

    Returns:
        The sparse network, and training curves as `report.Curve` reads them.

    Raises:
        ValueError: The method is not for this data.
    """
    method = METHODS[recipe.method]
    config = None
    if not recipe.prune.skipped:
        config = _config(recipe, recipe.prune, recipe.distillation)
    if method.from_scratch:
        model = fresh(recipe.seed)
    goal = _goal(model, recipe, 1 if config is None else config.total_steps(len(dataset.train)))
    # All of this is deterministic, so a run that was stopped finds the network as it was.
    if method.prepare is not None:
        method.prepare(model, dense, example_inputs(dataset, 1), goal)
    if isinstance(method, OneShotMethod):
        batches = calibration_batches(dataset)
        with console.task("prune", "layers") as task:
            method.prune(model, batches, goal, task.update)
    if config is None:
        return model, []
    with console.task("prune", "steps") as task:
        if isinstance(method, SearchMethod):
            trainings = RecipeTrainings(dense, fresh, dataset, config, state, task)
            return method.search(trainings, goal), []
        teacher = None
        if recipe.distillation is not None or dataset.task != "classification":
            teacher = dense.requires_grad_(False)
        return model, _fit_sparse(model, teacher, dataset, config, goal, method, state, task)


def _fit_sparse(
    model: nn.Module,
    teacher: nn.Module | None,
    dataset: data.Dataset,
    config: train.TrainConfig,
    goal: Goal,
    method: Method,
    state: Path,
    task: Task,
) -> list[dict[str, Any]]:
    pruners: list[Any] = []

    def wrap(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        if isinstance(method, TrainingMethod):
            pruners.append(method.build(model, optimizer, goal))
        else:
            masks = masks_of_zeros(model, goal.parameters)
            pruners.append(StaticSparseTrainer(model, optimizer, masks))
        return pruners[-1]

    history = train.fit(
        model,
        dataset,
        config,
        optimizer_wrapper=wrap,
        teacher=teacher,
        resume_dir=state,
        on_progress=lambda p: _show(task, p),
    )
    pruners[-1].finalize()
    return _curves(history, "prune")


def chosen_by(
    recipe: Recipe, model: nn.Module
) -> tuple[str, Sequence[str], Sequence[str], Sequence[str]]:
    """What decides which weights are pruned, as `pruned_parameters` takes it after the model.

    Raises:
        ValueError: The method is not for this network.
    """
    method = METHODS[recipe.method]
    if (reason := method.unfit(model)) is not None:
        raise ValueError(f"method = {recipe.method!r} cannot prune this network: {reason}")
    return recipe.pattern, recipe.include, recipe.exclude, method.proposes(model)


def sparse_parameters(recipe: Recipe, model: nn.Module) -> tuple[str, ...]:
    """Names of the weights with zeros of the network that a recipe trains."""
    method = METHODS[recipe.method]
    if isinstance(method, RewritingMethod):
        return method.masked(model)
    return pruned_parameters(model, *chosen_by(recipe, model))


def _goal(model: nn.Module, recipe: Recipe, steps: int) -> Goal:
    names = sparse_parameters(recipe, model)
    ramp = recipe.schedule.model_dump()
    return Goal(names, recipe.sparsity, recipe.pattern, steps, **ramp, seed=recipe.seed)


def _config(
    recipe: Recipe, phase: Training, distillation: Distillation | None = None
) -> train.TrainConfig:
    values = phase.model_dump()
    if phase.steps is not None:
        values["epochs"] = 1.0  # ignored where steps are given
    if distillation is not None:
        values["distill_alpha"] = distillation.weight
        values["temperature"] = distillation.temperature
        values["distill_features"] = tuple(distillation.features)
        values["feature_weight"] = distillation.feature_weight
    return train.TrainConfig(**values, seed=recipe.seed)


def _show(task: Task, progress: train.Progress) -> None:
    zeros = f", {100 * progress.sparsity:.1f} % zeros" if progress.sparsity else ""
    task.update(progress.step, progress.total, f"loss {progress.loss:.3f}{zeros}")


def _curves(history: train.History, stage: str) -> list[dict[str, Any]]:
    curves = [_curve(name, stage, history.steps) for name in CURVES]
    known = {"step", "epoch", "sparsity"}
    metrics = [name for name in (history.epochs[0] if history.epochs else {}) if name not in known]
    return curves + [_curve(f"test {name}", stage, history.epochs) for name in metrics]


def _curve(name: str, stage: str, rows: list[dict[str, float]]) -> dict[str, Any]:
    key = name.removeprefix("test ")
    return {
        "name": name,
        "stage": stage,
        "steps": [int(row["step"]) for row in rows],
        "values": [row[key] for row in rows],
    }
