"""The worked example of CONTRIBUTING.md is code that runs, not an illustration."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

PAGE = Path(__file__).parent.parent / "CONTRIBUTING.md"


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    (source,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(compile(source, "snip.py", "exec"), namespace)
    return namespace


def test_worked_example_prunes_and_trains(example: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    x, y = torch.randn(64, 20), torch.randint(0, 3, (64,))
    pruner = example["SNIP"](model, optimizer, 0.9, (x, y))
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        pruner.step()
        losses.append(loss.item())
    masks = pruner.finalize()
    total = 20 * 64 + 64 * 3
    assert masks.nnz == total - round(0.9 * total)
    assert sum(int((w != 0).sum()) for w in (model[0].weight, model[2].weight)) <= masks.nnz
    assert losses[-1] < losses[0]
