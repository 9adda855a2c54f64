"""Kernel groups (SparseByteNN) run through the 4-row kernels, whatever their geometry."""

from __future__ import annotations

import pytest
import torch
from fakes import build_with
from torch import Tensor, nn

from aerogel import kernels
from aerogel.runtime.detect import detect_zeros
from aerogel.runtime.strategies import PLANS
from aerogel.sparsity import KernelGroup, KernelPattern, build_masks


class Net(nn.Module):
    """1x1 and 3x3, with stride, odd channel counts, a residual and a depthwise filter."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, channels, 3, 2, 1)
        self.wide, self.point = nn.Conv2d(channels, channels, 3, 1, 1), nn.Conv2d(channels, 34, 1)
        self.depthwise = nn.Conv2d(34, 34, 3, 1, 1, groups=34)
        self.down, self.skip = nn.Conv2d(34, 27, 3, 2, 1), nn.Conv2d(34, 27, 1, 2)
        self.head = nn.Linear(27, 21)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.point(torch.relu(self.wide(x) + x)))
        x = nn.functional.relu6(self.depthwise(x))
        return self.head(torch.relu(self.down(x) + self.skip(x)).mean((2, 3)))


def pruned(channels: int, group: int, sparsity: float) -> Net:
    model = Net(channels)
    for name in ("wide", "point", "down", "skip", "head"):
        weight = model.get_submodule(name).weight.data
        mask = build_masks({name: weight}, 1.0 - sparsity, KernelGroup(group))[name]
        weight.mul_(mask)
    weight = model.depthwise.weight.data
    weight.mul_(build_masks({"dw": weight}, None, KernelPattern(group=group))["dw"])
    return model.eval()


@pytest.mark.parametrize("group", [4, 8, 16])
@pytest.mark.parametrize(("channels", "sparsity"), [(22, 0.3), (24, 0.5), (33, 0.7)])
def test_zeros_of_kernel_groups_are_recognised_as_blocks_of_four(
    channels: int, sparsity: float, group: int
) -> None:
    model = pruned(channels, group, sparsity)
    for name in ("wide", "point", "down", "skip", "head"):
        zeros = detect_zeros(model.get_submodule(name).weight)
        assert (zeros.pattern, zeros.block) == ("4x1", 4), name
        assert zeros.fill[4] > 0.99


@pytest.mark.parametrize("group", [4, 8, 16])
@pytest.mark.parametrize(("channels", "sparsity"), [(22, 0.3), (24, 0.5), (33, 0.7)])
def test_compiled_networks_skip_whole_groups(channels: int, sparsity: float, group: int) -> None:
    model, x = pruned(channels, group, sparsity), torch.randn(2, 3, 17, 13)
    for layer in ("spmm 4x1", "sparse conv 4x1"):
        compiled = build_with(model, x, layer=layer)
        explanation = compiled.explain()
        assert explanation.chosen == PLANS
        chosen = {row.layer: row.kernel for row in explanation.rows}
        sparse = ("point", "head") if layer == "spmm 4x1" else ("wide", "down", "skip")
        assert all(layer in chosen[name] for name in sparse), chosen
        assert "dense" in chosen["depthwise"]
        with torch.no_grad():
            wanted = model(x)
        assert (compiled(x) - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("isa", kernels.available_isas() if kernels.native_available() else [])
def test_every_instruction_set_runs_group_kernels(isa: str) -> None:
    before = kernels.isa()
    kernels.set_isa(isa)
    try:
        generator = torch.Generator().manual_seed(0)
        for outputs, inputs, stride, side in ((22, 5, 2, 7), (16, 33, 1, 9), (7, 12, 2, 1)):
            weight = torch.randn(outputs, inputs, 3, 3, generator=generator)
            weight *= build_masks({"w": weight}, 0.5, KernelGroup(4))["w"]
            x = torch.randn(2, inputs, side, side + 2, generator=generator)
            packed = kernels.BlockRowWeight.pack(weight.flatten(1), 4)
            y = kernels.sparse_conv2d(x, packed, kernel_size=3, stride=stride, padding=1)
            wanted = nn.functional.conv2d(x, weight, None, stride, 1)
            assert torch.allclose(y, wanted, rtol=1e-5, atol=1e-5)
    finally:
        kernels.set_isa(before)
