"""Linear layers on one to a few vectors run as streamed products where those are fastest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fakes import build_with, clock
from torch import Tensor, nn

from aerogel import kernels, runtime
from aerogel.runtime.candidates import candidates_for
from aerogel.runtime.layer import Layer
from aerogel.runtime.strategies import CALLS, PLANS
from aerogel.runtime.tuner import Tuner
from aerogel.runtime.tuning_cache import TuningCache
from aerogel.sparsity import NM
from networks import sparsify_

needs_native = pytest.mark.skipif(
    not kernels.native_available(), reason="the native kernels are not built"
)


class Classifier(nn.Module):
    """Features pooled into one vector, and a head of two layers with a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Conv2d(3, 24, 1)
        self.one = nn.Conv2d(24, 24, 1)
        self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 10)
        sparsify_(self, 0.7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(self.features(x).mean((2, 3), keepdim=True)).flatten(1)
        return self.second(torch.relu(self.first(x) + x))


def linear(sparsity: float, *lead: int) -> Layer:
    torch.manual_seed(0)
    weight = torch.randn(32, 48) * (torch.rand(32, 48) >= sparsity)
    return Layer("fc", "linear", weight, None, "none", False, (*lead, 48), (*lead, 32))


@needs_native
@pytest.mark.parametrize("whole", [CALLS, PLANS])
@pytest.mark.parametrize("batch", [1, 3])
def test_compiled_heads_agree(whole: str, batch: int) -> None:
    model, x = Classifier().eval(), torch.randn(batch, 3, 5, 5)
    compiled = build_with(model, x, whole=whole, layer="gemv")
    assert compiled.explain().chosen == whole
    torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-4)
    kernels_used = [row.kernel for row in compiled.explain().rows]
    assert any("gemv" in kernel for kernel in kernels_used) == (whole == CALLS or batch == 1)


@pytest.mark.parametrize(
    ("lead", "offered", "planned"),
    [((1,), True, True), ((5,), True, False), ((1, 4), True, False), ((64,), False, False)],
)
def test_it_is_offered_for_a_few_vectors(
    lead: tuple[int, ...], offered: bool, planned: bool
) -> None:
    found = [c for c in candidates_for(linear(0.9, *lead), 1) if c.name == "gemv"]
    assert bool(found) == offered
    assert all(c.sparse and c.module and bool(c.emit) == planned for c in found)


def test_it_is_not_offered_for_dense_weights() -> None:
    assert "gemv" not in [c.name for c in candidates_for(linear(0.1, 1), 1)]


@needs_native
def test_the_tuner_may_choose_it() -> None:
    tuned = Tuner(1, TuningCache(None, {}), clock("gemv")).tune([linear(0.9, 2)])[0]
    assert tuned.best_direct.name == "gemv"


@needs_native
def test_zeros_that_are_n_of_m_take_their_own_stream_and_measurements() -> None:
    plain = linear(0.5, 1)
    weight = torch.randn(32, 48)
    kept = weight * NM(2, 4).select(weight.abs())
    layer = Layer("fc", "linear", kept, None, "relu", False, (1, 48), (1, 32))
    assert layer.signature() != plain.signature()
    found = {c.name: c for c in candidates_for(layer, 1)}
    assert "gemv 2:4" in found
    assert "gemv" in {c.name for c in candidates_for(plain, 1)}
    module = found["gemv 2:4"].module
    assert module is not None
    x = torch.randn(1, 48)
    torch.testing.assert_close(module()(x), (x @ kept.t()).relu(), atol=1e-5, rtol=1e-4)


@needs_native
@pytest.mark.parametrize("batch", [1, 3])
def test_a_network_pruned_to_2_of_4_compiles_and_survives_its_checkpoint(
    batch: int, tmp_path: Path
) -> None:
    model, x = Classifier().eval(), torch.randn(batch, 3, 5, 5)
    with torch.no_grad():
        for layer in (model.first, model.second):
            layer.weight.copy_(torch.randn_like(layer.weight))
            layer.weight.mul_(NM(2, 4).select(layer.weight.abs()))
    runtime.save(model, tmp_path / "model.safetensors")
    loaded = runtime.load(tmp_path / "model.safetensors", Classifier()).eval()
    compiled = build_with(loaded, x, whole=PLANS, layer="gemv")
    torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-4)
    if batch == 1:
        assert any("gemv 2:4" in row.kernel for row in compiled.explain().rows)
