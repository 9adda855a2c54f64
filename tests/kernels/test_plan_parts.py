"""Planes whose rows lie in a part for each thread: the same numbers as in one piece."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import needs_native
from plan_cases import built, depthwise, pointwise, sparse_conv
from torch import Tensor

from aerogel.kernels import Plan, PlanBuilder, SpmmVariant
from aerogel.kernels import plan as plans

pytestmark = [needs_native, pytest.mark.usefixtures("threads_of_torch")]
THREADS = (2, 3, 4)


def banded(build: Callable[[PlanBuilder], None], threads: int, budget: int) -> Plan:
    """The same with chains of operations on bands of rows, however small their planes."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(plans, "BANDS", (1, budget))
        plan = built(build, threads)
        plan._native_plan()
        return plan


def assert_same(plan: Plan, alone: Plan, x: Tensor, exact: bool = True) -> None:
    torch.set_num_threads(1)
    expected = alone.run([x])
    for threads in (1, 2, 3, 4, 7):
        torch.set_num_threads(threads)
        for _ in range(2):
            plan._native_plan().fill_idle_arenas(float("nan"))
            for y, e in zip(plan.run([x]), expected, strict=True):
                if exact:
                    assert torch.equal(y, e)
                else:  # planes this small are summed up in another order in one piece
                    torch.testing.assert_close(y, e, rtol=1e-5, atol=1e-5)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_parts_of_any_network_give_the_numbers_of_whole_planes(data: st.DataObject) -> None:
    channels = data.draw(st.integers(1, 6))
    height, width = data.draw(st.integers(6, 60)), data.draw(st.integers(6, 40))
    steps = data.draw(
        st.lists(
            st.tuples(
                st.sampled_from(("depthwise", "pointwise", "sparse", "residual")),
                st.sampled_from(((3, 1, 1), (3, 1, 2), (5, 2, 1), (5, 2, 2), (2, 1, 1), (1, 0, 3))),
                st.sampled_from(
                    (SpmmVariant(2), SpmmVariant(1, 2, 2), SpmmVariant(2, 1, 3, 2, True))
                ),
            ),
            min_size=2,
            max_size=7,
        )
    )

    pooled = data.draw(st.booleans())

    def build(b: PlanBuilder) -> None:
        x = depthwise(b, b.input((channels, height, width)), 3, 1, 1)
        for i, (kind, (kernel, padding, stride), variant) in enumerate(steps):
            if kind == "depthwise":
                if min(x.shape[1:]) >= 5:
                    x = depthwise(b, x, kernel, stride, padding)
            elif kind == "pointwise":
                x = pointwise(b, x, 2 + i, variant)
            elif kind == "sparse":
                if min(x.shape[1:]) >= 5:
                    packed = variant._replace(pack=True)
                    x = sparse_conv(b, x, 3 + i, packed, None, kernel, padding, stride)
            else:
                wide = depthwise(b, pointwise(b, x, 2 + i, variant), 3, 1, 1)
                x = pointwise(b, wide, x.shape[0], variant, residual=x)
        b.output(b.global_avg_pool(x) if pooled else x)

    threads = data.draw(st.sampled_from(THREADS))
    alone, x = built(build, 1), torch.randn(1, channels, height, width)
    assert_same(built(build, threads), alone, x)
    chained = banded(build, threads, data.draw(st.sampled_from((2_000, 1 << 30))))
    assert_same(chained, alone, x, exact=False)


def inverted_residuals(b: PlanBuilder) -> None:
    x = b.input((3, 64, 64))
    x = b.conv2d(x, torch.randn(8, 3, 3, 3) / 5, torch.randn(8), 2, 1, activation="relu")
    for stride, rows in ((1, 8), (2, 12), (1, 12), (1, 12)):
        slabs = SpmmVariant(2, 1, 2)
        wide = depthwise(b, pointwise(b, x, 24, slabs), 3, stride, 1)
        x = pointwise(b, wide, rows, slabs, x if stride == 1 else None)
    b.output(b.global_avg_pool(depthwise(b, x, 3, 2, 1)))


