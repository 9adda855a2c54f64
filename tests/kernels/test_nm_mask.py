"""The n largest of every m: the native choice against a stable sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import needs_native

from aerogel.kernels import nm_mask, nm_mask_reference

QUICK = settings(max_examples=60, deadline=None)


def few_levels(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Scores with many ties, both zeros and infinities."""
    levels = torch.tensor([-torch.inf, -2.5, -0.0, 0.0, 1e-38, 1.0, 3e38, torch.inf])
    choice = torch.randint(8, shape, generator=torch.Generator().manual_seed(seed))
    return levels[choice]


@needs_native
@pytest.mark.parametrize("m", [1, 2, 3, 4, 8, 13, 16, 32, 64])
def test_every_isa_keeps_what_a_stable_sort_puts_first(instruction_set, m):
    for n in sorted({1, 2, m // 3, m // 2, m - 1, m} & set(range(1, m + 1))):
        for shape, axis in (((33, 3 * m + 1), 1), ((2 * m + 1, 35), 0), ((5, 2 * m, 3, 3), 1)):
            score = few_levels(shape, n)
            expected = nm_mask_reference(score, n, m, axis)
            assert torch.equal(nm_mask(score, n, m, axis), expected), (n, shape)
            expected = nm_mask_reference(score.abs(), n, m, axis)
            assert torch.equal(nm_mask(score, n, m, axis, magnitude=True), expected), (n, shape)


@needs_native
@QUICK
@given(
    st.integers(1, 64).flatmap(lambda m: st.tuples(st.integers(1, m), st.just(m))),
    st.lists(st.integers(0, 40), min_size=1, max_size=3),
    st.data(),
)
def test_any_shape_axis_and_thread_count_gives_the_same_mask(pair, shape, data):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    threads = data.draw(st.integers(1, 3))
    score = few_levels(tuple(shape), data.draw(st.integers(0, 9)))
    mask = nm_mask(score, *pair, axis, threads=threads)
    assert torch.equal(mask, nm_mask_reference(score, *pair, axis))


@needs_native
def test_large_weights_are_cut_into_tasks_without_a_seam():
    score = torch.randn(256, 1030, generator=torch.Generator().manual_seed(0))
    for axis in (0, 1):
        expected = nm_mask_reference(score, 3, 8, axis)
        assert torch.equal(nm_mask(score, 3, 8, axis, threads=3), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_float_type_and_stride_is_read_as_it_is(dtype):
    score = few_levels((12, 20), 1).to(dtype).t()
    assert torch.equal(nm_mask(score, 2, 4, 1), nm_mask_reference(score, 2, 4, 1))


@needs_native
@pytest.mark.parametrize("n", [1, 4, 7])
def test_the_count_is_exact_even_if_scores_are_nan(instruction_set, n):
    score = torch.full((40, 8), torch.nan)
    score[::2, 3] = 1.0
    score[1::2] = -score[1::2]
    assert (nm_mask(score, n, 8, 1).sum(1) == n).all()


def test_the_reference_can_be_chosen(monkeypatch):
    score = few_levels((6, 12), 2)
    expected = nm_mask(score, 1, 4, 1)
    monkeypatch.setenv("AEROGEL_KERNELS", "reference")
    assert torch.equal(nm_mask(score, 1, 4, 1), expected)


@pytest.mark.parametrize("arguments", [(0, 4), (5, 4)])
def test_impossible_patterns_are_named(arguments):
    with pytest.raises(ValueError, match=r"expected 1 <= n <= m"):
        nm_mask(torch.ones(2, 4), *arguments)
    with pytest.raises(ValueError, match="threads=0"):
        nm_mask(torch.ones(2, 4), 1, 4, threads=0)
