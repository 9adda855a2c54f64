"""Small networks with zeros, built where the tests need them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def sparsify_(model: nn.Module, sparsity: float, block: int = 1) -> nn.Module:
    """Zero random weights of linear layers and 1x1 convolutions, in (block x 1) blocks."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        is_pointwise = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
        if not (is_pointwise or isinstance(module, nn.Linear)):
            continue
        weight = module.weight.data
        rows = -(-weight.shape[0] // block)
        kept = torch.rand(rows, weight.shape[1], generator=generator) >= sparsity
        mask = kept.repeat_interleave(block, 0)[: weight.shape[0]]
        weight.mul_(mask.view(weight.shape[0], -1, *[1] * (weight.dim() - 2)))
        weight.mul_((1.0 - sparsity) ** -0.5)  # keeps the signal alive through many layers
    return model


def settle_norms_(model: nn.Module) -> nn.Module:
    """Give batch norms statistics that folding could get wrong."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0.0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.7, 1.4)
            nn.init.normal_(module.bias, 0.0, 0.2)
    return model


class InvertedResidual(nn.Module):
    """A MobileNet v2 block: expand, depthwise, project, and a skip where shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int, act: type[nn.Module]) -> None:
        super().__init__()
        hidden = 3 * inputs
        self.body = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            act(inplace=True),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            act(inplace=True),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.skips = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return x + y if self.skips else y


def mobile_network(sparsity: float = 0.9, block: int = 1, act: type[nn.Module] = nn.ReLU6):
    """Stem, two blocks (one with a skip), head: (batch, 3, 20, 20) -> (batch, 10)."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        act(inplace=True),
        InvertedResidual(16, 16, 1, act),
        InvertedResidual(16, 24, 2, act),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(24, 10),
    )
    return sparsify_(settle_norms_(model), sparsity, block).eval()


class Residual(nn.Module):
    """A ResNet block whose skip is itself a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 12, 3, 1, 1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.down, self.bn3 = nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu_(self.bn1(self.conv1(x)))))
        y += self.bn3(self.down(x))
        return torch.relu(y)


def perceptron(sparsity: float = 0.8, block: int = 4, act: type[nn.Module] = nn.GELU):
    """(batch, 24) -> (batch, 6)."""
    torch.manual_seed(0)
    layers = [nn.Linear(24, 48), nn.BatchNorm1d(48), act(), nn.Linear(48, 32), act()]
    model = nn.Sequential(*layers, nn.Dropout(), nn.Linear(32, 6))
    return sparsify_(settle_norms_(model), sparsity, block).eval()


class DataDependent(nn.Module):
    """Control flow that torch.export cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(16, 32), Gate(), nn.Linear(32, 8)
        sparsify_(self, 0.9)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.gate(self.first(x)))


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if bool(x.sum() > 0) else -x
