"""Operators inside native plans agree with torch, and the rest stays outside."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from fakes import build_with
from torch import Tensor, nn

from aerogel import kernels
from aerogel.runtime.candidates import candidates_for
from aerogel.runtime.layer import Layer, token_tile
from aerogel.runtime.native import LayerProbe
from aerogel.runtime.strategies import PLANS
from networks import sparsify_


class Net(nn.Module):
    """Two pointwise convolutions and whatever the test does with them."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 1)
        self.deep, self.head = nn.Conv2d(16, 16, 3, 2, 1, groups=4), nn.Linear(16, 5)
        self.tokens = nn.Linear(8, 16)
        sparsify_(self, 0.6)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def gate(m: Any, x: Tensor) -> Tensor:
    """Squeeze and excite."""
    y = m.a(x)
    return torch.sigmoid(m.b(F.relu(F.adaptive_avg_pool2d(y, 1)))) * y


IMAGES = {
    "gate": gate,
    "max pool": lambda m, x: m.b(F.max_pool2d(m.a(x), 3, 2, 1)),
    "max pool with ceil": lambda m, x: m.b(F.max_pool2d(m.a(x), 2, ceil_mode=True)),
    "average pool": lambda m, x: m.b(F.avg_pool2d(m.a(x), 3, 2, 1)),
    "average without padding": lambda m, x: m.b(
        F.avg_pool2d(m.a(x), 3, 2, 1, count_include_pad=False)
    ),
    "grouped": lambda m, x: m.b(m.deep(m.a(x))),
    "mean": lambda m, x: m.head(m.a(x).mean((2, 3))),
    "mean that keeps planes": lambda m, x: m.head(m.a(x).mean((-1, -2), keepdim=True).flatten(1)),
    "pool and view": lambda m, x: m.head(F.adaptive_avg_pool2d(m.a(x), 1).view(x.shape[0], 16)),
    "sum and product": lambda m, x: (y := m.a(x)) * m.b(y) + F.silu(y),
    "bias per channel": lambda m, x: (y := m.a(x)) + m.b(y.mean((2, 3), keepdim=True)),
    "one pixel": lambda m, x: m.deep(m.b(F.adaptive_avg_pool2d(m.a(x), 1))),
    "torch between": lambda m, x: m.b(torch.cat([m.a(x)[:, :8], torch.tanh(m.a(x))[:, 8:]], 1)),
    "flat planes": lambda m, x: F.linear(m.a(x).flatten(1), torch.ones(3, 16 * 63)),
}


@pytest.mark.parametrize("name", IMAGES)
def test_operators_over_images_agree(name: str) -> None:
    model, x = Net(IMAGES[name]).eval(), torch.randn(3, 8, 7, 9)
    compiled = build_with(model, x, strategy=PLANS)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


TOKENS = {
    "residual": lambda m, x: F.gelu(m.tokens(x)) + m.tokens(x),
    "of one image": lambda m, x: m.head(m.tokens(x)[:, 0]),
    "four axes": lambda m, x: m.head(m.tokens(x.unflatten(1, (5, -1)))).flatten(1, 2),
}


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("shape", [(2, 5, 8), (4, 50, 8)])
def test_operators_over_tokens_agree(name: str, shape: tuple[int, ...]) -> None:
    model, x = Net(TOKENS[name]).eval(), torch.randn(shape)
    compiled = build_with(model, x, strategy=PLANS)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_whole_network_is_one_plan() -> None:
    compiled = build_with(Net(IMAGES["gate"]).eval(), torch.randn(1, 8, 7, 9), strategy=PLANS)
    assert {row.kernel.rpartition("(")[2] for row in compiled.explain().rows} == {"plan 0)"}


@pytest.mark.parametrize(
    ("tokens", "tile"), [(2048, 128), (128, 128), (9, 9), (197, 197), (200, 100), (2 * 197, 394)]
)
def test_tokens_go_in_tiles_that_divide_them(tokens: int, tile: int) -> None:
    assert token_tile(tokens) == tile


def test_global_pool_of_a_single_pixel_stays_in_the_plan() -> None:
    network = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(8, 16, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    ).eval()
    images = torch.randn(2, 4, 8, 8)
    compiled = build_with(network, images)
    assert compiled.explain().chosen == "native plans"
    assert not any("no native plan" in note for note in compiled.explain().notes)
    torch.testing.assert_close(compiled(images), network(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("images", [1, 2])
def test_a_layer_is_timed_by_itself(
    threads: int, images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among others where they decide how several threads work on it, without their time."""
    weight = torch.randn(6, 8, 1, 1) * (torch.rand(6, 8, 1, 1) < 0.3)
    shapes = (images, 8, 14, 14), (images, 6, 14, 14)
    layer = Layer("model.conv", "conv2d", weight, None, "relu", True, *shapes)
    x, residual = layer.example()
    for candidate in candidates_for(layer, threads):
        if candidate.emit is None:
            continue
        probe = LayerProbe(layer, candidate, threads)
        others = 4 if threads > 1 and images == 1 and kernels.native_in_use() is not None else 0
        assert len(probe._plan.describe()) == 1 + others
        seconds = probe.kernel_seconds(x, residual)
        assert seconds() > 0
        if kernels.native_in_use() is not None:
            steps = [(name, 1.0) for name, _ in probe._plan.profile([x, residual])]
            monkeypatch.setattr(probe._plan, "profile", Mock(return_value=steps))
            assert seconds() == 1.0
