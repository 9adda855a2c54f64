"""Tests that ask for `instruction_set` run once on each that the machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from instruction_sets import ISAS

from aerogel import kernels


@pytest.fixture(params=ISAS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = kernels.isa()
    kernels.set_isa(request.param)
    yield request.param
    kernels.set_isa(before)
