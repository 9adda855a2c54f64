"""Tests that ask for `instruction_set` run once on each that the machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from instruction_sets import ISAS

from aerogel import kernels


@pytest.fixture(params=ISAS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = kernels.isa()
    kernels.set_isa(request.param)
    yield request.param
    kernels.set_isa(before)


@pytest.fixture
def threads_of_torch() -> Iterator[None]:
    """Tests may set torch's threads: they are as before afterwards."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
