"""N:M weights on vectors: against torch for every pattern, type, shape and instruction set."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from aerogel import kernels
from aerogel.kernels import BlockRowWeight, PlanBuilder, gemv, native_nm_weight, nm_pattern
from aerogel.sparsity import NM

pytestmark = pytest.mark.skipif(not kernels.native_available(), reason="no native library")
PATTERNS = [(1, 4), (2, 4), (1, 8), (2, 8)]
DTYPES = [torch.float32, torch.bfloat16, torch.int8]


@pytest.fixture(params=kernels.available_isas() if kernels.native_available() else [])
def isa(request):
    before = kernels.isa()
    kernels.set_isa(request.param)
    yield request.param
    kernels.set_isa(before)


def pruned(rows, cols, n, m, seed=0):
    """Dense (rows, cols) with n of every m kept; the last group of a row may be short."""
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    return weight * NM(n, m, pad=True).select(weight.abs())


def close(actual, expected):
    scale = float(expected.abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6 * max(scale, 1.0))


@settings(max_examples=120, deadline=None)
@given(
    rows=st.integers(1, 80),
    cols=st.integers(1, 150),
    pattern=st.sampled_from(PATTERNS),
    dtype=st.sampled_from(DTYPES),
    tokens=st.integers(0, 19),
    threads=st.integers(1, 2),
    activation=st.sampled_from(["none", "relu", "gelu"]),
    has=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 99),
)
def test_products_are_those_of_torch(
    rows, cols, pattern, dtype, tokens, threads, activation, has, seed
):
    weight = pruned(rows, cols, *pattern, seed)
    packed = BlockRowWeight.pack(weight, 1, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, cols, generator=generator)
    bias = torch.randn(rows, generator=generator) if has[0] else None
    residual = torch.randn(tokens, rows, generator=generator) if has[1] else None
    for name in kernels.available_isas():
        before = kernels.isa()
        kernels.set_isa(name)
        try:
            y = gemv(x, packed, bias, activation=activation, residual=residual, threads=threads)
        finally:
            kernels.set_isa(before)
        expected = F.linear(x, packed.dense(torch.float32), bias)
        expected = expected if residual is None else expected + residual
        close(y, kernels.reference_activation(expected, activation))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_stream_is_as_small_as_the_pattern_allows(isa, pattern, dtype):
    n, m = pattern
    packed = BlockRowWeight.pack(pruned(64, 640, n, m), 1, dtype=dtype)
    assert nm_pattern(packed) == pattern
    slots = {4: 16, 8: 10}[m]
    kept = 64 * 640 * n // m
    scales = 4 * 64 if dtype is torch.int8 else 0
    size = native_nm_weight(packed, n, m).nbytes
    assert size == kept * (packed.values.element_size() + 4 / slots) + scales
    assert size < kernels.native_gemv_weight(packed).nbytes


def test_results_do_not_depend_on_threads(isa):
    packed = BlockRowWeight.pack(pruned(700, 300, 2, 4), 1)
    x = torch.randn(3, 300)
    assert torch.equal(gemv(x, packed, threads=1), gemv(x, packed, threads=2))


def test_extreme_rows_and_tokens(isa):
    weight = pruned(40, 64, 2, 4)
    weight[3] = 0.0
    weight[7] = 1e38 * (weight[7] != 0)
    packed = BlockRowWeight.pack(weight, 1)
    assert nm_pattern(packed, 0.5) == (2, 4)
    x = torch.randn(1, 64)
    x[0, 0] = 0.0
    close(gemv(x, packed)[:, :3], F.linear(x, weight)[:, :3])
    assert float(gemv(x, packed)[0, 3]) == 0.0
    empty = BlockRowWeight.pack(torch.zeros(8, 16), 1)
    assert nm_pattern(empty) is None
    assert torch.equal(gemv(x[:, :16], empty), torch.zeros(1, 8))


def test_nan_and_infinities_reach_the_outputs_that_store_their_group(isa):
    weight = torch.zeros(20, 16)
    weight[0, 1] = weight[0, 6] = 2.0  # one of two slots in two groups
    weight[1, 8] = weight[1, 9] = 3.0
    weight[2:, ::4] = 1.0
    packed = BlockRowWeight.pack(weight, 1)
    stream = native_nm_weight(packed, 2, 4)
    assert stream.nbytes > 0
    for value in (float("nan"), float("inf")):
        x = torch.ones(1, 16)
        x[0, 6] = value
        y = gemv(x, packed)
        assert not torch.isfinite(y[0, 0])
        assert torch.isfinite(y[0, 1:]).all()


def test_a_pattern_is_found_only_where_groups_are_full():
    full = pruned(16, 64, 2, 4)
    assert nm_pattern(BlockRowWeight.pack(full, 1)) == (2, 4)
    assert nm_pattern(BlockRowWeight.pack(pruned(16, 64, 1, 8), 1)) == (1, 8)
    assert nm_pattern(BlockRowWeight.pack(torch.randn(16, 64), 1)) is None
    sparse = full * (torch.rand(16, 64) < 0.3)
    assert nm_pattern(BlockRowWeight.pack(sparse, 1)) is None
    assert nm_pattern(BlockRowWeight.pack(full, 2, 0.0)) is None


def test_what_does_not_fit_is_refused_by_name():
    packed = BlockRowWeight.pack(pruned(16, 64, 2, 4), 1)
    with pytest.raises(ValueError, match="output 0 has more than 1 of the inputs from"):
        native_nm_weight(packed, 1, 4)
    with pytest.raises(ValueError, match="pattern 3:4: expected 1:4, 2:4, 1:8 or 2:8"):
        native_nm_weight(packed, 3, 4)
    with pytest.raises(ValueError, match="has blocks of 2 rows"):
        native_nm_weight(BlockRowWeight.pack(torch.ones(16, 64), 2), 2, 4)


@pytest.mark.parametrize("cols", [64, 50])
def test_a_plan_runs_the_same_product(isa, cols):
    weight = pruned(300, cols, 2, 4)
    packed, bias, x = BlockRowWeight.pack(weight, 1), torch.randn(300), torch.randn(cols)
    expected = F.linear(x, weight, bias).relu()
    for threads in (1, 2):
        builder = PlanBuilder(threads=threads)
        builder.output(builder.gemv(builder.input((cols,)), packed, bias, activation="relu"))
        close(builder.build().run([x[None]])[0].flatten(), expected)
