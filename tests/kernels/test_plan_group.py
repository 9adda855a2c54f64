"""Small planes of a batch side by side: each image as if alone, whatever the others hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import needs_native
from plan_cases import Build, built, depthwise, pointwise, sparse_conv
from torch import Tensor

from aerogel.kernels import PlanBuilder, SpmmVariant, Value, images_together

pytestmark = [needs_native, pytest.mark.usefixtures("threads_of_torch")]
VARIANTS = (
    SpmmVariant(2, 1, 1, 1, True),
    SpmmVariant(1, 2, 2, 3, True, 2),
    SpmmVariant(4, 1, 3, 2, True, 3),
)
# (kernel, padding, stride, dilation, groups)
WINDOWS = (
    (3, 1, 1, 1, 1),
    (1, 0, 1, 1, 1),
    (1, 0, 2, 1, 1),
    (3, 1, 2, 1, 2),
    (3, 2, 1, 2, 1),
    (5, 2, 1, 1, 2),
    (3, 0, 1, 1, 1),
    (2, 1, 1, 1, 1),
    (7, 9, 1, 3, 1),  # taps that meet nothing but padding
)


def dense(b: PlanBuilder, x: Value, rows: int, kernel: int) -> Value:
    weight = torch.randn(rows, x.shape[0], kernel, kernel) / kernel
    return b.conv2d(x, weight, torch.randn(rows), 1, kernel // 2, activation="relu6")


def assert_as_alone(build: Build, x: Tensor, threads: int, exact: bool = True) -> None:
    """Every image of a batch, and of one with an image of NaN, against a plan of one image."""
    alone = built(build, 1)
    torch.set_num_threads(1)
    expected = [
        torch.cat(ys) for ys in zip(*(alone.run([image[None]]) for image in x), strict=True)
    ]
    plan = built(build, threads, len(x))
    spoilt, spoiler = x.clone(), len(x) // 2
    spoilt[spoiler] = float("nan")
    others = torch.arange(len(x)) != spoiler
    for running in (threads, 1, 3):
        torch.set_num_threads(running)
        for _ in range(2):
            plan._native_plan().fill_idle_arenas(float("nan"))
            for y, e, of_spoilt in zip(plan.run([x]), expected, plan.run([spoilt]), strict=True):
                if exact:
                    assert torch.equal(y, e)
                else:
                    torch.testing.assert_close(y, e, rtol=1e-5, atol=1e-5)
                assert torch.equal(of_spoilt[others], y[others])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_images_side_by_side_are_as_alone(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    channels, batch = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 9))
    kinds = ("pointwise", "sparse", "depthwise", "dense", "dense 1x1", "residual", "sum", "pool")
    steps = data.draw(
        st.lists(
            st.tuples(st.sampled_from(kinds), st.sampled_from(WINDOWS), st.sampled_from(VARIANTS)),
            min_size=1,
            max_size=6,
        )
    )
    ending = data.draw(st.sampled_from(("planes", "means", "classes")))

    def build(b: PlanBuilder) -> None:
        x = b.input((channels, height, width))
        for i, (kind, window, variant) in enumerate(steps):
            rows = 2 * (2 + i)
            if kind == "pointwise":
                x = pointwise(b, x, rows, variant)
            elif kind == "sparse":
                kernel, padding, _, dilation, groups = window
                fits = min(x.shape[1:]) + 2 * padding >= dilation * (kernel - 1) + 1
                if fits and x.shape[0] % groups == 0:
                    x = sparse_conv(b, x, rows, variant, None, *window)
            elif kind == "depthwise":
                x = depthwise(b, x, 3, 1, 1)
            elif kind == "dense":
                x = dense(b, x, rows, 3)
            elif kind == "dense 1x1":
                x = dense(b, x, rows, 1)
            elif kind == "residual":
                inner = sparse_conv(b, x, rows, variant)
                x = pointwise(b, inner, x.shape[0], variant, residual=x)
            elif kind == "sum":
                x = b.add(x, sparse_conv(b, x, x.shape[0], variant), "relu")
            elif min(x.shape[1:]) >= 3:
                x = b.max_pool2d(x, 3, 2, 1)
        if ending == "planes":
            return b.output(x)
        x = b.flatten(b.global_avg_pool(x))
        b.output(
            x if ending == "means" else b.linear(x, torch.randn(4, x.shape[0]), torch.randn(4))
        )

    x = torch.randn(batch, channels, height, width)
    threads = data.draw(st.sampled_from((1, 2, 3)))
    assert_as_alone(build, x, threads, exact=False)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("size", [(7, 7), (4, 4), (1, 5), (8, 8)], ids=str)
def test_a_convolution_over_a_group_gives_the_bits_of_every_image(
    window: tuple[int, ...], size: tuple[int, int], instruction_set: str
) -> None:
    kernel, padding, _, dilation, _ = window
    if min(size) + 2 * padding < dilation * (kernel - 1) + 1:
        pytest.skip("the window is larger than the plane")
    for variant in VARIANTS:

        def build(b: PlanBuilder, variant: SpmmVariant = variant) -> None:
            x = pointwise(b, b.input((4, *size)), 6, variant)
            b.output(sparse_conv(b, x, 8, variant, None, *window))

        assert_as_alone(build, torch.randn(5, 4, *size), 1)


def residual_network(b: PlanBuilder) -> None:
    """Like the end of a ResNet: large planes, a block that halves them, and one that does not."""
    x = sparse_conv(b, b.input((4, 18, 18)), 8, VARIANTS[0])
    for stride, rows in ((2, 12), (2, 16), (1, 16)):
        variant = VARIANTS[1]
        short = sparse_conv(b, x, rows, variant, None, 1, 0, stride) if stride > 1 else x
        y = pointwise(b, x, 6, variant)
        y = sparse_conv(b, y, 6, variant, stride=stride)
        x = pointwise(b, y, rows, variant, short)
    b.output(b.linear(b.flatten(b.global_avg_pool(x)), torch.randn(3, 16), torch.randn(3)))


@pytest.mark.parametrize("batch", [2, 3, 8, 13])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_end_of_a_residual_network_runs_on_groups(batch: int, threads: int) -> None:
    x = torch.randn(batch, 4, 18, 18)
    assert_as_alone(residual_network, x, threads, exact=False)
    plan = built(residual_network, threads, batch)
    torch.set_num_threads(threads)
    names = [name for name, _ in plan.profile([x])]
    described = [row.name for row in plan.describe()]
    assert sorted(name for name in names if name in described) == sorted(described)


def test_groups_are_of_equal_sizes_and_a_thread_has_its_own() -> None:
    assert images_together(65, 16, 1) == 1  # large planes waste little
    assert images_together(49, 1, 1) == 1
    assert images_together(49, 16, 1) == 4
    assert images_together(49, 5, 1) == 3
    assert images_together(49, 4, 2) == 2
    assert images_together(49, 3, 4) <= 3
