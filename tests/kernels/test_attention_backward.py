"""Gradients of attention over streams of tiles, on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attention_cases import Case, cases, ragged_cases, random_case
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import needs_native
from torch import Tensor

from aerogel.kernels.attention import attention_backward, attention_forward
from aerogel.kernels.attention_reference import (
    attention_backward_reference,
    attention_forward_reference,
)

TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def output_gradients(case: Case, lse: Tensor, seed: int = 3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shape = (*case.q.shape[:3], case.v.shape[-1])
    dlse = torch.randn(case.q.shape[:3], generator=g)
    return torch.randn(shape, generator=g).to(case.q.dtype), dlse.masked_fill(lse.isinf(), 0.0)


def assert_gradients_right(case: Case, threads: int = 1) -> None:
    o, lse = attention_forward(*case.arguments(), **case.options)
    do, dlse = output_gradients(case, lse)
    got = attention_backward(*case.arguments(), o, lse, do, dlse, **case.options, threads=threads)
    wide = case.to(torch.float64)
    exact = o.double(), lse.double(), do.double(), dlse.double()
    expected = attention_backward_reference(*wide.arguments(), *exact, **case.options)
    for name, x, y in zip(("dq", "dk", "dv", "dbias"), got, expected, strict=True):
        if y is None:
            assert x is None
            continue
        tolerance = TOLERANCES[torch.float32 if name == "dbias" else case.q.dtype]
        size = float(y.abs().max()) if y.numel() else 0.0
        assert x is not None
        assert x.dtype == (torch.float32 if name == "dbias" else case.q.dtype)
        torch.testing.assert_close(
            x.double(), y, rtol=tolerance, atol=tolerance * (1 + size), msg=lambda m, n=name: n + m
        )


@pytest.fixture
def memory_full_of_nan() -> Iterator[None]:
    """New tensors hold NaN until they are written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@needs_native
@pytest.mark.usefixtures("instruction_set", "memory_full_of_nan")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_keys_that_nobody_reads_have_gradients_of_zero(density: float, threads: int) -> None:
    assert_gradients_right(random_case(q_len=90, k_len=300, density=density), threads)
    assert_gradients_right(random_case(q_len=0, k_len=30, density=density), threads)


@needs_native
@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("scale", [0.0, -0.5, 2.0])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_know_the_scale(scale: float, bias: bool) -> None:
    case = random_case(bias=bias, dim=24)
    case.options["scale"] = scale
    assert_gradients_right(case)


@needs_native
@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("rows", [9, 16, 17, 61, 64])
@pytest.mark.parametrize("dim", [1, 7, 17, 24, 64, 80])
def test_gradients_of_blocks_of_any_height_and_width(rows: int, dim: int) -> None:
    for case in ragged_cases(rows, dim):
        assert_gradients_right(case)


@needs_native
@pytest.mark.usefixtures("instruction_set")
@settings(max_examples=60, deadline=None)
@given(case=cases(), dtype=st.sampled_from(list(TOLERANCES)), threads=st.integers(1, 5))
def test_gradients_match_a_dense_mask(case: Case, dtype: torch.dtype, threads: int) -> None:
    assert_gradients_right(case.to(dtype), threads)


