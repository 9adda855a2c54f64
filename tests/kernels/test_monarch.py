"""Transforms as matrix products: the same numbers as torch.fft, whatever the factors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aerogel.kernels import FrequencyMask, fft_conv_reference
from aerogel.kernels.monarch import FFTConvPlan, monarch_conv, monarch_factors

FACTORS = ((16, 16), (4, 4, 4, 4), (32, 32), (16, 32), (32, 16), (10, 10, 10), (24, 16, 16), (7, 3))


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("part", [1.0, 0.5, 0.3])
def test_spectrum_is_that_of_torch_permuted(factors: tuple[int, ...], part: float) -> None:
    n = torch.Size(factors).numel()
    x = torch.randn(2, max(1, int(part * n)), dtype=torch.float64)
    plan = FFTConvPlan(n, factors, torch.float64)
    y = plan.forward(x)
    order = tuple(reversed(range(1, len(factors) + 1)))
    expected = torch.fft.fft(x, n=n).reshape(2, *reversed(factors)).permute(0, *order)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    assert torch.allclose(plan.inverse(y, x.shape[1]).real, x, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    n=st.sampled_from((256, 512, 1000, 1024, 4096, 6144)),
    padded=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    hybrid=st.booleans(),
)
def test_convolution_matches_torch(n: int, padded: bool, dtype: torch.dtype, hybrid: bool) -> None:
    length = n // 2 if padded else n
    u, k = torch.randn(2, 3, length, dtype=dtype), torch.randn(3, length, dtype=dtype)
    expected = fft_conv_reference(u.double(), k.double(), n=n, causal=False)
    got = monarch_conv(u, k, n, hybrid=hybrid).double()
    tolerance = 1e-10 if dtype is torch.float64 else 1e-5
    assert float((got - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("zeros", [(0, 0, 0), (6, 0, 0), (7, 3, 0), (0, 4, 15)])
def test_blocks_left_out_equal_masked_frequencies(zeros: tuple[int, ...], hybrid: bool) -> None:
    mask = FrequencyMask((8, 8, 16), zeros)
    u, k = torch.randn(2, 3, 500, dtype=torch.float64), torch.randn(3, 512, dtype=torch.float64)
    expected = fft_conv_reference(u, k, n=1024, mask=mask)
    got = monarch_conv(u, k, 1024, mask, hybrid=hybrid)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_gradients_are_right() -> None:
    u = torch.randn(1, 2, 12, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    mask = FrequencyMask((6, 4), (3, 1))
    assert torch.autograd.gradcheck(lambda u, k: monarch_conv(u, k, 24, mask), (u, k))


@settings(max_examples=100, deadline=None)
@given(power=st.integers(0, 22), order=st.integers(1, 4))
def test_powers_of_two_have_factors(power: int, order: int) -> None:
    factors = monarch_factors(1 << power, order)
    assert torch.Size(factors).numel() == 1 << power
    assert max(factors) <= 128


def test_bad_factors_are_named() -> None:
    with pytest.raises(ValueError, match="n=262: expected a product"):
        monarch_factors(262)
    with pytest.raises(ValueError, match=r"factors=\(5, 5\)"):
        FFTConvPlan(24, (5, 5))
    with pytest.raises(ValueError, match=r"factors=\(256,\)"):
        FFTConvPlan(256, (256,))
