"""Methods of every kind run from a recipe: in training, at once, and by several trainings."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from aerogel import compress, runtime
from aerogel.cli import terminal
from aerogel.compress import RecipeError, load_recipe
from aerogel.compress.loading import load_model, rebuild
from aerogel.compress.recipe import ModelSpec
from aerogel.pruning import METHODS, Goal, SearchMethod
from aerogel.pruning.callbacks import pruner_factory
from aerogel.pruning.method import Trainings
from aerogel.sparsity import MaskSet, magnitude_
from aerogel.sparsity.cost import inference_flops


def _zeros(folder: Path) -> dict[str, float]:
    state = runtime.load(folder / "model.safetensors")
    return {n: float((w == 0).float().mean()) for n, w in state.items() if n.endswith("weight")}


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_one_shot_methods_need_no_training(method: str, tiny_recipe: Path, tmp_path: Path) -> None:
    flags = {"method": method, "sparsity": 0.5, "prune.epochs": 0, "dense.epochs": 1}
    results = compress.run(load_recipe(tiny_recipe, flags), tmp_path / "run")
    assert results is not None
    zeros = _zeros(tmp_path / "run")
    assert max(zeros.values()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "dsnot"])
def test_one_shot_methods_show_a_bar_that_moves_layer_by_layer_through_the_blocks(
    method: str, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves: list[tuple[str, float, float | None, str]] = []
    update = terminal._Bar.update

    def noted(bar: Any, done: float, total: float | None = None, note: str = "") -> None:
        update(bar, done, total, note)
        bar._progress.refresh()
        moves.append((bar._progress.tasks[0].fields["unit"], done, total, note))

    drawn = io.StringIO()
    monkeypatch.setattr(terminal._Bar, "update", noted)
    monkeypatch.setattr(
        terminal, "stderr", lambda: Console(file=drawn, force_terminal=True, width=160)
    )
    flags = {
        "model.name": "my_nets:blocks",
        "model.options": {},
        "method": method,
        "sparsity": 0.5,
        "dense.epochs": 0.2,
        "prune.epochs": 0,
    }
    recipe = load_recipe(tiny_recipe, flags)
    compress.run(recipe, tmp_path / "run", console=terminal.Terminal())
    layers = [move[1:] for move in moves if move[0] == "layers"]
    total = len(layers)
    assert [(done, of) for done, of, _ in layers] == [(i + 1, total) for i in range(total)]
    walked = [name.split(".")[1] for *_, name in layers if name.startswith("blocks.")]
    assert walked == ["0"] * 4 + ["1"] * 4
    assert "prune" in drawn.getvalue()
    assert f"{total}/{total}" in drawn.getvalue()
    assert "blocks.1.mlp.fc2.weight" in drawn.getvalue()


def test_after_one_shot_pruning_training_keeps_the_zeros_where_they_are(
    tiny_recipe: Path, tmp_path: Path
) -> None:
    flags = {"method": "magnitude", "sparsity": 0.8, "dense.epochs": 1}
    compress.run(load_recipe(tiny_recipe, {**flags, "prune.epochs": 0}), tmp_path / "once")
    compress.run(load_recipe(tiny_recipe, {**flags, "prune.epochs": 1}), tmp_path / "tuned")
    once, tuned = (
        runtime.load(tmp_path / name / "model.safetensors") for name in ("once", "tuned")
    )
    for name in (n for n, w in once.items() if bool((w == 0).float().mean() > 0.5)):
        assert torch.equal(once[name] == 0, tuned[name] == 0)
        assert not torch.equal(once[name], tuned[name])


@pytest.mark.parametrize("method", ["rigl", "set", "iss-p"])
def test_methods_that_train_sparse_start_from_initial_weights(
    method: str, tiny_recipe: Path, tmp_path: Path
) -> None:
    flags = {"method": method, "sparsity": 0.8, "dense.epochs": 1, "prune.epochs": 8}
    results = compress.run(load_recipe(tiny_recipe, flags), tmp_path / "run")
    assert results is not None
    assert 0.5 < max(_zeros(tmp_path / "run").values()) < 0.95
    assert (results.quality[0].sparse or 0) > 0.5


def test_methods_that_train_several_networks_go_on_after_a_kill(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    stop_before: list[str] = ["second"]

    def search(trainings: Trainings, goal: Goal) -> nn.Module:
        best, score = trainings.trained(), -1.0
        for seed, name in enumerate(("first", "second")):
            if name in stop_before:
                raise KeyboardInterrupt
            model = trainings.fresh(seed)
            masks: MaskSet = magnitude_(model, goal.sparsity, include=goal.parameters)
            found = trainings.train(model, masks, name, seed)
            trained.append(name)
            if found > score:
                best, score = model, found
        return best

    monkeypatch.setitem(METHODS, "best-of-two", SearchMethod(slug="best-of-two", search=search))
    flags = {"method": "best-of-two", "sparsity": 0.6, "dense.epochs": 1, "prune.epochs": 1}
    recipe = load_recipe(tiny_recipe, flags)
    with pytest.raises(KeyboardInterrupt):
        compress.run(recipe, tmp_path / "run")
    stop_before.clear()
    compress.run(recipe, tmp_path / "run")
    assert trained == ["first", "first", "second"]  # the repeated one was read from its state
    assert max(_zeros(tmp_path / "run").values()) == pytest.approx(0.6, abs=0.02)


def test_sparse_model_soups_run_from_a_recipe(tiny_recipe: Path, tmp_path: Path) -> None:
    flags = {"method": "sparse-model-soups", "sparsity": 0.8, "prune.epochs": 1}
    results = compress.run(load_recipe(tiny_recipe, flags), tmp_path / "run")
    assert results is not None
    state = runtime.load(tmp_path / "run" / "model.safetensors")
    weights = [state[f"features.{i}.weight"] for i in (0, 2)]  # the last layer stays dense
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert zeros == pytest.approx(0.8, abs=0.01)
    assert (results.quality[0].sparse or 0) > 0.7


def test_sparse_ift_trains_a_larger_network_that_costs_as_much(
    tiny_recipe: Path, tmp_path: Path
) -> None:
    flags = {"method": "sparse-ift", "sparsity": 0.75, "dense.epochs": 1, "prune.epochs": 4}
    results = compress.run(load_recipe(tiny_recipe, flags), tmp_path / "run")
    assert results is not None
    assert results.size.sparsity == pytest.approx(0.75, abs=0.01)
    assert (results.quality[0].sparse or 0) > 0.9
    pair, example = compress.load_run(tmp_path / "run")
    (x,) = example(2)
    before = inference_flops(pair.dense, None, (x,)).dense
    factors = {name: w for name, w in pair.sparse.named_parameters() if w.dim() == 2}
    masks = MaskSet({name: weight.detach() != 0 for name, weight in factors.items()})
    after = inference_flops(pair.sparse, masks, (x,))
    assert after.dense > 2 * before
    assert after.sparse == pytest.approx(before, rel=0.06)  # ranks are rounded up
    again = load_model(ModelSpec(name=str(tmp_path / "run" / "model.safetensors")), None).eval()
    assert torch.equal(again(x), pair.sparse(x))


def test_a_priori_compression_trains_one_way_filters_of_the_share_asked_for(
    tiny_recipe: Path, tmp_path: Path
) -> None:
    flags = {
        "model": {"name": "my_nets:two_convs"},
        "method": "a-priori-compression",
        "sparsity": 0.5,
    }
    results = compress.run(load_recipe(tiny_recipe, flags), tmp_path / "run")
    assert results is not None
    assert results.size.prunable == 0
    assert "50 % fewer weights" in results.title
    assert (results.quality[0].sparse or 0) > 0.9
    state = runtime.load(tmp_path / "run" / "model.safetensors")
    filters = [weight.numel() for name, weight in state.items() if name.startswith("2.factors")]
    assert sum(filters) == 8 * (8 * 3 + 16 * 3)  # of 16 * 8 * 9 numbers, eight channels fit half
    pair, _ = compress.load_run(tmp_path / "run")
    assert pair.sparse_source is not None
    elsewhere = rebuild(**pair.sparse_source.arguments)
    assert list(elsewhere.state_dict()) == list(pair.sparse.state_dict())


def test_a_network_that_a_method_cannot_rewrite_is_refused(
    tiny_recipe: Path, tmp_path: Path
) -> None:
    flags = {"method": "a-priori-compression", "sparsity": 0.5}
    with pytest.raises(ValueError, match="cannot prune this network: it has no convolution"):
        compress.run(load_recipe(tiny_recipe, flags), tmp_path / "run")


@pytest.mark.parametrize("method", ["sparse-ift", "a-priori-compression"])
def test_a_network_must_be_rewritten_before_its_trainer_is_built(method: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"train what METHOD\.rewrite gives"):
        pruner_factory(method, 0.5, 10)(model, optimizer)


def test_only_methods_without_training_may_skip_it(tiny_recipe: Path) -> None:
    with pytest.raises(RecipeError, match="method = 'rigl' needs training steps"):
        load_recipe(tiny_recipe, {"method": "rigl", "prune.epochs": 0})


def test_a_method_says_why_a_network_is_not_for_it(tiny_recipe: Path, tmp_path: Path) -> None:
    flags = {"method": "fast-sparse-convnets", "dense.epochs": 1}
    with pytest.raises(ValueError, match="cannot prune this network: it has no 1x1"):
        compress.run(load_recipe(tiny_recipe, flags), tmp_path / "run")