@needs_native
@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("plan_heads", ["one", "kv", "q"])
def test_threads_change_no_bit_of_gradients(plan_heads: str) -> None:
    """Few heads and many threads share the work in another way than one thread does."""
    case = random_case(k_len=300, q_len=130, bias=True, plan_heads=plan_heads, dim=40, block_q=64)
    o, lse = attention_forward(*case.arguments(), **case.options)
    do, dlse = output_gradients(case, lse)
    results = [
        attention_backward(*case.arguments(), o, lse, do, dlse, **case.options, threads=threads)
        for threads in (1, 2, 3, 6)
    ]
    for other in results[1:]:
        assert all(a is b or torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


WEIGHTS = ({"linear": True}, {"dropout_p": 0.3, "seed": 7}, {"linear": True, "dropout_p": 0.5})


@needs_native
@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("q_len", [1, 70])
def test_linear_weights_and_dropout_match_a_dense_mask(weights: dict[str, Any], q_len: int) -> None:
    case = random_case(q_len=q_len, k_len=130, batch=2, window="one", padding=True, block_q=64)
    case.options |= weights
    o, lse = attention_forward(*case.arguments(), **case.options)
    wide = case.to(torch.float64)
    want, want_lse = attention_forward_reference(*wide.arguments(), **case.options)
    torch.testing.assert_close(o.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    for threads in (1, 3):
        assert_gradients_right(case, threads)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_reference_gradients_of_other_weights_are_those_of_autograd(
    weights: dict[str, Any],
) -> None:
    case = random_case(q_len=9, k_len=40, dim=5, value_dim=3, padding=True).to(torch.float64)
    case.options |= weights
    inputs = [x.requires_grad_() for x in (case.q, case.k, case.v)]
    o, lse = attention_forward_reference(*case.arguments(), **case.options)
    do, dlse = output_gradients(case, lse)
    seen = lse.masked_fill(lse.isinf(), 0.0)
    expected = torch.autograd.grad((o, seen), inputs, (do, dlse.double()))
    with torch.no_grad():
        got = attention_backward_reference(*case.arguments(), o, lse, do, dlse, **case.options)
    for x, y in zip(got, expected, strict=False):
        torch.testing.assert_close(x, y.to(x.dtype))


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sink", [False, True])
def test_reference_gradients_are_those_of_autograd(softcap: float | None, sink: bool) -> None:
    case = random_case(
        q_len=9, k_len=40, dim=5, value_dim=3, bias=True, softcap=softcap, sink=sink, padding=True
    ).to(torch.float64)
    case.stream[5] = case.stream[5].requires_grad_()
    inputs = [x.requires_grad_() for x in (case.q, case.k, case.v)]
    o, lse = attention_forward_reference(*case.arguments(), **case.options)
    do, dlse = output_gradients(case, lse)
    seen = lse.masked_fill(lse.isinf(), 0.0)
    expected = torch.autograd.grad((o, seen), [*inputs, case.stream[5]], (do, dlse.double()))
    with torch.no_grad():
        got = attention_backward_reference(*case.arguments(), o, lse, do, dlse, **case.options)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y.to(x.dtype))


@needs_native
@pytest.mark.usefixtures("instruction_set")
def test_gradients_are_the_slope_of_the_outputs() -> None:
    case = random_case(heads=(4, 2), q_len=40, softcap=3.0, sink=True)
    o, lse = attention_forward(*case.arguments(), **case.options)
    do, dlse = output_gradients(case, lse)
    gradients = attention_backward(*case.arguments(), o, lse, do, dlse, **case.options)
    g = torch.Generator().manual_seed(5)
    for name, gradient in zip(("q", "k", "v"), gradients, strict=False):
        direction = torch.randn(gradient.shape, generator=g)
        values = []
        for step in (-1e-2, 1e-2):
            moved = random_case(heads=(4, 2), q_len=40, softcap=3.0, sink=True)
            setattr(moved, name, getattr(moved, name) + step * direction)
            at, at_lse = attention_forward(*moved.arguments(), **moved.options)
            seen = at_lse.masked_fill(at_lse.isinf(), 0.0)
            values.append(float((at * do).double().sum() + (seen * dlse).double().sum()))
        slope = (values[1] - values[0]) / 2e-2
        expected = float((gradient * direction).double().sum())
        assert slope == pytest.approx(expected, rel=1e-2, abs=2e-2)


@needs_native
@pytest.mark.parametrize("layout", ["plain", "columns"])
def test_queries_without_keys_have_no_gradient(layout: str) -> None:
    case = random_case(density=0.0, layout=layout, bias=True)
    o, lse = attention_forward(*case.arguments(), **case.options)
    do, dlse = torch.ones_like(o), torch.ones_like(lse)
    for gradient in attention_backward(*case.arguments(), o, lse, do, dlse, **case.options):
        assert gradient is not None
        assert not gradient.any()


@needs_native
def test_padded_keys_have_no_gradient_and_are_never_read() -> None:
    case = random_case(padding=True, batch=2)
    absent = ~case.options["key_padding"][:, None].expand(case.k.shape[:3])
    case.k[absent], case.v[absent] = torch.nan, torch.nan
    o, lse = attention_forward(*case.arguments(), **case.options)
    do, _ = output_gradients(case, lse)
    dq, dk, dv, _ = attention_backward(*case.arguments(), o, lse, do, **case.options)
    assert dq.isfinite().all()
    assert not dk[absent].any()
    assert not dv[absent].any()
    assert dk.isfinite().all()


@pytest.mark.parametrize("name", ["o", "lse", "do", "dlse"])
def test_results_of_another_call_are_refused(name: str) -> None:
    case = random_case(q_len=7)
    o, lse = attention_forward(*case.arguments(), **case.options)
    results = {"o": o, "lse": lse, "do": o, "dlse": lse}
    results[name] = results[name][:, :, :3]
    with pytest.raises(ValueError, match=f"{name}: shape"):
        attention_backward(*case.arguments(), *results.values(), **case.options)
