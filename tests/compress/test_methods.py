"""Methods that bring a pattern of their own, and change the network before they train it."""

from __future__ import annotations

from pathlib import Path

import pytest

from aerogel import compress, runtime
from aerogel.compress import RecipeError, load_recipe
from aerogel.pruning import GroupKernelPruner
from aerogel.report import Results
from aerogel.sparsity import KernelGroup

OWN = {"method": "SparseByteNN", "sparsity": 0.5}


def test_a_method_brings_its_pattern_unless_one_is_chosen_with_it(tmp_path: Path) -> None:
    assert load_recipe("digits", OWN).pattern == "kernel-group:4"
    assert load_recipe("demo", {**OWN, "pattern": "kernel-group:8"}).pattern == "kernel-group:8"
    file = tmp_path / "recipe.yaml"
    file.write_text("base: digits\nmethod: sparsebytenn\nsparsity: 0.3\npattern: kernel-group:16\n")
    assert load_recipe(file, {"seed": 3}).pattern == "kernel-group:16"
    assert load_recipe(file, {"method": "gradual-pruning", "pattern": "4x1"}).pattern == "4x1"
    file.write_text(load_recipe("digits", OWN).to_yaml())
    assert load_recipe(file) == load_recipe("digits", OWN)


@pytest.mark.parametrize(
    ("method", "pattern", "zeros"),
    [("gpusq-vit", "2:4", 0.5), ("bdwp", "2:8", 0.75), ("progressive-gradient-flow", "1:4", 0.75)],
)
def test_an_n_m_pattern_that_a_method_brings_decides_the_sparsity(
    method: str, pattern: str, zeros: float, tmp_path: Path
) -> None:
    recipe = load_recipe("digits", {"method": method})
    assert (recipe.pattern, recipe.sparsity) == (pattern, zeros)
    suffixed = load_recipe("digits", {"method": method, "pattern": "2:4:pairs"})
    assert (suffixed.pattern, suffixed.sparsity) == ("2:4:pairs", 0.5)
    file = tmp_path / "recipe.yaml"
    file.write_text(f"base: digits\nmethod: {method}\nsparsity: 0.9\n")
    with pytest.raises(RecipeError, match=r"recipe.yaml.*sparsity = 0.9 contradicts pattern"):
        load_recipe(file)
    assert load_recipe(file, {"method": method}).sparsity == zeros  # chosen anew, above it


def test_a_pattern_that_the_method_cannot_prune_by_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"prunes by kernel-group .*not by pattern = '2:4'"):
        load_recipe("digits", {"method": "sparsebytenn", "pattern": "2:4"})


def test_stopped_runs_rearrange_as_before_and_end_alike(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(tiny_recipe, OWN)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    results = compress.run(recipe, whole)
    assert results is not None
    taken, step = [], GroupKernelPruner.step

    def interrupted(self: GroupKernelPruner, *args: object) -> object:
        taken.append(self.t)
        if len(taken) == 110:  # in the third of four epochs
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(GroupKernelPruner, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compress.run(recipe, stopped)
    monkeypatch.setattr(GroupKernelPruner, "step", step)
    compress.run(recipe, stopped)
    models = [(folder / "model.safetensors").read_bytes() for folder in (whole, stopped)]
    assert models[0] == models[1]
    _check(results, whole)


def _check(results: Results, folder: Path) -> None:
    """Groups of four, the last layer dense, an accuracy worth having."""
    state = runtime.load(folder / "model.safetensors")
    pruned = [name for name, weight in state.items() if int((weight == 0).sum()) > 20]
    assert pruned == ["features.0.weight", "features.2.weight"]
    for name in pruned:
        assert KernelGroup(4).is_satisfied(state[name] != 0)
        assert float((state[name] == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    assert (results.quality[0].sparse or 0) > 0.8
