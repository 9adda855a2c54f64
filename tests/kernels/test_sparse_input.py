"""Dense weights x activations with zeros against the reference, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import needs_native
from torch import Tensor

from aerogel.kernels import quantize_rows, sparse_input_linear, sparse_input_linear_reference

pytestmark = [needs_native, pytest.mark.usefixtures("instruction_set")]

DTYPES = (torch.float32, torch.bfloat16, torch.int8)


def transposed(inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A weight (in, out) and its scales."""
    weight = torch.randn(outputs, inputs)
    if dtype is torch.int8:
        levels, scales = quantize_rows(weight)
        return levels.t().contiguous(), scales
    return weight.t().to(dtype).contiguous(), None


def relu_like(*shape: int, zeros: float) -> Tensor:
    return torch.randn(shape) * (torch.rand(shape) >= zeros)


def assert_matches(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, **how) -> None:
    wide = {k: v.double() if isinstance(v, Tensor) and k != "scales" else v for k, v in how.items()}
    double = weight if weight.dtype is torch.int8 else weight.double()
    bias = None if bias is None else bias.double()
    expected = sparse_input_linear_reference(x.double(), double, bias, **wide)
    torch.testing.assert_close(got, expected.float(), atol=2e-4, rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    inputs=st.sampled_from([1, 2, 5, 16, 67, 130]),
    outputs=st.sampled_from([1, 3, 8, 17, 64, 100, 1031]),
    lead=st.sampled_from([(), (1,), (2,), (5,), (8,), (3, 3), (0,)]),
    zeros=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    dtype=st.sampled_from(DTYPES),
    threshold=st.sampled_from([0.0, 0.7]),
    activation=st.sampled_from(["none", "relu", "gelu"]),
    with_bias=st.booleans(),
    with_residual=st.booleans(),
    threads=st.integers(1, 3),
)
def test_any_shape_matches_the_reference(
    inputs: int,
    outputs: int,
    lead: tuple[int, ...],
    zeros: float,
    dtype: torch.dtype,
    threshold: float,
    activation: str,
    with_bias: bool,
    with_residual: bool,
    threads: int,
) -> None:
    weight, scales = transposed(inputs, outputs, dtype)
    x = relu_like(*lead, inputs, zeros=zeros)
    bias = torch.randn(outputs) if with_bias else None
    how = {"scales": scales, "threshold": threshold, "activation": activation}
    if with_residual:
        how["residual"] = torch.randn(*lead, outputs)
    got = sparse_input_linear(x, weight, bias, **how, threads=threads)
    assert_matches(got, x, weight, bias, **how)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 11])
def test_wide_layers_give_the_same_bits_on_any_number_of_threads(dtype, tokens) -> None:
    weight, scales = transposed(200, 5003, dtype)
    x, bias = relu_like(tokens, 200, zeros=0.8), torch.randn(5003)
    first = sparse_input_linear(x, weight, bias, scales=scales, threads=1)
    assert_matches(first, x, weight, bias, scales=scales)
    for threads in (2, 5):
        again = sparse_input_linear(x, weight, bias, scales=scales, threads=threads)
        assert torch.equal(first, again)


@pytest.mark.parametrize("tokens", [1, 3])
def test_rows_that_are_not_needed_are_not_read(tokens: int) -> None:
    weight, _ = transposed(40, 70, torch.float32)
    x = relu_like(tokens, 40, zeros=0.5)
    x[:, 7], x[0, 9] = -0.0, 0.0
    weight[7], weight[9] = float("nan"), float("inf")
    x[1:, 9] = 1.0
    got = sparse_input_linear(x, weight)
    assert got[0].isfinite().all()
    assert not got[1:].isfinite().any()


def test_thresholds_cut_at_their_magnitude_and_nan_takes_part() -> None:
    weight = torch.eye(5)
    x = torch.tensor([0.5, -0.5, 0.50001, -3.0, float("nan")])
    got = sparse_input_linear(x, weight, threshold=0.5)
    assert got[4].isnan()
    # The NaN times the zeros of its row reaches every output, as in a dense product.
    assert got.isnan().all()
    assert sparse_input_linear(x[:4], weight[:4], threshold=0.5).tolist()[:4] == [
        0.0, 0.0, pytest.approx(0.50001), -3.0,
    ]  # fmt: skip


def test_other_strides_and_given_outputs() -> None:
    wide = torch.randn(30, 90)
    for weight in (wide[:, 10:60], wide[:, :50], torch.randn(50, 30).t(), wide[::2, :50][:30]):
        x = relu_like(weight.shape[0], 3, zeros=0.5).t()
        out, residual = torch.empty(3, 50), torch.randn(50, 3).t()
        got = sparse_input_linear(x, weight, residual=residual, out=out)
        assert got is out
        assert_matches(got, x, weight, None, residual=residual)


def test_nothing_in_and_nothing_out() -> None:
    bias = torch.randn(4)
    assert torch.equal(sparse_input_linear(torch.ones(0), torch.ones(0, 4), bias), bias)
    assert sparse_input_linear(torch.ones(2, 3), torch.ones(3, 0)).shape == (2, 0)


BAD_CALLS = {
    "weight_t: shape (5,), expected (in, out)": {"weight_t": torch.ones(5)},
    "x: shape (2, 4), expected (*, 5)": {"x": torch.ones(2, 4)},
    "bias: shape (5,), expected (6,)": {"bias": torch.ones(5)},
    "residual: shape (2, 5), expected (2, 6)": {"residual": torch.ones(2, 5)},
    "scales: expected None": {"scales": torch.ones(6)},
    "scales: expected float32 (6,)": {"weight_t": torch.ones(5, 6, dtype=torch.int8)},
    "threshold=-1.0: expected 0 or more": {"threshold": -1.0},
    "threshold=nan: expected 0 or more": {"threshold": float("nan")},
    "did you mean 'relu'": {"activation": "reul"},
    "threads=0: expected at least 1": {"threads": 0},
    "out: torch.float32 of shape (1,)": {"out": torch.ones(1)},
}


@pytest.mark.parametrize("message", list(BAD_CALLS))
def test_bad_arguments_are_named(message: str) -> None:
    how = {"x": torch.ones(2, 5), "weight_t": torch.ones(5, 6), **BAD_CALLS[message]}
    with pytest.raises(ValueError) as error:
        sparse_input_linear(how.pop("x"), how.pop("weight_t"), **how)
    assert message in str(error.value)
