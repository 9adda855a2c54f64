"""The shared small language model: trained once, never half kept, never kept if it cannot copy."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open

from aerogel import models
from aerogel.data.source_text import SourceText

pytest.importorskip("transformers")
RECIPE = Path(__file__).parents[2] / "experiments" / "tiny_lm.py"
# Of 0-255 in turn every byte foretells the next.
BYTES = (torch.arange(30_000) % 256).to(torch.uint8)


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """`experiments/tiny_lm.py` with three steps, a text without words and a cache of its own."""
    spec = importlib.util.spec_from_file_location("tiny_lm_recipe", RECIPE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(importlib.sys.modules, "tiny_lm_recipe", module)
    spec.loader.exec_module(module)
    monkeypatch.setenv("AEROGEL_CACHE", str(tmp_path))
    phase = module.Phase(1, 96, 1e-3, texts=1, symbols=1, period=(8, 20))
    passages = module.Phase(2, 180, 1e-3, texts=1, passages=1)
    monkeypatch.setattr(module, "PHASES", (phase, passages))
    text = SourceText(BYTES[:20_000], BYTES[20_000:], "digest")
    monkeypatch.setattr(module, "load_source_text", lambda: text)
    monkeypatch.setattr(module, "SCORED", 2)
    return module


def test_the_trained_model_is_kept_with_its_recipe(recipe, monkeypatch):
    monkeypatch.setattr(recipe, "REQUIRED_GAIN", -9.0)
    steps: list[int] = []
    first = recipe.load(3, on_step=lambda done, *_: steps.append(done))
    again = recipe.load(3, on_step=lambda *_: pytest.fail("trained again"))
    assert steps == [1, 2, 3]
    assert not first.training
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    folder = recipe.folder_of(3, recipe.load_source_text())
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    with safe_open(str(folder / "model.safetensors"), framework="pt") as file:
        header = file.metadata()
    assert (header["seed"], header["recipe"]) == ("3", recipe._recipe())
    (folder / "model.safetensors").write_bytes(b"damaged")
    recipe.load(3, on_step=lambda done, *_: steps.append(done))
    assert steps == [1, 2, 3] * 2


def test_training_follows_its_seed(recipe):
    one, same, other = (recipe.train(seed, BYTES, recipe.PHASES) for seed in (0, 0, 1))
    weights = [model.state_dict()["model.norm.weight"] for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_model_that_cannot_copy_is_refused(recipe):
    with pytest.raises(RuntimeError, match=r"expected 0\.3 nats less"):
        recipe.load(0)
    assert not recipe.folder_of(0, recipe.load_source_text()).exists()


def test_other_recipes_have_other_folders(recipe, monkeypatch):
    text = recipe.load_source_text()
    before = recipe.folder_of(0, text)
    monkeypatch.setattr(recipe, "PHASES", recipe.PHASES[:1])
    assert len({before, recipe.folder_of(0, text), recipe.folder_of(1, text)}) == 3


def test_the_model_has_the_size_it_claims():
    model = models.create_model("tiny_lm")
    claimed = models.model_config("tiny_lm")["params"]
    assert sum(p.numel() for p in model.parameters()) == claimed
    assert models.create_model("tiny_lm", num_hidden_layers=1).config.num_hidden_layers == 1