@pytest.mark.parametrize("threads", THREADS)
def test_parts_of_a_mobile_network(threads: int) -> None:
    plan, alone = built(inverted_residuals, threads), built(inverted_residuals, 1)
    if threads == 2:  # planes of 16 rows are in parts, which lie apart
        assert plan.arena_bytes > alone.arena_bytes
    assert_same(plan, alone, torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("budget", [1, 20_000, 1 << 30])
def test_what_a_chain_on_bands_makes_is_in_parts(threads: int, budget: int) -> None:
    plan, alone = banded(inverted_residuals, threads, budget), built(inverted_residuals, 1)
    assert_same(plan, alone, torch.randn(1, 3, 64, 64), exact=False)
    names = [name for name, _ in plan.profile([torch.randn(1, 3, 64, 64)])]
    assert names[: len(plan.describe())] == [row.name for row in plan.describe()]


# (kernel, padding, stride, dilation, groups): rows of a part begin within the padding, on the first
# row of a tap, between two; taps overlap, are apart, are none of the neighbour's.
WINDOWS = (
    (3, 1, 1, 1, 1),
    (3, 1, 2, 1, 2),
    (3, 0, 1, 1, 1),
    (3, 2, 1, 2, 1),
    (5, 2, 2, 1, 1),
    (1, 0, 2, 1, 1),
    (2, 1, 3, 1, 2),
    (3, 4, 1, 1, 1),
)
SPARSE = (
    SpmmVariant(2, 1, 2, 1, True, 3),
    SpmmVariant(1, 4, 1, 3, True),
    SpmmVariant(8, 1, 3, 1, True),
)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("size", [(14, 14), (7, 7), (19, 33), (31, 12)], ids=str)
def test_sparse_convolutions_make_rows_by_themselves(
    window: tuple[int, ...], size: tuple[int, int], instruction_set: str
) -> None:
    for variant in SPARSE:

        def build(b: PlanBuilder, variant: SpmmVariant = variant) -> None:
            x = pointwise(b, b.input((4, *size)), 6, SpmmVariant(2))
            kernel, padding, stride, dilation, groups = window
            y = sparse_conv(b, x, 8, variant, None, kernel, padding, stride, dilation, groups)
            y = sparse_conv(b, y, 8, variant, y)  # with a residual in parts
            b.output(pointwise(b, y, 5, SpmmVariant(2)))

        for threads in (2, 3):
            assert_same(built(build, threads), built(build, 1), torch.randn(1, 4, *size))


def parts_of(build: Callable[[PlanBuilder], None], threads: int = 2) -> bool:
    """Whether any value of the network lies in parts."""
    return built(build, threads).arena_bytes != built(build, 1).arena_bytes


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("width", [7, 8, 9, 13, 14, 16])
def test_small_planes_are_cut_between_any_rows(
    stride: int, width: int, instruction_set: str
) -> None:
    for height in (6, 7, 9, 12, 13, 14):

        def build(b: PlanBuilder, height: int = height) -> None:
            x = pointwise(b, b.input((3, height, width)), 21, SpmmVariant(2, 1, 2))
            x = depthwise(b, depthwise(b, x, 3, 1, 1), 3, stride, 1)
            b.output(pointwise(b, x, 5, SpmmVariant(2)))

        assert parts_of(build)
        for threads in THREADS:
            assert_same(built(build, threads), built(build, 1), torch.randn(1, 3, height, width))


@pytest.mark.parametrize("multiplier", [1, 2, 3])
def test_planes_are_put_together_for_what_wants_them_whole(multiplier: int) -> None:
    """A depthwise layer with too few rows to share them, and a mean."""
    channels = 37  # more than are put together at a time, and no multiple of it

    def build(b: PlanBuilder) -> None:
        x = pointwise(b, b.input((3, 9, 11)), channels, SpmmVariant(2, 1, 3))
        weight = torch.randn(channels * multiplier, 1, 3, 3)
        y = b.conv2d(x, weight, torch.randn(len(weight)), 2, 1, groups=channels)  # of five rows
        b.output(y)
        b.output(b.global_avg_pool(x))

    assert parts_of(build)
    for threads in (2, 3):
        assert_same(built(build, threads), built(build, 1), torch.randn(1, 3, 9, 11))


@pytest.mark.parametrize("height", [12, 13, 14, 15, 16])
def test_a_sum_in_the_place_of_its_residual_has_room_for_more_neighbours(height: int) -> None:
    """Rows of both lie alike, but more of the sum's are handed over."""

    def build(b: PlanBuilder) -> None:
        x = pointwise(b, b.input((3, height, 7)), 160, SpmmVariant(2))
        for kernel in (5, 3):
            y = depthwise(b, x, 3, 1, 1)
            x = depthwise(b, pointwise(b, y, 160, SpmmVariant(2), x), kernel, 1, kernel // 2)
        b.output(x)

    assert_same(built(build, 2), built(build, 1), torch.randn(1, 3, height, 7))


def test_an_image_of_a_batch_is_in_one_piece() -> None:
    plan, alone = built(inverted_residuals, 2, batch=3), built(inverted_residuals, 1, batch=3)
    assert plan.arena_bytes == alone.arena_bytes
    assert_same(plan, alone, torch.randn(3, 3, 64, 64))


def test_nan_and_infinity_stay_in_reach_of_their_pixels() -> None:
    def build(b: PlanBuilder) -> None:
        x = depthwise(b, b.input((4, 32, 20)), 3, 1, 1)
        x = pointwise(b, x, 5, SpmmVariant(2, 1, 2))
        b.output(depthwise(b, x, 3, 1, 1))

    plan, alone = built(build, 2), built(build, 1)
    for value in (float("nan"), float("inf")):
        x = torch.randn(1, 4, 32, 20)
        x[0, 1, 15, 3] = value  # the last row of the first part
        expected = alone.run([x])[0]
        torch.set_num_threads(2)
        torch.testing.assert_close(plan.run([x])[0], expected, rtol=0, atol=0, equal_nan=True)
        assert expected[0, :, :13].isfinite().all()
        assert expected[0, :, 18:].isfinite().all()


def test_steps_in_parts_are_timed() -> None:
    plan = built(inverted_residuals, 2)
    rows = plan.profile([torch.randn(1, 3, 64, 64)])
    assert [name for name, _ in rows][: len(plan.describe())] == [r.name for r in plan.describe()]
    assert all(seconds >= 0 for _, seconds in rows)
