"""Networks of a user, for tests of `import.path:callable`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aerogel.models import VisionTransformer

NOT_CALLABLE = 3


class Net(nn.Module):
    """Two convolutions, batch norm, dropout, and a classifier."""

    def __init__(self, num_classes: int = 10, in_chans: int = 1, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.point = nn.Conv2d(width, 2 * width, 1)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(2 * width, num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, num_classes)."""
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(self.drop(torch.relu(self.point(x)).mean((2, 3))))


def blocks(num_classes: int = 10, in_chans: int = 1) -> nn.Module:
    """A chain of two blocks, as one-shot methods walk it."""
    sizes = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
    return VisionTransformer(8, in_chans=in_chans, num_classes=num_classes, **sizes)  # type: ignore[arg-type]


def two_convs(num_classes: int = 10, in_chans: int = 1) -> nn.Module:
    """A 3x3 convolution behind the first."""
    convs = nn.Conv2d(in_chans, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(256, num_classes))


def broken(num_classes: int) -> nn.Module:
    """A network with a weight that is not a number."""
    model = Net(num_classes)
    with torch.no_grad():
        model.conv.weight[0, 0, 0, 0] = float("nan")
    return model


def text() -> str:
    """Not a network."""
    return "net"
