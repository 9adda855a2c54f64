"""Sparse weights x one to a few vectors against the reference, on every instruction set."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import needs_native
from torch import Tensor

from aerogel import kernels
from aerogel.kernels import BlockRowWeight, gemv, gemv_reference

pytestmark = [needs_native, pytest.mark.usefixtures("instruction_set")]

BLOCKS = (1, 2, 4)
DTYPES = (torch.float32, torch.bfloat16, torch.int8)
SIZES = (1, 2, 3, 5, 8, 17, 31, 64, 67, 101, 300)


def random_weight(rows: int, cols: int, density: float, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, cols, generator=g) < density
    return torch.randn(rows, cols, generator=g) * mask


def assert_matches(got: Tensor, x: Tensor, weight: BlockRowWeight, *bias: Tensor, **how: object):
    """Within 1e-5 of sum |w| |x| of the float64 product with the dequantized weight."""
    dense = weight.unpack().double()
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in how.items()}
    double = BlockRowWeight.pack(dense, 1)
    expected = gemv_reference(x.double(), double, *(b.double() for b in bias), **wide)
    scale = 1 + x.double().abs() @ dense.abs().t()
    assert got.shape == expected.shape
    assert got.dtype == torch.float32
    assert ((got - expected).abs() <= 1e-5 * scale).all()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from(SIZES),
    cols=st.sampled_from(SIZES),
    lead=st.sampled_from([(), (1,), (2,), (3, 1), (5,), (0,), (3, 7)]),
    density=st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0]),
    block=st.sampled_from(BLOCKS),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(sorted(kernels.ACTIVATIONS)),
    with_bias=st.booleans(),
    with_residual=st.booleans(),
    threads=st.integers(1, 3),
)
def test_any_shape_matches_the_reference(
    rows: int,
    cols: int,
    lead: tuple[int, ...],
    density: float,
    block: int,
    dtype: torch.dtype,
    activation: str,
    with_bias: bool,
    with_residual: bool,
    threads: int,
) -> None:
    weight = BlockRowWeight.pack(random_weight(rows, cols, density, 7), block, dtype=dtype)
    x = torch.randn(*lead, cols)
    bias = [torch.randn(rows)] if with_bias else []
    how = {"activation": activation}
    if with_residual:
        how["residual"] = torch.randn(*lead, rows)
    assert_matches(gemv(x, weight, *bias, **how, threads=threads), x, weight, *bias, **how)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 19])
def test_several_tiles_and_slabs_are_joined(dtype: torch.dtype, tokens: int) -> None:
    dense = random_weight(1100, 6500, 0.03, 3)
    dense[::7] = 0  # empty rows
    dense[5] = torch.randn(6500)  # and one that is a hundred times longer than its neighbours
    weight = BlockRowWeight.pack(dense, 1, dtype=dtype)
    x, bias = torch.randn(tokens, 6500), torch.randn(1100)
    first = gemv(x, weight, bias, activation="silu", threads=1)
    assert_matches(first, x, weight, bias, activation="silu")
    for threads in (2, 5):
        assert torch.equal(first, gemv(x, weight, bias, activation="silu", threads=threads))


def test_gaps_wider_than_a_byte_are_bridged() -> None:
    """Columns 254 to 257 apart, at both ends of slabs, and rows of one far column."""
    dense = torch.zeros(9, 6200)
    for row, gap in enumerate((1, 254, 255, 256, 257, 1000, 3071, 3072)):
        dense[row, ::gap] = torch.arange(1.0, 1 + len(dense[row, ::gap]))
    dense[8, -1] = 3.0
    weight = BlockRowWeight.pack(dense, 1)
    for tokens in (1, 3):
        x = torch.randint(-3, 4, (tokens, 6200)).float()
        torch.testing.assert_close(gemv(x, weight), x @ dense.t())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_exactly_the_rows_that_store_its_column(
    dtype: torch.dtype, tokens: int, poison: float
) -> None:
    # Rows of 0 to 4 columns: lanes of a group stay idle and strands are cut.
    dense = torch.zeros(23, 40)
    for row in range(23):
        dense[row, row : row + row % 5] = 1.0 + row
    weight = BlockRowWeight.pack(dense, 1, dtype=dtype)
    for column in (0, 13, 39):
        x = torch.ones(tokens, 40)
        x[:, column] = poison
        got = gemv(x, weight)
        stored = dense[:, column] != 0
        assert got[:, ~stored].isfinite().all()
        assert not got[:, stored].isfinite().any()
        if poison == float("inf"):
            assert (got[:, stored] == poison).all()


def test_weights_that_are_not_finite_stay_in_their_row() -> None:
    dense = random_weight(20, 30, 0.3, 5)
    dense[3, 7], dense[11, 2] = float("nan"), float("inf")
    got = gemv(torch.rand(30) + 0.5, BlockRowWeight.pack(dense, 1))
    assert got[3].isnan()
    assert got[11] == float("inf")
    assert got[[i for i in range(20) if i not in (3, 11)]].isfinite().all()


def test_other_strides_and_given_outputs() -> None:
    weight = BlockRowWeight.pack(random_weight(50, 60, 0.2, 1), 1)
    x, residual, bias = torch.randn(60, 3).t(), torch.randn(50, 3).t(), torch.randn(100)[::2]
    out = torch.empty(3, 50)
    assert gemv(x, weight, bias, residual=residual, out=out) is out
    assert_matches(out, x, weight, bias, residual=residual)


def test_values_changed_in_place_are_seen() -> None:
    weight = BlockRowWeight.pack(random_weight(20, 30, 0.3, 2), 1)
    x = torch.randn(30)
    before = gemv(x, weight)
    weight.values.mul_(2)
    torch.testing.assert_close(gemv(x, weight), before * 2)


def test_threads_share_a_weight() -> None:
    weight = BlockRowWeight.pack(random_weight(700, 900, 0.1, 4), 1, dtype=torch.int8)
    inputs = [torch.randn(1 + i % 6, 900) for i in range(24)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda x: gemv(x, weight, threads=2), inputs))
    for x, got in zip(inputs, results, strict=True):
        assert torch.equal(got, gemv(x, weight, threads=1))


def test_the_stream_is_as_small_as_promised() -> None:
    dense = random_weight(512, 4096, 0.1, 6)
    stored = int((dense != 0).sum())
    for dtype, bytes_each in zip(DTYPES, (5, 3, 2), strict=True):
        stream = kernels.native_gemv_weight(BlockRowWeight.pack(dense, 1, dtype=dtype))
        assert bytes_each * stored <= stream.nbytes < (bytes_each + 0.25) * stored


BAD_CALLS = {
    "x: shape (4,), expected (*, 5)": {"x": torch.ones(4)},
    "bias: shape (5,), expected (6,)": {"bias": torch.ones(5)},
    "residual: shape (2, 5), expected (2, 6)": {"residual": torch.ones(2, 5)},
    "did you mean 'relu'": {"activation": "reul"},
    "threads=0: expected at least 1": {"threads": 0},
    "out: torch.float32 of shape (1,)": {"out": torch.ones(1)},
}


@pytest.mark.parametrize("message", list(BAD_CALLS))
def test_bad_arguments_are_named(message: str) -> None:
    weight = BlockRowWeight.pack(random_weight(6, 5, 0.5, 0), 1)
    how = {"x": torch.ones(2, 5), **BAD_CALLS[message]}
    with pytest.raises(ValueError) as error:
        gemv(how.pop("x"), weight, **how)
    assert message in str(error.value)


def test_an_output_over_the_residual_is_refused() -> None:
    weight = BlockRowWeight.pack(random_weight(6, 5, 0.5, 0), 1)
    y = torch.ones(2, 6)
    with pytest.raises(ValueError, match="another tensor than residual"):
        gemv(torch.ones(2, 5), weight, residual=y, out=y)
