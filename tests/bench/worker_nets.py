"""Networks that worker processes build in tests, some of which misbehave there."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
from torch import Tensor, nn


def linear(features: int = 4) -> nn.Module:
    return nn.Linear(features, features)


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.Flatten(1)
    )


class Odd(nn.Linear):
    """A linear layer that does something else from its n-th call on."""

    def __init__(self, what: str, after: int) -> None:
        super().__init__(4, 4)
        self.what, self.after, self.calls = what, after, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > self.after:
            if self.what == "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            elif self.what == "hang":
                time.sleep(1000)
            elif self.what == "exit":
                print("no licence", file=sys.stderr)
                os._exit(3)
            elif self.what == "raise":
                raise ValueError("cannot\nmore")
            elif self.what == "print":
                print('{"ready": "nonsense"}')
        return super().forward(x)


def odd(what: str, after: int = 0) -> nn.Module:
    return Odd(what, after)


def missing_package() -> nn.Module:
    import a_package_that_nobody_has  # type: ignore[import-not-found]

    return a_package_that_nobody_has.Net()


class Nested(nn.Module):
    """Takes what tensors come in: lists, keywords, flags."""

    def forward(self, pair: list[Tensor], *, mask: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        return {"sum": (pair[0] + pair[1]) * mask * scale, "mask": mask}


def nested() -> nn.Module:
    return Nested()


def threads() -> nn.Module:
    class Threads(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 0 + torch.get_num_threads()

    return Threads(4, 4)
