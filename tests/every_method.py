"""One small network and task that every pruning method can prune, for tests of all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aerogel.models import VisionTransformer
from aerogel.pruning import METHODS, RewritingMethod, SearchMethod, prune
from aerogel.pruning.callbacks import PrunerFactory, pruner_factory

STEPS, HALF, BATCH = 12, 6, 4
OPTIONS: dict[str, Any] = {"updates": 4, "seed": 3}


class Net(nn.Module):
    """Something for every method: convolutions 3x3 and 1x1, attention and feed-forward."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(1, 16, 3, 2, 1)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.point = nn.Conv2d(16, 16, 1)
        sizes = {"patch_size": 2, "in_chans": 16, "embed_dim": 16, "depth": 2, "num_heads": 2}
        self.vit = VisionTransformer(4, **sizes, num_classes=4, mlp_ratio=2.0)  # type: ignore[arg-type]

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        """x: (B, 1, 8, 8) -> logits (B, 4), with labels a mapping of loss and logits."""
        x = F.relu(self.conv(F.relu(self.stem(x))))
        logits = self.vit(F.relu(self.point(x)))
        if labels is None:
            return logits
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """With momentum and weight decay."""
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)


def samples() -> tuple[Tensor, Tensor]:
    """Inputs and labels of one pass over the data."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(HALF * BATCH, 1, 8, 8, generator=generator)
    return x, torch.randint(4, (len(x),), generator=generator)


def batches() -> list[tuple[Tensor, Tensor]]:
    """Two passes over the data, in order."""
    return 2 * list(zip(*(part.split(BATCH) for part in samples()), strict=True))


def step_by(model: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[], Any]) -> None:
    """A plain loop."""
    for x, y in batches():
        optimizer.zero_grad()
        model(x, y)["loss"].backward()
        step()


def natural(method: str) -> tuple[str, float]:
    """The pattern that a method is for, and a sparsity it has."""
    pattern = METHODS[method].pattern or "unstructured"
    if not pattern[0].isdigit():
        return pattern, 0.75
    kept, group = (int(part) for part in pattern.split(":"))
    return pattern, 1 - kept / group


def network(method: str, seed: int = 0) -> nn.Module:
    """What the method trains: the network, or what it puts in its place."""
    found, model = METHODS[method], Net(seed)
    if not isinstance(found, RewritingMethod):
        return model
    return found.rewrite(model, found.proposes(model), natural(method)[1])


def factory(method: str) -> PrunerFactory:
    """Of the pruner of a training method at its natural pattern."""
    pattern, sparsity = natural(method)
    exclude = () if METHODS[method].pattern else ("*stem*",)
    return pruner_factory(method, sparsity, STEPS, pattern=pattern, exclude=exclude, **OPTIONS)


def pruned(method: str) -> tuple[nn.Module, str]:
    """The network, pruned by any method at its natural pattern, and that pattern."""
    found, model = METHODS[method], Net()
    if isinstance(found, SearchMethod):
        optimizer = sgd(model)
        step_by(model, optimizer, optimizer.step)
    pattern, sparsity = natural(method)
    own = found.pattern or isinstance(found, RewritingMethod)
    exclude = () if own else ("*stem*",)
    settings: dict[str, Any] = {
        "pattern": pattern,
        "exclude": exclude,
        "optimizer": sgd,
        "fresh": Net,
    }
    return prune(model, method, sparsity, data=batches(), **settings, **OPTIONS), pattern
