"""The limit that `explain()` names beside each layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aerogel import kernels
from aerogel.runtime import limits
from aerogel.runtime.candidates import candidates_for
from aerogel.runtime.compiler import layer_row
from aerogel.runtime.layer import Layer
from aerogel.runtime.tuner import Tuned

pytestmark = pytest.mark.skipif(
    not kernels.native_available(), reason="the native kernels are not built"
)

# 1 operation, 1 byte of the first cache or 0.1 bytes of others take a nanosecond each.
ROOF = kernels.Roofline(1, "test", 1.0, 1.0, 0.1, 0.1, 0.1)


@pytest.fixture(autouse=True)
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_roofline", lambda threads, isa: ROOF)


def linear(weight: Tensor, tokens: int) -> Layer:
    rows, cols = weight.shape
    return Layer("fc", "linear", weight, None, "none", False, (tokens, cols), (tokens, rows))


def scattered(rows: int, cols: int, block: int = 1) -> Tensor:
    """Every fourth column of each block of rows."""
    at = torch.arange(cols)[None] + torch.arange(rows)[:, None] // block
    return (at % 4 == 0).float()


def test_dense_products_are_bound_by_multiply_adds() -> None:
    bound = limits.bound_of(linear(torch.ones(64, 64), 4096), False, 1)
    assert bound is not None
    assert bound.name == "FMA"
    assert bound.seconds == pytest.approx(2e-9 * 64 * 64 * 4096)


def test_scattered_zeros_are_bound_by_loads_and_blocks_share_them() -> None:
    alone = limits.bound_of(linear(scattered(256, 256), 4096), True, 1)
    shared = limits.bound_of(linear(scattered(256, 256, 4), 4096), True, 1)
    assert alone is not None
    assert shared is not None
    assert (alone.name, shared.name) == ("loads", "FMA")
    assert alone.seconds == pytest.approx(4e-9 * 64 * 256 * 4096)
    assert shared.seconds == pytest.approx(2e-9 * 64 * 256 * 4096)


def test_one_vector_is_bound_by_the_bytes_of_the_weight() -> None:
    bound = limits.bound_of(linear(torch.ones(64, 64), 1), False, 1)
    assert bound is not None
    assert bound.name == "bytes"
    assert bound.seconds == pytest.approx(4e-8 * (64 * 64 + 2 * 64))


@pytest.mark.parametrize("block", [1, 4])
def test_stored_columns_bring_their_indices_which_a_block_shares(block: int) -> None:
    weight = scattered(256, 256, block)
    bound = limits.bound_of(linear(weight, 1), True, 1)
    assert bound is not None
    assert bound.name == "bytes"
    stored = 64 * 256
    assert bound.seconds == pytest.approx(1e-8 * (4 * stored + stored / block + 4 * 2 * 256))


@pytest.mark.parametrize(("m", "index"), [(4, 0.25), (8, 0.4)])
def test_n_of_m_stores_whole_groups_and_their_few_bits_of_index(m: int, index: float) -> None:
    weight = (torch.arange(240) % m == 1).float().repeat(256, 1)
    weight[0, 1] = 0.0  # a zero that is stored
    bound = limits.bound_of(linear(weight, 1), True, 1, pattern=(1, m))
    assert bound is not None
    assert bound.name == "bytes"
    stored = 256 * 240 / m
    assert bound.seconds == pytest.approx(1e-8 * ((4 + index) * stored + 4 * (240 + 256)))


def test_explain_holds_an_n_of_m_kernel_to_its_own_bytes() -> None:
    layer = linear((torch.arange(240) % 4 < 2).float().repeat(256, 1), 1)
    every = {each.name: each for each in candidates_for(layer, 1)}
    assert {name for name, each in every.items() if each.pattern} == {"gemv 2:4"}
    tuned = Tuned(layer, every, {"torch": 1.0, "gemv 2:4": 1.0}, {})
    row = layer_row(tuned, every["gemv 2:4"], "gemv 2:4", 1.0, 1.0)
    assert row.bound == "bytes"
    assert row.reach == pytest.approx(1e-8 * (4.25 * 256 * 120 + 4 * (240 + 256)))


def test_a_weight_in_two_bytes_moves_two_bytes_a_value() -> None:
    bound = limits.bound_of(linear(torch.ones(64, 64, dtype=torch.bfloat16), 1), False, 1)
    assert bound is not None
    assert bound.seconds == pytest.approx(1e-8 * (2 * 64 * 64 + 4 * 2 * 64))


def test_the_reference_has_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AEROGEL_KERNELS", "reference")
    assert limits.bound_of(linear(torch.ones(4, 4), 1), False, 1) is None
