"""Packed weights: nothing is lost, and bad parts are named."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aerogel.kernels import BlockRowWeight


def block_mask(rows: int, cols: int, block: int, density: float) -> Tensor:
    return (torch.rand(-(-rows // block), cols) < density).repeat_interleave(block, 0)[:rows]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 19),
    cols=st.integers(0, 19),
    density=st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    block=st.sampled_from([1, 2, 4, "auto"]),
)
def test_unpack_returns_what_was_packed(
    rows: int, cols: int, density: float, block: int | str
) -> None:
    weight = torch.randn(rows, cols) * (torch.rand(rows, cols) < density)
    packed = BlockRowWeight.pack(weight, block)
    assert torch.equal(packed.unpack(), weight)
    packed.check()
    again = BlockRowWeight.from_tensors(packed.to_tensors())
    assert torch.equal(again.unpack(), weight)


@pytest.mark.parametrize("block", [1, 2, 4])
def test_auto_finds_the_block_of_the_mask(block: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(63, 200) * block_mask(63, 200, block, 0.2)
    assert BlockRowWeight.pack(weight).block == block


def test_auto_accepts_blocks_that_are_nine_tenths_full() -> None:
    weight = torch.ones(40, 1)
    weight[[0, 5, 10, 15]] = 0.0
    assert BlockRowWeight.pack(weight).block == 4
    weight[20] = 0.0
    assert BlockRowWeight.pack(weight, min_fill=0.9).block != 4
    assert BlockRowWeight.pack(weight, min_fill=0.5).block == 4


def test_density_and_bytes_count_what_is_stored() -> None:
    weight = torch.zeros(4, 10)
    weight[0, 3] = 1.0
    one, four = BlockRowWeight.pack(weight, 1), BlockRowWeight.pack(weight, 4)
    assert one.density == pytest.approx(1 / 40)
    assert four.density == pytest.approx(4 / 40)
    assert one.nbytes == 4 + 2 + 5 * 8
    assert four.nbytes == 16 + 2 + 2 * 8


def test_columns_widen_when_16_bits_do_not_reach() -> None:
    narrow, wide = torch.zeros(1, 1 << 15), torch.zeros(1, (1 << 15) + 1)
    narrow[0, -1] = wide[0, -1] = 1.0
    assert BlockRowWeight.pack(narrow).columns.dtype == torch.int16
    packed = BlockRowWeight.pack(wide)
    assert packed.columns.dtype == torch.int32
    assert packed.columns.tolist() == [1 << 15]


def test_nan_weights_are_kept() -> None:
    weight = torch.zeros(3, 3)
    weight[1, 1] = float("nan")
    assert BlockRowWeight.pack(weight).unpack().isnan().nonzero().tolist() == [[1, 1]]


def test_kernels_of_one_by_one_are_matrices() -> None:
    weight = torch.randn(4, 3, 1, 1)
    assert torch.equal(BlockRowWeight.pack(weight).unpack(), weight[..., 0, 0])
    transposed = torch.randn(3, 4).t()
    assert torch.equal(BlockRowWeight.pack(transposed, 2).unpack(), transposed)


@pytest.mark.parametrize(
    ("weight", "options", "error", "message"),
    [
        (torch.ones(2, 2, dtype=torch.int32), {}, TypeError, "weight: expected a floating point"),
        ([1.0], {}, TypeError, "got list"),
        (torch.ones(3), {}, ValueError, r"shape \(3,\)"),
        (torch.ones(2, 2, 3, 3), {}, ValueError, "1x1 kernel"),
        (torch.ones(2, 2, requires_grad=True), {}, ValueError, "detach"),
        (torch.ones(2, 2), {"block": 3}, ValueError, "block=3: expected 1, 2, 4 or 'auto'"),
        (torch.ones(2, 2), {"min_fill": 1.5}, ValueError, "min_fill=1.5"),
    ],
)
def test_what_cannot_be_packed_is_named(
    weight: Tensor, options: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        BlockRowWeight.pack(weight, **options)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("row_ptr", torch.tensor([0, 2, 1, 4]), "row_ptr"),
        ("row_ptr", torch.tensor([0, 1]), "row_ptr"),
        ("columns", torch.tensor([0, 1, 2, 9], dtype=torch.int16), "columns"),
        ("columns", torch.tensor([0, -1, 2, 1], dtype=torch.int16), "columns"),
        ("columns", torch.tensor([1, 0, 0, 1], dtype=torch.int16), "ascending"),
        ("values", torch.ones(7), "values"),
        ("block", torch.tensor(3), "block=3"),
    ],
)
def test_damaged_parts_are_named(part: str, value: Tensor, message: str) -> None:
    parts = {
        "values": torch.ones(4),
        "columns": torch.tensor([0, 1, 0, 1], dtype=torch.int16),
        "row_ptr": torch.tensor([0, 2, 3, 4]),
        "shape": torch.tensor([3, 3]),
        "block": torch.tensor(1),
    }
    BlockRowWeight.from_tensors(parts).check()
    with pytest.raises(ValueError, match=message):
        BlockRowWeight.from_tensors({**parts, part: value})


def test_missing_parts_are_named() -> None:
    with pytest.raises(ValueError, match="missing block, columns, row_ptr, shape"):
        BlockRowWeight.from_tensors({"values": torch.ones(1)})
