"""Gradients at stored places only, and the products of weights under training."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import needs_native
from torch import Tensor

from aerogel import kernels
from aerogel.kernels import (
    BlockRowWeight,
    TrainedPattern,
    sddmm,
    sddmm_reference,
    spmm_reference,
)
from aerogel.kernels._library import native

SIZES = (1, 2, 3, 5, 8, 13, 17, 31, 49, 64, 65, 130)


def random_weight(rows: int, cols: int, density: float, block: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, cols, generator=g) * (torch.rand(rows, cols, generator=g) < density)
    return BlockRowWeight.pack(dense, block)


def operands(weight: BlockRowWeight, columns: int, batch: int, layout: str, seed: int = 1):
    g = torch.Generator().manual_seed(seed)
    rows, cols = weight.shape
    if layout == "tokens":
        shapes = (batch, columns, rows), (batch, columns, cols)
    else:
        shapes = (batch, rows, columns), (batch, cols, columns)
    return tuple(torch.randn(s, generator=g) for s in shapes)


def assert_close(got: Tensor, grad: Tensor, x: Tensor, weight: BlockRowWeight, layout: str):
    """Within 1e-5 of the sum of |grad| |x|."""
    expected = sddmm_reference(grad.double(), x.double(), weight, layout=layout)
    scale = 1 + sddmm_reference(grad.double().abs(), x.double().abs(), weight, layout=layout)
    assert got.shape == weight.values.shape
    assert ((got - expected).abs() <= 1e-5 * scale).all()


@needs_native
@pytest.mark.usefixtures("instruction_set")
@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from(SIZES),
    cols=st.sampled_from(SIZES),
    columns=st.sampled_from(SIZES),
    batch=st.integers(1, 3),
    block=st.sampled_from((1, 2, 4)),
    density=st.sampled_from((0.0, 0.1, 0.5, 1.0)),
    layout=st.sampled_from(("channels", "tokens")),
    threads=st.integers(1, 3),
)
def test_gradient_matches_the_dense_one(
    rows: int,
    cols: int,
    columns: int,
    batch: int,
    block: int,
    density: float,
    layout: str,
    threads: int,
) -> None:
    weight = random_weight(rows, cols, density, block)
    grad, x = operands(weight, columns, batch, layout)
    got = sddmm(grad, x, weight, layout=layout, threads=threads)
    assert_close(got, grad, x, weight, layout)


@needs_native
@pytest.mark.parametrize("layout", ["channels", "tokens"])
@pytest.mark.parametrize("block", [1, 4])
def test_features_beyond_one_slab_and_threads_give_the_same_bits(layout: str, block: int) -> None:
    weight = random_weight(1030, 1601, 0.03, block)
    grad, x = operands(weight, 70, 2, layout)
    one = sddmm(grad, x, weight, layout=layout, threads=1)
    assert_close(one, grad, x, weight, layout)
    for threads in (2, 3):
        assert torch.equal(sddmm(grad, x, weight, layout=layout, threads=threads), one)


@pytest.mark.parametrize("layout", ["channels", "tokens"])
def test_no_columns_give_zeros_and_no_values_give_nothing(layout: str) -> None:
    weight = random_weight(6, 5, 0.5, 1)
    got = sddmm(*operands(weight, 0, 2, layout), weight, layout=layout)
    assert torch.equal(got, torch.zeros_like(weight.values))
    empty = random_weight(6, 5, 0.0, 1)
    assert sddmm(*operands(empty, 4, 2, layout), empty, layout=layout).shape == (0,)


def test_other_strides_are_read_right() -> None:
    weight = random_weight(6, 5, 0.5, 1)
    grad, x = operands(weight, 9, 2, "channels")
    other = sddmm(grad.mT.contiguous().mT, x[:, :, ::2].repeat_interleave(2, 2)[..., :9], weight)
    x = x[:, :, ::2].repeat_interleave(2, 2)[..., :9]
    assert_close(other, grad, x, weight, "channels")


@needs_native
def test_nan_reaches_the_values_that_meet_it_only() -> None:
    dense = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]])
    weight = BlockRowWeight.pack(dense, 1)
    grad, x = operands(weight, 11, 1, "tokens")
    x[0, 3, 1] = torch.nan
    assert sddmm(grad, x, weight, layout="tokens").isnan().tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "rows"}, "layout='rows'"),
        ({"threads": 0}, "threads=0"),
        ({"grad": torch.zeros(2, 7, 4)}, r"grad: shape \(2, 7, 4\), expected \(2, 6, 4\)"),
        ({"x": torch.zeros(2, 4, 4)}, r"x: shape \(2, 4, 4\)"),
        ({"x": torch.zeros(2, 5, 4).double()}, "grad: torch.float32, expected the dtype of x"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    weight = random_weight(6, 5, 0.5, 1)
    arguments = {"grad": torch.zeros(2, 6, 4), "x": torch.zeros(2, 5, 4), **change}
    with pytest.raises(ValueError, match=message):
        sddmm(arguments.pop("grad"), arguments.pop("x"), weight, **arguments)


@needs_native
def test_native_pattern_refuses_what_is_no_pattern() -> None:
    columns, row_ptr = torch.tensor([0, 9], dtype=torch.int32), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="columns=9"):
        native().sddmm_pattern(columns.data_ptr(), row_ptr.data_ptr(), 2, 3, 1)


@pytest.mark.parametrize("layout", ["channels", "tokens"])
def test_operator_passes_opcheck(layout: str) -> None:
    weight = random_weight(6, 5, 0.5, 2)
    grad, x = operands(weight, 3, 2, layout)
    parts = (weight.columns, weight.row_ptr, 6, 5, 2, len(weight.values), layout)
    torch.library.opcheck(
        torch.ops.aerogel.sddmm.default, (grad.requires_grad_(), x.requires_grad_(), *parts)
    )


def test_second_derivatives_of_the_operator_are_right() -> None:
    weight = random_weight(6, 5, 0.5, 2)
    grad, x = (t.double().requires_grad_() for t in operands(weight, 3, 2, "tokens"))
    parts = (weight.columns, weight.row_ptr, 6, 5, 2, len(weight.values), "tokens")
    assert torch.autograd.gradcheck(lambda g, x: torch.ops.aerogel.sddmm(g, x, *parts), (grad, x))


# ------------------------------------------------------------------------------ trained patterns


def trained(weight: BlockRowWeight) -> TrainedPattern:
    return TrainedPattern(weight.columns, weight.row_ptr, weight.shape, weight.block)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from(SIZES),
    cols=st.sampled_from(SIZES),
    columns=st.sampled_from(SIZES),
    block=st.sampled_from((1, 2, 4)),
    density=st.sampled_from((0.0, 0.1, 1.0)),
    layout=st.sampled_from(("channels", "tokens")),
)
def test_trained_product_and_its_gradients_match_dense(
    rows: int, cols: int, columns: int, block: int, density: float, layout: str
) -> None:
    weight = random_weight(rows, cols, density, block)
    grad, x = operands(weight, columns, 2, layout)
    bias = torch.randn(rows)
    pattern = trained(weight)
    values = weight.values.clone()
    for _ in range(2):  # with changed values, as after a step
        values = (values * 1.5).requires_grad_()
        results = []
        for dtype in (torch.float32, torch.float64):  # native, reference
            inputs = [t.detach().to(dtype).requires_grad_() for t in (x, values, bias)]
            y = pattern.multiply(inputs[0], inputs[1], inputs[2], layout)
            results.append([y, *torch.autograd.grad(y, inputs, grad.to(dtype))])
        for got, expected in zip(*results, strict=True):
            scale = 1e-4 * (1 + float(expected.detach().abs().max() if expected.numel() else 0))
            assert got.shape == expected.shape
            assert ((got - expected).abs() <= scale).all()


@needs_native
def test_every_variant_gives_the_same_training() -> None:
    """The variant changes from call to call while the fastest is looked for."""
    weight = random_weight(96, 200, 0.1, 1)
    grad, x = operands(weight, 80, 1, "tokens")
    pattern = trained(weight)
    seen = []
    for _ in range(30):
        inputs = x.clone().requires_grad_(), weight.values.clone().requires_grad_()
        y = pattern.multiply(*inputs)
        seen.append((y, *torch.autograd.grad(y, inputs, grad)))
    for result in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, seen[0], strict=True))


@needs_native
@pytest.mark.parametrize("layout", ["channels", "tokens"])
def test_two_threads_give_the_same_training(layout: str) -> None:
    weight = random_weight(600, 130, 0.1, 1)
    grad, x = operands(weight, 90, 2, layout)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            pattern = trained(weight)
            inputs = x.clone().requires_grad_(), weight.values.clone().requires_grad_()
            y = pattern.multiply(*inputs, None, layout)
            results.append((y, *torch.autograd.grad(y, inputs, grad)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_reference_path_is_differentiable_in_double() -> None:
    pattern = trained(random_weight(6, 5, 0.5, 1))
    shapes = (3, 5), (pattern.num_values,), (6,)
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(pattern.multiply, inputs)
    assert torch.autograd.gradgradcheck(pattern.multiply, inputs)


def test_values_changed_behind_autograds_back_are_seen() -> None:
    weight = random_weight(6, 5, 0.5, 1)
    pattern, values = trained(weight), weight.values.clone().requires_grad_()
    x = torch.randn(4, 5)
    pattern.multiply(x, values)
    values.data.mul_(3)  # leaves the version counter alone
    changed = BlockRowWeight(values.detach(), weight.columns, weight.row_ptr, weight.shape, 1)
    expected = spmm_reference(x, changed, layout="tokens")
    torch.testing.assert_close(pattern.multiply(x, values).detach(), expected)


def test_trained_pattern_names_bad_arguments() -> None:
    weight = random_weight(6, 5, 0.5, 1)
    pattern = trained(weight)
    with pytest.raises(ValueError, match="row_ptr"):
        TrainedPattern(weight.columns, weight.row_ptr[:-1], (6, 5), 1)
    with pytest.raises(ValueError, match="block=3"):
        TrainedPattern(weight.columns, weight.row_ptr, (6, 5), 3)
    with pytest.raises(ValueError, match="columns"):
        TrainedPattern(weight.columns + 5, weight.row_ptr, (6, 5), 1)
    with pytest.raises(ValueError, match=r"values: shape \(1,\)"):
        pattern.multiply(torch.zeros(2, 5), torch.zeros(1))
    with pytest.raises(ValueError, match=r"bias: shape \(5,\)"):
        pattern.multiply(torch.zeros(2, 5), weight.values, torch.zeros(5))
    with pytest.raises(ValueError, match="layout='rows'"):
        pattern.multiply(torch.zeros(2, 5), weight.values, layout="rows")


@needs_native
def test_only_updatable_weights_are_updated() -> None:
    weight = random_weight(6, 5, 0.5, 1)
    stream = kernels.native_weight(weight, kernels.default_variant(weight, 8), 8)
    with pytest.raises(ValueError, match="updatable"):
        stream.update(weight.values.data_ptr())
