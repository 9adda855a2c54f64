"""Convolutions with sparse kernels are offered to the tuner, run right, and lose without harm."""

from __future__ import annotations

import pytest
import torch
from fakes import build_with
from torch import nn

from aerogel import kernels
from aerogel.runtime.candidates import candidates_for
from aerogel.runtime.layer import Layer
from aerogel.runtime.strategies import CALLS, PLANS, TORCH

needs_native = pytest.mark.skipif(not kernels.native_available(), reason="native kernels not built")


def prune_(model: nn.Module, sparsity: float, block: int) -> nn.Module:
    """Zero random weights of all convolutions in (block x 1) blocks."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight.data
            kept = torch.rand(weight.shape[0] // block, *weight.shape[1:]) >= sparsity
            weight.mul_(kept.repeat_interleave(block, 0))
    return model


class Bottleneck(nn.Module):
    """3x3 convolutions with stride, dilation and groups, a strided 1x1, and a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=2)
        self.point = nn.Conv2d(16, 8, 1, stride=2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.down(x))
        return self.point(torch.relu(self.grouped(y) + y))


def model(sparsity: float = 0.9, block: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return prune_(Bottleneck(), sparsity, block).eval()


def layer(sparsity: float, block: int = 1, groups: int = 1) -> Layer:
    torch.manual_seed(0)
    kept = torch.rand(24 // block, 12 // groups, 3, 3) >= sparsity
    weight = torch.randn(24, 12 // groups, 3, 3) * kept.repeat_interleave(block, 0)
    shapes = (1, 12, 9, 9), (1, 24, 9, 9)
    return Layer(
        "conv", "conv2d", weight, None, "relu", True, *shapes, (1, 1), (1, 1), (1, 1), groups
    )


def offers(it: Layer) -> list[str]:
    return [c.name for c in candidates_for(it, 1) if "sparse conv" in c.name]


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("strategy", [TORCH, CALLS, PLANS])
def test_compiled_convolutions_agree(strategy: str, block: int) -> None:
    original, x = model(block=block), torch.randn(2, 8, 21, 18)
    compiled = build_with(original, x, strategy=strategy, layer="sparse conv", whole="plan")
    assert compiled.explain().chosen == strategy
    if strategy != TORCH:
        assert all("sparse conv" in row.kernel for row in compiled.explain().rows)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), original(x), rtol=1e-4, atol=1e-5)


def test_a_convolution_that_torch_computes_faster_stays_in_torch() -> None:
    original, x = model(), torch.randn(1, 8, 21, 18)
    compiled = build_with(original, x, layer="direct/torch", whole=TORCH)
    assert {row.kernel for row in compiled.explain().rows} == {"torch"}
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), original(x))


def test_only_sparse_windows_are_offered() -> None:
    assert offers(layer(0.9))
    assert offers(layer(0.9, block=4, groups=2))
    assert not offers(layer(0.1))
    depthwise = Layer(
        "dw", "conv2d", torch.zeros(12, 1, 3, 3), None, "none", False, (1, 12, 9, 9),
        (1, 12, 9, 9), (1, 1), (1, 1), (1, 1), 12,
    )  # fmt: skip
    assert not offers(depthwise)


@needs_native
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_every_offer_computes_the_layer(groups: int) -> None:
    it = layer(0.8, 4, groups)  # 6 outputs a group: blocks of 4 would cross them
    x, residual = it.example()
    expected = torch.relu(
        torch.nn.functional.conv2d(x, it.weight, None, 1, 1, 1, groups) + residual
    )
    offered = [c for c in candidates_for(it, 1) if "sparse conv" in c.name]
    assert offered
    for candidate in offered:
        if candidate.module is not None:
            torch.testing.assert_close(
                candidate.module()(x, residual), expected, rtol=1e-4, atol=1e-4
            )


def test_reference_mode_offers_one_and_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AEROGEL_KERNELS", "reference")
    assert len(offers(layer(0.9))) == 2  # called and planned
    original, x = model(), torch.randn(1, 8, 21, 18)
    compiled = build_with(original, x, layer="sparse conv", whole="plan")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), original(x), rtol=1e-4, atol=1e-5)
