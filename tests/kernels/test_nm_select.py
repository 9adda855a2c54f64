"""N:M masks against a stable sort, on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aerogel import kernels
from aerogel.kernels import nm_select
from aerogel.kernels.nm_select import nm_select_reference

ISAS = kernels.available_isas() if kernels.native_available() else []


@pytest.fixture(params=ISAS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = kernels.isa()
    kernels.set_isa(request.param)
    yield request.param
    kernels.set_isa(before)


@settings(max_examples=25, deadline=None)
@given(
    m=st.sampled_from([1, 2, 4, 7, 8, 16, 64]),
    groups=st.integers(1, 9),
    other=st.sampled_from([1, 3, 65, 130]),
    kernel=st.sampled_from([(), (3,), (3, 3)]),
    axis=st.sampled_from([0, 1]),
    seed=st.integers(0, 100),
    data=st.data(),
)
@pytest.mark.usefixtures("instruction_set")
def test_it_keeps_the_largest_of_every_group_and_the_first_of_equals(
    m, groups, other, kernel, axis, seed, data
):
    n = data.draw(st.integers(0, m))
    shape = (other, m * groups, *kernel) if axis else (m * groups, other, *kernel)
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(-3, 4, shape, generator=generator).float()  # many ties
    score[score == 3] = -torch.inf
    mask = nm_select(score, n, m, axis)
    assert torch.equal(mask, nm_select_reference(score, n, m, axis))
    assert bool((mask.movedim(axis, -1).reshape(-1, m).sum(1) == n).all())


@pytest.mark.usefixtures("instruction_set")
def test_strides_and_threads_do_not_matter():
    score = torch.randn(640, 512)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(nm_select(score.t(), 2, 8), nm_select_reference(score.t(), 2, 8))
        assert torch.equal(nm_select(score[::2], 2, 8, 0), nm_select_reference(score[::2], 2, 8, 0))
    finally:
        torch.set_num_threads(before)


def test_other_types_and_long_groups_take_the_reference():
    for dtype in (torch.float64, torch.bfloat16):
        score = torch.randn(4, 16).to(dtype)
        assert torch.equal(nm_select(score, 2, 8), nm_select(score.float(), 2, 8))
    score = torch.randn(2, 130)
    assert torch.equal(nm_select(score, 40, 65), nm_select_reference(score, 40, 65))
    assert nm_select(torch.randn(0, 8), 2, 4).shape == (0, 8)


def test_bad_groups_are_named():
    with pytest.raises(ValueError, match="n:m must have 0 <= n <= m and m >= 1, got 5:4"):
        nm_select(torch.randn(4, 8), 5, 4)
    with pytest.raises(ValueError, match=r"m=3 does not divide 8 \(axis 1\)"):
        nm_select(torch.randn(4, 8), 1, 3)
