"""The compiled model gives the original's outputs, whichever way it runs."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import build_with
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import aerogel
from aerogel import kernels
from aerogel.runtime.strategies import CALLS, EAGER, MIXED, PLANS, TORCH
from networks import DataDependent, Residual, mobile_network, perceptron, settle_norms_, sparsify_

STRATEGIES = [TORCH, CALLS, PLANS]


def expect(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return model(*args, **kwargs)


def assert_agree(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("strategy", [*STRATEGIES, MIXED])
@pytest.mark.parametrize("block", [1, 4])
def test_mobile_network_agrees(strategy: str, block: int) -> None:
    model, x = mobile_network(0.9, block), torch.randn(2, 3, 20, 20)
    compiled = build_with(model, x, strategy=strategy, whole="plan")
    assert compiled.explain().chosen == strategy
    assert_agree(compiled(x), expect(model, x))


@pytest.mark.parametrize("act", [nn.Hardswish, nn.SiLU, nn.ReLU])
def test_native_plan_agrees_with_every_activation(act: type[nn.Module]) -> None:
    model, x = mobile_network(0.8, 2, act), torch.randn(1, 3, 20, 20)
    compiled = build_with(model, x, strategy=PLANS)
    assert_agree(compiled(x), expect(model, x))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_perceptron_agrees(strategy: str) -> None:
    model, x = perceptron(), torch.randn(7, 24)
    compiled = build_with(model, x, strategy=strategy, whole="plan")
    assert_agree(compiled(x), expect(model, x))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_residual_network_agrees(strategy: str) -> None:
    model, x = sparsify_(settle_norms_(Residual()), 0.8).eval(), torch.randn(3, 8, 6, 6)
    compiled = build_with(model, x, strategy=strategy, whole="plan")
    assert_agree(compiled(x), expect(model, x))


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=50,
        max_position_embeddings=32,
    )
    return sparsify_(transformers.BertModel(config), 0.7, 4).eval()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bert_agrees_and_keeps_its_output_class(strategy: str) -> None:
    model, ids = bert(), torch.randint(0, 50, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    compiled = build_with(
        model, input_ids=ids, attention_mask=mask, strategy=strategy, whole="plan"
    )
    ours = compiled(attention_mask=mask, input_ids=ids)
    theirs = expect(model, input_ids=ids, attention_mask=mask)
    assert type(ours) is type(theirs)
    assert_agree(ours.last_hidden_state, theirs.last_hidden_state)
    assert_agree(ours["pooler_output"], theirs["pooler_output"])
    assert compiled.config is compiled.original.config


def test_an_encoder_runs_as_one_plan() -> None:
    ids = torch.randint(0, 50, (2, 9))
    compiled = build_with(bert(), input_ids=ids, strategy=PLANS)
    assert {row.kernel.rpartition("(")[2] for row in compiled.explain().rows} == {"plan 0)"}


@pytest.mark.parametrize("strategy", [CALLS, PLANS])
def test_vit_agrees(strategy: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
    )
    model = sparsify_(transformers.ViTModel(config), 0.7).eval()
    x = torch.randn(2, 3, 16, 16)
    compiled = build_with(model, pixel_values=x, strategy=strategy)
    theirs = expect(model, pixel_values=x)
    assert_agree(compiled(pixel_values=x).last_hidden_state, theirs.last_hidden_state)


def test_compile_measures_and_agrees_on_the_real_clock() -> None:
    model, x = perceptron(), torch.randn(16, 24)
    seen = []
    compiled = aerogel.compile(model, x, threads=1, on_progress=lambda *step: seen.append(step))
    assert_agree(compiled(x), expect(model, x))
    explanation = compiled.explain()
    assert explanation.seconds <= explanation.strategies[EAGER]
    assert seen[0] == ("0", 0, 3)
    if kernels.native_available() and not kernels.reference_mode():
        assert all(row.bound in ("FMA", "loads", "bytes") for row in explanation.rows)
        assert all(row.reach > 0 for row in explanation.rows)
        assert "FMA" in str(explanation) or "bytes" in str(explanation)


def test_reference_mode_compiles_and_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AEROGEL_KERNELS", "reference")
    model, x = mobile_network(), torch.randn(2, 3, 20, 20)
    for strategy in (CALLS, PLANS):
        compiled = build_with(model, x, strategy=strategy)
        assert_agree(compiled(x), expect(model, x))
        assert {row.bound for row in compiled.explain().rows} == {None}


def test_masks_are_baked_and_the_model_is_left_alone() -> None:
    class Half(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * (torch.arange(weight.shape[1]) % 2)

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    parametrize.register_parametrization(model[0], "weight", Half())
    prune.random_unstructured(model[1], "weight", 0.5)
    model.train()
    x = torch.randn(3, 8)
    compiled = build_with(model, x)
    assert_agree(compiled(x), expect(model, x))
    assert [row.sparsity for row in compiled.explain().rows] == [0.5, 0.5]
    assert parametrize.is_parametrized(model[0])
    assert prune.is_pruned(model[1])
    assert model.training
    assert model[1].weight_orig.requires_grad
    assert set(compiled.state_dict()) == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_nested_inputs_and_outputs_keep_their_structure() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, pair: tuple[Tensor, dict[str, Tensor]], scale: float = 1.0) -> Any:
            y = self.layer(pair[0]) * scale
            return {"sum": y + pair[1]["b"], "parts": [y, (pair[1]["b"], None)]}

    model = Nested().eval()
    pair = (torch.randn(2, 4), {"b": torch.randn(2, 4)})
    compiled = build_with(model, pair, whole=TORCH)
    ours, theirs = compiled(pair), expect(model, pair)
    assert list(ours) == ["sum", "parts"]
    assert ours["parts"][1][1] is None
    assert_agree(ours["sum"], theirs["sum"])
    assert_agree(compiled(pair, scale=2.0)["sum"], expect(model, pair, scale=2.0)["sum"])


def test_layers_without_weights_are_fine() -> None:
    model, x = nn.Sequential(nn.ReLU(), nn.Flatten()), torch.randn(2, 3, 4)
    compiled = build_with(model, x, whole=TORCH)
    assert torch.equal(compiled(x), expect(model, x))
    assert compiled.explain().rows == []


def test_nan_weights_are_kept_and_propagate() -> None:
    model, x = perceptron(), torch.randn(3, 24)
    with torch.no_grad():
        model[6].weight[2, 7] = float("nan")
    with pytest.warns(UserWarning, match=r"'6\.weight' holds NaN"):
        compiled = aerogel.compile(model, x, threads=1, cache=False)
    for each in (compiled, build_with(model, x, strategy=CALLS)):
        assert torch.equal(each(x).isnan(), expect(model, x).isnan())


def test_double_precision_models_run_in_torch() -> None:
    model, x = perceptron().double(), torch.randn(3, 24, dtype=torch.float64)
    compiled = build_with(model, x, whole=TORCH)
    assert_agree(compiled(x), expect(model, x))
    assert compiled.explain().rows == []


def test_control_flow_on_data_falls_back_to_single_modules() -> None:
    model, x = DataDependent().eval(), torch.randn(5, 16)
    with pytest.warns(UserWarning, match="torch.export fails in module 'gate'.*DataDependent"):
        compiled = build_with(model, x, whole="module calls")
    explanation = compiled.explain()
    assert explanation.chosen == "module calls"
    assert [row.layer for row in explanation.rows] == ["first", "last"]
    assert all("spmm" in row.kernel for row in explanation.rows)
    for sign in (1, -1):
        assert_agree(compiled(sign * x), expect(model, sign * x))


def test_a_model_that_writes_its_buffers_falls_back() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.layer(x)

    model = Counter().eval()
    with pytest.warns(UserWarning, match="'calls'"):
        compiled = build_with(model, torch.randn(2, 4), whole=EAGER)
    assert compiled.explain().chosen == EAGER


def test_random_models_are_left_as_they_are() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    compiled = build_with(Noisy(), torch.randn(4), whole=TORCH)
    assert compiled.explain().chosen == EAGER
    assert any("outputs differ" in note for note in compiled.explain().notes)


def test_explanation_is_a_table_and_json() -> None:
    model, x = mobile_network(0.9, 4), torch.randn(1, 3, 20, 20)
    explanation = build_with(model, x).explain()
    text, document = str(explanation), json.loads(json.dumps(explanation.to_dict()))
    assert "4x1" in text
    assert "runs as: native plans" in text
    assert document["rows"][1]["shape"] == [48, 16, 1, 1]
    assert document["rows"][1]["pattern"] == "4x1"
    assert 0.85 < document["rows"][1]["sparsity"] < 0.95
    assert document["strategies"][EAGER] == 2.0


def test_measurements_are_kept_unless_told_not_to(own_cache: Path) -> None:
    model, x = perceptron(), torch.randn(4, 24)
    aerogel.compile(model, x, threads=1, cache=False)
    assert not own_cache.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        aerogel.compile(model, x, threads=1)
    assert (own_cache / "tuning.json").exists()
