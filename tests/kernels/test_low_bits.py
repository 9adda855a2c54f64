"""Weights stored in bfloat16 and int8: packing, the operators, and every kernel that takes them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aerogel import kernels
from aerogel.kernels import (
    BlockRowWeight,
    PlanBuilder,
    gemv,
    gemv_reference,
    quantize_rows,
    sparse_conv2d,
    sparse_conv2d_reference,
    sparse_input_linear,
    sparse_input_linear_reference,
    spmm,
    spmm_reference,
)

LOW = (torch.bfloat16, torch.int8)


def sparse(rows: int, cols: int, density: float = 0.3) -> Tensor:
    return torch.randn(rows, cols) * (torch.rand(rows, cols) < density)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 20),
    cols=st.integers(0, 20),
    magnitude=st.sampled_from([1e-38, 1e-3, 1.0, 1e30]),
)
def test_int8_is_within_half_a_step_of_each_row(rows: int, cols: int, magnitude: float) -> None:
    weight = sparse(rows, cols, 0.5) * magnitude
    levels, scales = quantize_rows(weight)
    assert levels.dtype == torch.int8
    assert (scales > 0).all()
    off = (levels.double() * scales[:, None].double() - weight.double()).abs()
    # A scale among the denormals is itself rounded, and that error counts 127 times.
    assert (off <= 0.5001 * scales[:, None].double() + 127 * 1.5e-45).all()
    if cols:
        largest = weight.abs().amax(1)
        assert ((levels.abs().amax(1) == 127) | (largest < 1e-36)).all()


@pytest.mark.parametrize("block", [1, 2, 4])
def test_what_rounds_to_zero_stays_stored(block: int) -> None:
    dense = torch.zeros(6, 8)
    dense[:, 2], dense[:, 5] = 1.0, 1e-6
    packed = BlockRowWeight.pack(dense, block, dtype=torch.int8)
    values, mask = packed.stored()
    assert torch.equal(mask, dense != 0)
    assert values.dtype == torch.int8
    assert (values[:, 5] == 0).all()
    torch.testing.assert_close(packed.unpack(), torch.where(dense == 1.0, dense, 0.0))


def test_values_take_the_room_of_their_type() -> None:
    dense = sparse(64, 64)
    full = BlockRowWeight.pack(dense, 1)
    for dtype, item in ((torch.bfloat16, 2), (torch.int8, 1)):
        packed = BlockRowWeight.pack(dense, 1, dtype=dtype)
        assert packed.values.dtype == dtype
        saved = full.nbytes - packed.nbytes
        scales = 0 if packed.scales is None else 4 * 64
        assert saved == (4 - item) * full.values.numel() - scales


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_tensors_of_a_packed_weight_rebuild_it(dtype: torch.dtype) -> None:
    packed = BlockRowWeight.pack(sparse(9, 7), 2, dtype=dtype)
    again = BlockRowWeight.from_tensors(packed.to_tensors())
    assert torch.equal(again.unpack(), packed.unpack())
    assert torch.equal(packed.without_cache().unpack(), packed.unpack())


def test_int8_weights_are_packed_as_they_are() -> None:
    levels, scales = quantize_rows(sparse(9, 7))
    for given_scales in (scales, scales[:, None]):
        packed = BlockRowWeight.pack(levels, 1, scales=given_scales)
        assert torch.equal(packed.unpack(), levels.float() * scales[:, None])


def test_masks_keep_zeros_stored() -> None:
    dense, mask = torch.zeros(4, 6), torch.zeros(4, 6, dtype=torch.bool)
    dense[0, 1], mask[2, 3] = 5.0, True
    packed = BlockRowWeight.pack(dense, 1, mask=mask)
    assert torch.equal(packed.stored()[1], mask | (dense != 0))
    assert torch.equal(packed.unpack(), dense)


INT8 = torch.ones(2, 3, dtype=torch.int8)
BAD_PACKS = {
    "weight: expected a floating point tensor, or int8 with scales": (TypeError, INT8, {}),
    "dtype=torch.int32: expected a floating": (TypeError, torch.ones(2, 3), {"dtype": torch.int32}),
    "scales: torch.float32 of shape (3,), expected float32 (2,)": (
        ValueError, INT8, {"scales": torch.ones(3)},
    ),
    "scales: expected None for values in": (
        ValueError, torch.ones(2, 3), {"scales": torch.ones(2)},
    ),
    "dtype=torch.float32: expected None for a weight that is int8": (
        ValueError, INT8, {"scales": torch.ones(2), "dtype": torch.float32},
    ),
    "weight: has infinite values or NaN": (
        ValueError, torch.full((2, 3), float("inf")), {"dtype": torch.int8},
    ),
    "mask: torch.float32 of shape (2, 3), expected bool": (
        ValueError, torch.ones(2, 3), {"mask": torch.ones(2, 3)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", list(BAD_PACKS))
def test_what_cannot_be_packed_is_named(message: str) -> None:
    error, weight, options = BAD_PACKS[message]
    with pytest.raises(error) as raised:
        BlockRowWeight.pack(weight, **options)
    assert message in str(raised.value)


def test_missing_scales_are_named() -> None:
    parts = BlockRowWeight.pack(sparse(5, 4), 1, dtype=torch.int8).to_tensors()
    del parts["scales"]
    with pytest.raises(ValueError, match=r"scales: expected float32 \(5,\)"):
        BlockRowWeight.from_tensors(parts)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("layout", ["channels", "tokens"])
def test_spmm_takes_them(dtype: torch.dtype, block: int, layout: str) -> None:
    packed = BlockRowWeight.pack(sparse(22, 18), block, dtype=dtype)
    x = torch.randn((2, 18, 5, 5) if layout == "channels" else (2, 9, 18))
    bias = torch.randn(22)
    torch.testing.assert_close(
        spmm(x, packed, bias, activation="relu", layout=layout),
        spmm_reference(x, packed, bias, activation="relu", layout=layout),
    )


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_sparse_convolutions_take_them(dtype: torch.dtype) -> None:
    packed = BlockRowWeight.pack(sparse(8, 6 * 9), 1, dtype=dtype)
    x = torch.randn(1, 6, 7, 7)
    how = {"kernel_size": 3, "padding": 1}
    torch.testing.assert_close(
        sparse_conv2d(x, packed, **how), sparse_conv2d_reference(x, packed, **how)
    )


def test_bfloat16_weights_still_multiply_bfloat16_activations() -> None:
    packed = BlockRowWeight.pack(sparse(22, 18).bfloat16(), 1)
    x = torch.randn(3, 18).bfloat16()
    got = gemv(x, packed)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, x @ packed.unpack().t())


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_plans_take_them(dtype: torch.dtype, residual: bool) -> None:
    torch.manual_seed(0)
    first = BlockRowWeight.pack(sparse(700, 90), 1, dtype=dtype)
    second = BlockRowWeight.pack(sparse(90, 700), 4, dtype=dtype)
    bias = torch.randn(700)
    # A sum of K products is off by about sqrt(K) roundings (6e-8) of its largest partial sum:
    # 14 x 60 x 6e-8 = 5e-5 for the second layer's 210, 5 x 500 x 6e-8 = 1.5e-4 for the third's 27,
    # which has larger terms. Where these cancel, only the absolute tolerance is left: twice that.
    near = {"atol": 3e-4, "rtol": 1e-4}
    for batch, threads in ((1, 1), (1, 2), (3, 2)):
        builder = PlanBuilder(batch=batch, threads=threads)
        x = builder.input((90,))
        y = builder.gemv(x, first, bias, activation="gelu")
        y = builder.gemv(y, second, residual=x if residual else None)
        z = builder.sparse_conv1x1(y, first)
        builder.output(y)
        builder.output(z)
        vectors = torch.randn(batch, 90)
        hidden = gemv_reference(vectors, first, bias, activation="gelu")
        expected = gemv_reference(hidden, second, residual=vectors if residual else None)
        got, again = builder.build().run([vectors])
        torch.testing.assert_close(got, expected, **near)
        torch.testing.assert_close(again, gemv_reference(got, first), **near)


def test_a_plan_names_a_vector_that_does_not_fit() -> None:
    builder = PlanBuilder()
    with pytest.raises(ValueError, match=r"x: shape \(7,\), expected \(4,\)"):
        builder.gemv(builder.input((7,)), BlockRowWeight.pack(sparse(5, 4), 1))


def gemv_arguments(dtype: torch.dtype, grad: bool) -> tuple:
    w = BlockRowWeight.pack(sparse(6, 5), 1, dtype=dtype)
    x, bias = torch.randn(2, 5, requires_grad=grad), torch.randn(6, requires_grad=grad)
    residual = torch.randn(2, 6, requires_grad=grad)
    parts = (w.values, w.scales, w.columns, w.row_ptr, *w.shape, w.block)
    return (x, *parts, bias, residual, "silu")


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_gemv_passes_opcheck(dtype: torch.dtype) -> None:
    torch.library.opcheck(torch.ops.aerogel.gemv.default, gemv_arguments(dtype, True))


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_sparse_input_linear_passes_opcheck(dtype: torch.dtype) -> None:
    weight, scales = torch.randn(6, 5), None
    if dtype is torch.int8:
        weight, scales = quantize_rows(weight)
    x = torch.randn(2, 5, requires_grad=True)
    bias, residual = torch.randn(6, requires_grad=True), torch.randn(2, 6)
    arguments = (x, weight.t().to(dtype).contiguous(), bias, scales, residual, 0.2, "gelu")
    torch.library.opcheck(torch.ops.aerogel.sparse_input_linear.default, arguments)


@pytest.mark.parametrize("activation", ["none", "silu", "sigmoid"])
def test_operators_have_the_gradients_of_their_references(activation: str) -> None:
    weight = BlockRowWeight.pack(sparse(6, 5), 1, dtype=torch.int8)
    dense_t = torch.randn(5, 6)
    x, bias = torch.randn(2, 3, 5, requires_grad=True), torch.randn(6, requires_grad=True)
    residual = torch.randn(2, 3, 6, requires_grad=True)
    parts = (weight.values, weight.scales, weight.columns, weight.row_ptr, *weight.shape, 1)
    pairs = (
        (
            torch.ops.aerogel.gemv(x, *parts, bias, residual, activation),
            gemv_reference(x, weight, bias, residual=residual, activation=activation),
        ),
        (
            torch.ops.aerogel.sparse_input_linear(
                x, dense_t, bias, None, residual, 0.4, activation
            ),
            sparse_input_linear_reference(
                x, dense_t, bias, residual=residual, threshold=0.4, activation=activation
            ),
        ),
    )
    for got, expected in pairs:
        inputs = (x, bias, residual)
        mine = torch.autograd.grad(got.square().sum(), inputs)
        theirs = torch.autograd.grad(expected.square().sum(), inputs)
        torch.testing.assert_close(mine, theirs)


def test_gradients_flow_through_the_faces() -> None:
    weight = BlockRowWeight.pack(sparse(6, 5), 1, dtype=torch.bfloat16)
    x, dense_t = torch.randn(2, 5, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    (got,) = torch.autograd.grad(gemv(x, weight, activation="silu").sum(), x)
    (expected,) = torch.autograd.grad(gemv_reference(x, weight, activation="silu").sum(), x)
    torch.testing.assert_close(got, expected)
    of_x, of_w = torch.autograd.grad(
        sparse_input_linear(x, dense_t, threshold=0.5).sum(), (x, dense_t)
    )
    assert torch.equal(of_x == 0, x.abs() <= 0.5)
    assert of_w.shape == dense_t.shape


def test_exported_programs_keep_the_operators() -> None:
    packed = BlockRowWeight.pack(sparse(6, 5), 1, dtype=torch.int8)
    weight_t = torch.randn(6, 5)

    class Block(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return sparse_input_linear(gemv(x, packed, activation="relu"), weight_t)

    x = torch.randn(2, 5)
    program = torch.export.export(Block(), (x,))
    for name in ("aerogel.gemv", "aerogel.sparse_input_linear"):
        assert name in program.graph_module.code
    torch.testing.assert_close(program.module()(x), Block()(x))


def test_references_run_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AEROGEL_KERNELS", "reference")
    packed = BlockRowWeight.pack(sparse(6, 5), 1, dtype=torch.int8)
    x, weight_t = torch.randn(2, 5), torch.randn(5, 6)
    assert torch.equal(gemv(x, packed), gemv_reference(x, packed))
    assert torch.equal(sparse_input_linear(x, weight_t), sparse_input_linear_reference(x, weight_t))
    assert kernels.reference_mode()
