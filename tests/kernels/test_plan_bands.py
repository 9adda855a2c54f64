"""Operations on large planes that run on bands of rows: the same numbers, less memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import needs_native
from torch import Tensor

from aerogel.kernels import BlockRowWeight, Plan, PlanBuilder, SpmmVariant, Value
from aerogel.kernels import plan as plans

pytestmark = needs_native
ALL = 1  # bytes: every operation is large enough


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def depthwise(
    b: PlanBuilder, x: Value, kernel: int, stride: int, padding: int, activation: str
) -> Value:
    weight = torch.randn(x.shape[0], 1, kernel, kernel) / kernel
    return b.conv2d(
        x, weight, torch.randn(x.shape[0]), stride, padding, groups=x.shape[0],
        activation=activation, name="depthwise",
    )  # fmt: skip


def pointwise(b: PlanBuilder, x: Value, rows: int, activation: str, packed: bool = False) -> Value:
    weight = torch.randn(rows, x.shape[0]) * (torch.rand(rows, x.shape[0]) < 0.3)
    return b.sparse_conv1x1(
        x, BlockRowWeight.pack(weight), torch.randn(rows), activation=activation,
        variant=SpmmVariant(2, 1, 2, 1, packed), name="pointwise",
    )  # fmt: skip


def pool(b: PlanBuilder, x: Value, kernel: int, stride: int, padding: int, kind: int) -> Value:
    padding = min(padding, kernel // 2)
    if kind % 2:
        return b.avg_pool2d(x, kernel, stride, padding, ceil_mode=kind > 1)
    return b.max_pool2d(x, kernel, stride, padding, ceil_mode=kind > 1)


def both(build: object, budget: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Plan, Plan]:
    """The same plan with bands and without."""
    made = []
    for bands in ((ALL, budget), (0, 0)):
        monkeypatch.setattr(plans, "BANDS", bands)
        torch.manual_seed(0)
        b = PlanBuilder(2)
        build(b)  # type: ignore[operator]
        made.append(b.build())
    return made[0], made[1]


def assert_same(banded: Plan, whole: Plan, x: Tensor) -> None:
    expected = whole.run([x])
    for threads in (1, 3):  # more than the plan was made for: every one makes its own rows
        torch.set_num_threads(threads)
        banded._native_plan().fill_idle_arenas(float("nan"))
        for y, e in zip(banded.run([x]), expected, strict=True):
            torch.testing.assert_close(y, e, rtol=1e-6, atol=1e-6, equal_nan=True)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_bands_of_any_chain_give_the_numbers_of_whole_planes(data: st.DataObject) -> None:
    channels, height = data.draw(st.integers(1, 6)), data.draw(st.integers(9, 60))
    width, budget = (
        data.draw(st.integers(5, 40)),
        data.draw(st.sampled_from((10_000, 40_000, 1 << 30))),
    )
    names = ("depthwise", "pointwise", "pool")
    kinds = data.draw(st.lists(st.sampled_from(names), min_size=2, max_size=5))
    numbers = [
        (*data.draw(st.sampled_from(((3, 1), (5, 2), (3, 0), (2, 1), (1, 0)))), stride, rows)
        for stride, rows in ((data.draw(st.sampled_from((1, 1, 2, 3))), 2 + i) for i in range(5))
    ]
    activations = ("relu", "none", "hardswish")

    def build(b: PlanBuilder) -> None:
        x = b.input((channels, height, width))
        for i, (kind, (kernel, padding, stride, rows)) in enumerate(
            zip(kinds, numbers, strict=False)
        ):
            if kind == "pointwise":
                x = pointwise(b, x, rows, activations[i % 3], packed=i % 2 == 0)
            elif min(x.shape[1:]) < 5:
                continue
            elif kind == "pool":
                x = pool(b, x, kernel, stride, padding, rows % 4)
            else:
                x = depthwise(b, x, kernel, stride, padding, activations[i % 3])
        b.output(x)

    with pytest.MonkeyPatch.context() as monkeypatch:
        banded, whole = both(build, budget, monkeypatch)
        assert_same(banded, whole, torch.randn(2, channels, height, width))


def mobile(b: PlanBuilder) -> None:
    """A network's first layers, the first of them dense."""
    x = b.input((3, 128, 128))
    weight = torch.randn(8, 3, 3, 3) / 5
    x = b.conv2d(x, weight, torch.randn(8), 2, 1, activation="relu6", name="stem")
    x = pointwise(b, depthwise(b, x, 3, 1, 1, "relu"), 16, "relu6")
    x = pointwise(b, depthwise(b, x, 3, 2, 1, "relu"), 24, "none")
    b.output(x)


def residual(b: PlanBuilder) -> None:
    """The first layers of a network that pools at once."""
    x = b.input((3, 100, 90))
    weight = torch.randn(8, 3, 7, 7) / 12
    x = b.conv2d(x, weight, torch.randn(8), 2, 3, activation="relu", name="stem")
    b.output(b.max_pool2d(x, 3, 2, 1))


@pytest.mark.parametrize("budget", [20_000, 1 << 30])
def test_a_pool_takes_the_rows_of_the_convolution_before_it(
    budget: int, instruction_set: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    banded, whole = both(residual, budget, monkeypatch)
    x = torch.randn(2, 3, 100, 90)
    x[1, 2, 40, 89] = float("nan")
    assert_same(banded, whole, x)
    assert banded.arena_bytes < whole.arena_bytes


@pytest.mark.parametrize("budget", [70_000, 1 << 30])
def test_the_first_layers_of_a_network_run_on_bands(
    budget: int, instruction_set: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    banded, whole = both(mobile, budget, monkeypatch)
    assert_same(banded, whole, torch.randn(2, 3, 128, 128))
    assert banded.arena_bytes < whole.arena_bytes


def test_non_finite_inputs_reach_their_outputs_and_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    banded, whole = both(mobile, 70_000, monkeypatch)
    x = torch.randn(2, 3, 128, 128)
    x[0, 0, 31, 7], x[1, 2, 127, 127] = float("nan"), float("inf")
    assert_same(banded, whole, x)


def test_a_value_that_two_operations_read_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(b: PlanBuilder) -> None:
        x = b.input((4, 20, 20))
        y = depthwise(b, pointwise(b, x, 6, "relu"), 3, 1, 1, "relu")
        z = depthwise(b, y, 3, 1, 1, "none")
        b.output(b.add(y, z))
        b.output(y)

    banded, whole = both(build, 1 << 30, monkeypatch)
    assert_same(banded, whole, torch.randn(2, 4, 20, 20))


@pytest.mark.parametrize("threads", [1, 3])
def test_profile_names_every_operation_of_a_chain(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    banded, whole = both(mobile, 70_000, monkeypatch)
    x = torch.randn(2, 3, 128, 128)
    torch.set_num_threads(threads)
    rows = banded.profile([x])
    assert [name for name, _ in rows] == [name for name, _ in whole.profile([x])]
    assert all(seconds >= 0 for _, seconds in rows)


def test_the_last_band_stays_in_its_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(b: PlanBuilder) -> None:  # 9 whole lines a channel, bands begin within one
        b.output(pointwise(b, depthwise(b, b.input((2, 16, 9)), 3, 1, 1, "relu"), 3, "none"))

    banded, whole = both(build, 1, monkeypatch)
    assert_same(banded, whole, torch.randn(2, 2, 16, 9))
