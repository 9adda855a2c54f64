"""A recipe that takes seconds, and one uninterrupted run of it that several tests compare with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from aerogel import compress
from aerogel.report import Results

TINY = """
model: {name: digits_mlp, options: {hidden: [48, 32]}}
data: digits
sparsity: 0.8
schedule: {updates: 8}
distillation: {weight: 0.3}
dense: {epochs: 4, batch_size: 32, lr: 0.05, eval_samples: 100}
prune: {epochs: 4, batch_size: 32, optimizer: adamw, lr: 0.003, eval_samples: 100}
measure: {engines: [torch eager], batches: [1], threads: [1], rounds: 3, isolate: false}
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The networks are so small that a second thread only waits; sums depend on the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe as a file."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def finished_run(
    tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Results]:
    """Its folder and what it returned."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    torch.set_num_threads(1)
    results = compress.run(compress.load_recipe(tiny_recipe), folder)
    assert results is not None
    return folder, results
