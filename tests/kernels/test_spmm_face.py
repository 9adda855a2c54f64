"""The sparse product as a PyTorch operator, its errors, and the library behind it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from instruction_sets import needs_native
from torch import Tensor

from aerogel import kernels
from aerogel.kernels import BlockRowWeight, SpmmVariant, spmm, spmm_reference


def weight_of(rows: int, cols: int, block: int = 1, dtype: torch.dtype = torch.float32):
    torch.manual_seed(rows * 100 + cols)
    dense = torch.randn(rows, cols, dtype=dtype)
    return BlockRowWeight.pack(dense * (torch.rand(rows, cols) < 0.5), block)


def operator_arguments(
    x: Tensor, weight: BlockRowWeight, bias: Tensor | None, residual: Tensor | None, *rest: str
) -> tuple:
    parts = (weight.values, weight.columns, weight.row_ptr, *weight.shape, weight.block)
    return (x, *parts, bias, residual, *rest)


@pytest.mark.parametrize("layout", ["channels", "tokens"])
@pytest.mark.parametrize("block", [1, 4])
def test_operator_passes_opcheck(layout: str, block: int) -> None:
    weight = weight_of(6, 5, block)
    weight.values.requires_grad_()
    x = torch.randn((2, 5, 3, 3) if layout == "channels" else (2, 3, 5), requires_grad=True)
    bias = torch.randn(6, requires_grad=True)
    arguments = operator_arguments(x, weight, bias, None, "silu", layout)
    torch.library.opcheck(torch.ops.aerogel.spmm.default, arguments)


@pytest.mark.parametrize("activation", sorted(kernels.ACTIVATIONS))
@pytest.mark.parametrize("layout", ["channels", "tokens"])
def test_gradients_are_right(activation: str, layout: str) -> None:
    weight = weight_of(5, 4, 2, torch.float64)
    weight.values.requires_grad_()
    shape, out = ((2, 4, 3), (2, 5, 3)) if layout == "channels" else ((2, 3, 4), (2, 3, 5))
    x, residual, bias = (torch.randn(s, dtype=torch.float64) for s in (shape, out, (5,)))
    inputs = tuple(t.requires_grad_() for t in (x, weight.values, bias, residual))

    def call(x: Tensor, values: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        packed = BlockRowWeight(values, weight.columns, weight.row_ptr, weight.shape, 2)
        return spmm(x, packed, bias, residual=residual, activation=activation, layout=layout)

    assert torch.autograd.gradcheck(call, inputs)


def test_gradients_agree_with_the_dense_layer_in_float32() -> None:
    weight = weight_of(8, 6)
    x, bias = torch.randn(2, 6, 5, 5, requires_grad=True), torch.randn(8, requires_grad=True)
    dense = weight.unpack().requires_grad_()
    values = weight.values.clone().requires_grad_()
    packed = BlockRowWeight(values, weight.columns, weight.row_ptr, weight.shape, 1)
    sparse_loss = spmm(x, packed, bias, activation="relu").square().sum()
    sparse = torch.autograd.grad(sparse_loss, (x, bias, values))
    loss = torch.relu(torch.nn.functional.conv2d(x, dense[..., None, None], bias)).square().sum()
    expected = torch.autograd.grad(loss, (x, bias, dense))
    torch.testing.assert_close(sparse[:2], expected[:2])
    torch.testing.assert_close(sparse[2], expected[2][weight.unpack() != 0])


def test_an_optimizer_step_is_seen_by_the_next_call() -> None:
    weight = weight_of(4, 4)
    x = torch.randn(1, 4, 3)
    values = weight.values.clone().requires_grad_()
    packed = BlockRowWeight(values, weight.columns, weight.row_ptr, weight.shape, 1)
    before = spmm(x, packed)
    for factor in (2, 4):
        with torch.no_grad():
            values.mul_(2)
            torch.testing.assert_close(spmm(x, packed), before.detach() * factor)
        torch.testing.assert_close(spmm(x, packed), before * factor)


def test_exported_programs_keep_the_operator() -> None:
    weight = weight_of(6, 5)

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return spmm(x, weight, activation="relu")

    x = torch.randn(2, 5, 4)
    program = torch.export.export(Layer(), (x,))
    assert "aerogel.spmm" in program.graph_module.code
    torch.testing.assert_close(program.module()(x), spmm_reference(x, weight, activation="relu"))


BAD_CALLS = {
    "x: shape (2, 4, 3), expected (batch, 5, *spatial)": {"x": torch.ones(2, 4, 3)},
    "x: shape (5,), expected (batch, 5, *spatial)": {"x": torch.ones(5)},
    "x: shape (2, 4), expected (*, 5)": {"x": torch.ones(2, 4), "layout": "tokens"},
    "bias: shape (5,), expected (6,)": {"bias": torch.ones(5)},
    "residual: shape (2, 5, 3), expected (2, 6, 3)": {"residual": torch.ones(2, 5, 3)},
    "did you mean 'relu'": {"activation": "reul"},
    "layout='nhwc': expected one of channels, tokens": {"layout": "nhwc"},
    "threads=0: expected at least 1": {"threads": 0},
    "out: torch.float32 of shape (1,)": {"out": torch.ones(1)},
    "groups=3: expected one of 1, 2, 4": {"variant": SpmmVariant(4, 3)},
    "groups=16: expected one of 1, 2, 4, ": {"variant": SpmmVariant(1, 16, pack=True)},
    "vectors=99: expected 1 to": {"variant": SpmmVariant(99)},
    "k_blocks=0": {"variant": SpmmVariant(1, k_blocks=0)},
    "row_tiles=0": {"variant": SpmmVariant(1, row_tiles=0)},
    "column_tiles=0: expected 1 to": {"variant": SpmmVariant(1, column_tiles=0)},
}


@needs_native
@pytest.mark.parametrize("message", list(BAD_CALLS))
def test_arguments_that_do_not_fit_are_named(message: str) -> None:
    arguments = {"x": torch.ones(2, 5, 3), "weight": weight_of(6, 5), **BAD_CALLS[message]}
    with pytest.raises(ValueError) as caught:
        spmm(**arguments)
    assert message in str(caught.value)


@needs_native
def test_damaged_weights_never_reach_a_kernel() -> None:
    weight = weight_of(3, 3)
    columns = torch.full_like(weight.columns, 77)
    damaged = BlockRowWeight(weight.values, columns, weight.row_ptr, weight.shape, 1)
    with pytest.raises(ValueError, match="columns: expected indices from 0 to 2"):
        spmm(torch.ones(1, 3, 4), damaged)
    with pytest.raises(ValueError, match="columns"):
        torch.ops.aerogel.spmm(
            *operator_arguments(torch.ones(1, 3, 4), damaged, None, None, "none", "channels")
        )


@needs_native
def test_instruction_sets_are_chosen_by_name() -> None:
    names = kernels.available_isas()
    assert names[-1] == "generic"
    assert kernels.isa() in names
    with pytest.raises(ValueError, match=r"'sse9' is not available here; available: .*generic"):
        kernels.set_isa("sse9")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@needs_native
def test_environment_picks_the_instruction_set() -> None:
    code = "from aerogel import kernels; print(kernels.isa())"
    assert run_python(code, AEROGEL_ISA="generic").stdout.strip() == "generic"


def test_a_missing_library_leaves_the_references() -> None:
    code = (
        "import torch; from aerogel import kernels;"
        "w = kernels.BlockRowWeight.pack(torch.eye(3));"
        "print(kernels.native_available(), kernels.spmm(torch.ones(1, 3, 2), w).sum().item());"
        "kernels.isa()"
    )
    result = run_python(code, AEROGEL_NATIVE="/nowhere/_native.so")
    assert result.stdout.split() == ["False", "6.0"], result.stderr
    assert "native kernels could not be loaded" in result.stderr


def test_unknown_kernel_mode_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AEROGEL_KERNELS", "refrence")
    with pytest.raises(ValueError, match="AEROGEL_KERNELS='refrence'"):
        kernels.reference_mode()
    with pytest.raises(ValueError, match="AEROGEL_KERNELS='refrence'"):
        kernels.native_in_use()


def test_unknown_kernel_mode_is_named_without_the_library_too() -> None:
    code = "from aerogel import kernels; kernels.native_in_use()"
    result = run_python(code, AEROGEL_NATIVE="/nowhere/_native.so", AEROGEL_KERNELS="refrence")
    assert "ValueError: AEROGEL_KERNELS='refrence'" in result.stderr


@needs_native
def test_roofline_reports_plausible_ceilings() -> None:
    found = kernels.roofline(1, seconds=0.02)
    assert found.isa == kernels.isa()
    assert min(found.load_gbps_l1, found.load_gbps_l2, found.load_gbps_dram) > 0.1
    if "AEROGEL_NATIVE" not in os.environ:  # a sanitizer's checks outweigh the loads they guard
        assert found.fma_gflops > 1
        assert found.load_gbps_l1 > found.load_gbps_dram
    with pytest.raises(ValueError, match="threads=0"):
        kernels.roofline(0)


def test_ops_do_not_ask_whether_another_thread_is_compiling(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = torch.randn(8, 16) * (torch.rand(8, 16) < 0.4)
    packed, x = kernels.BlockRowWeight.pack(weight, 1), torch.randn(3, 16)
    expected = x @ weight.t()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(kernels.spmm(x, packed, layout="tokens"), expected)
    torch.testing.assert_close(kernels.gemv(x, packed), expected)
    dense = kernels.sparse_input_linear(x, weight.t().contiguous())
    torch.testing.assert_close(dense, expected)
