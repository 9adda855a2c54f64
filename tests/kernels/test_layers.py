"""Every kind of layer, executed natively, equals torch, for each instruction set of this CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from aerogel import kernels
from aerogel.kernels import ACTIVATIONS, BlockRowWeight, PlanBuilder, Value

pytestmark = pytest.mark.skipif(not kernels.native_available(), reason="native kernels not built")

ISAS = kernels.available_isas() if kernels.native_available() else []
PROPERTY = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
NAN = float("nan")


@pytest.fixture(autouse=True, params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = kernels.isa()
    kernels.set_isa(request.param)
    yield request.param
    kernels.set_isa(before)


def run_one(x: Tensor, layer: Callable[[PlanBuilder, Value], Value], **ports: str) -> Tensor:
    """One layer in a plan of its own, on one and on two threads, twice, on poisoned memory."""
    shape = x.shape[1:]
    results = []
    for threads in (1, 2):
        b = PlanBuilder(batch=x.shape[0], threads=threads)
        b.output(layer(b, b.input(shape, ports.get("layout", "channels"))), **ports)
        plan = b.build()
        plan.run([x])
        plan._native_plan().fill_idle_arenas(NAN)
        results += plan.run([x])
    assert torch.equal(*(y.view(torch.int32) for y in results)), "threads change bits"
    return results[0]


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal relative to the largest element: sums of a different order differ by that much."""
    finite = expected[expected.isfinite()]
    scale = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * scale, equal_nan=True)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def convolutions(draw: st.DrawFn) -> dict:
    groups = draw(st.sampled_from((1, 1, 1, 2, 3)))
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    least = [max(1, dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]) for i in (0, 1)]
    return {
        "batch": draw(st.integers(1, 3)),
        "in": groups * draw(st.integers(1, 6)),
        "out": groups * draw(st.integers(1, 9)),
        "size": tuple(n + draw(st.integers(0, 20)) for n in least),
        "kernel": kernel,
        "stride": draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
    }


@PROPERTY
@given(case=convolutions(), activation=st.sampled_from(tuple(ACTIVATIONS)))
def test_dense_convolution_equals_torch(case: dict, activation: str) -> None:
    x = seeded(case["batch"], case["in"], *case["size"])
    weight = seeded(case["out"], case["in"] // case["groups"], *case["kernel"], seed=1)
    bias = seeded(case["out"], seed=2) if case["bias"] else None
    geometry = (case["stride"], case["padding"], case["dilation"], case["groups"])
    got = run_one(x, lambda b, v: b.conv2d(v, weight, bias, *geometry, activation))
    expected = kernels.reference_activation(F.conv2d(x, weight, bias, *geometry), activation)
    assert_close(got, expected)


@st.composite
def stems(draw: st.DrawFn) -> dict:
    """Few channels on rows that fill their vectors: these run without a gathered panel."""
    kernel = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    stride = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    out = (draw(st.integers(1, 9)), draw(st.sampled_from((4, 7, 14, 16, 28, 47, 56))))
    padding, size = [], []
    for i in (0, 1):
        need = (out[i] - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1
        padding.append(draw(st.integers(0, min(5, (need - 1) // 2))))
        size.append(need - 2 * padding[i] + draw(st.integers(0, stride[i] - 1)))
    return {
        "channels": draw(st.integers(1, 5)),
        "out": draw(st.integers(1, 19)),
        "size": tuple(size),
        "kernel": kernel,
        "geometry": (stride, tuple(padding), dilation),
    }


@PROPERTY
@given(case=stems(), activation=st.sampled_from(("none", "relu", "relu6", "silu")))
def test_convolution_of_few_channels_equals_torch(case: dict, activation: str) -> None:
    x = seeded(2, case["channels"], *case["size"])
    weight = seeded(case["out"], case["channels"], *case["kernel"], seed=1)
    bias = seeded(case["out"], seed=2)
    got = run_one(x, lambda b, v: b.conv2d(v, weight, bias, *case["geometry"], 1, activation))
    plain = F.conv2d(x, weight, bias, *case["geometry"])
    assert_close(got, kernels.reference_activation(plain, activation))


@PROPERTY
@given(
    channels=st.integers(2, 9),
    multiplier=st.integers(1, 2),
    size=st.tuples(st.integers(1, 35), st.integers(1, 35)),
    kernel=st.sampled_from(((3, 3), (3, 3), (5, 5), (5, 5), (3, 5), (7, 7), (1, 1))),
    stride=st.sampled_from(((1, 1), (2, 2), (1, 2), (3, 3))),
    padding=st.integers(0, 3),
    dilation=st.sampled_from((1, 1, 1, 2)),
    activation=st.sampled_from(("none", "relu", "relu6", "hardswish")),
    batch=st.integers(1, 3),
)
def test_depthwise_convolution_equals_torch(
    channels: int,
    multiplier: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: int,
    dilation: int,
    activation: str,
    batch: int,
) -> None:
    assume(all(size[i] + 2 * padding > dilation * (kernel[i] - 1) for i in (0, 1)))
    x = seeded(batch, channels, *size)
    weight = seeded(channels * multiplier, 1, *kernel, seed=1)
    bias = seeded(channels * multiplier, seed=2)
    geometry = (stride, padding, dilation, channels)
    got = run_one(x, lambda b, v: b.conv2d(v, weight, bias, *geometry, activation))
    expected = kernels.reference_activation(F.conv2d(x, weight, bias, *geometry), activation)
    assert_close(got, expected)


@pytest.mark.parametrize("width", [15, 16, 17, 31, 33, 64, 65, 112, 150, 513, 700])
@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (1, 0), (1, 2), (2, 1), (2, 0)])
@pytest.mark.parametrize("multiplier", [1, 2])
def test_depthwise_convolution_of_any_width_equals_torch(
    width: int, stride: int, padding: int, multiplier: int
) -> None:
    x = seeded(2, 3, 31, width)
    x[0, 1, 7, width - 1], x[1, 2, 30, 0] = NAN, float("inf")
    weight, bias = seeded(3 * multiplier, 1, 3, 3, seed=1), seeded(3 * multiplier, seed=2)
    geometry = (stride, padding, 1, 3)
    got = run_one(x, lambda b, v: b.conv2d(v, weight, bias, *geometry, "relu"))
    assert_close(got, F.relu(F.conv2d(x, weight, bias, *geometry)))


@pytest.mark.parametrize("height", [2, 3, 7, 8, 13, 14])
@pytest.mark.parametrize("width", [1, 2, 5, 6, 7, 8, 12, 13, 14])
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_convolution_of_narrow_planes_equals_torch(
    height: int, width: int, stride: int
) -> None:
    x = seeded(2, 3, height, width)
    x[0, 1, height - 1, 0], x[1, 2, 1, width - 1] = NAN, float("inf")
    weight, bias = seeded(6, 1, 3, 3, seed=1), seeded(6, seed=2)
    got = run_one(x, lambda b, v: b.conv2d(v, weight, bias, stride, 1, 1, 3, "relu"))
    assert_close(got, F.relu(F.conv2d(x, weight, bias, stride, 1, 1, 3)))


@pytest.mark.parametrize(
    ("inputs", "outputs", "size", "kernel", "stride"),
    [(3, 32, 40, 3, 2), (300, 20, 9, 1, 1), (70, 33, 7, 3, 1), (1, 5, 30, 7, 2), (600, 9, 1, 1, 1)],
)
def test_convolutions_of_the_usual_networks_equal_torch(
    inputs: int, outputs: int, size: int, kernel: int, stride: int
) -> None:
    x = seeded(2, inputs, size, size)
    weight, bias = seeded(outputs, inputs, kernel, kernel, seed=1), seeded(outputs, seed=2)
    got = run_one(x, lambda b, v: b.conv2d(v, weight, bias, stride, kernel // 2))
    assert_close(got, F.conv2d(x, weight, bias, stride, kernel // 2))


@pytest.mark.parametrize("stride", [1, 2])
def test_nan_and_infinity_reach_the_outputs_that_see_them(stride: int) -> None:
    x = seeded(1, 3, 33, 57)
    x[0, 1, 7, 11], x[0, 2, 20, 56] = NAN, float("inf")
    weight, bias = seeded(9, 3, 5, 5, seed=1), seeded(9, seed=2)
    got = run_one(x, lambda b, v: b.conv2d(v, weight, bias, stride, 2))
    expected = F.conv2d(x, weight, bias, stride, 2)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.isinf(), expected.isinf())
    assert_close(got, expected)


@pytest.mark.parametrize("groups", [1, 8])
def test_residual_is_added_before_the_activation(groups: int) -> None:
    x = seeded(2, 8, 9, 9)
    weight, bias = seeded(8, 8 // groups, 3, 3, seed=1), seeded(8, seed=2)
    got = run_one(x, lambda b, v: b.conv2d(v, weight, bias, 1, 1, 1, groups, "relu", residual=v))
    assert_close(got, F.relu(F.conv2d(x, weight, bias, 1, 1, 1, groups) + x))
    wide = seeded(2, 8, 9, 28)
    got = run_one(wide, lambda b, v: b.conv2d(v, weight, bias, 1, 1, 1, groups, "relu", residual=v))
    assert_close(got, F.relu(F.conv2d(wide, weight, bias, 1, 1, 1, groups) + wide))


@PROPERTY
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 40),
    size=st.sampled_from(((), (1,), (5,), (17,), (70,), (4, 9))),
    block=st.sampled_from((1, 2, 4)),
    batch=st.integers(1, 4),
    packed=st.booleans(),
    tokens=st.booleans(),
    residual=st.booleans(),
    activation=st.sampled_from(("none", "relu", "gelu", "silu")),
)
def test_linear_equals_torch_dense_or_packed_on_vectors_tokens_and_planes(
    rows: int,
    cols: int,
    size: tuple[int, ...],
    block: int,
    batch: int,
    packed: bool,
    tokens: bool,
    residual: bool,
    activation: str,
) -> None:
    weight = seeded(rows, cols, seed=1) * (seeded(rows, cols, seed=3) > 0.5)
    bias, tokens = seeded(rows, seed=2), tokens and len(size) == 1
    square = seeded(rows, rows, seed=4)
    operand = BlockRowWeight.pack(weight, block) if packed else weight

    def layers(b: PlanBuilder, x: Value) -> Value:
        y = b.linear(x, operand, bias, activation)
        return b.linear(y, square, None, residual=y) if residual else y

    x = seeded(batch, cols, *size)
    given_x = x.transpose(1, 2).contiguous() if tokens else x
    got = run_one(given_x, layers, **({"layout": "tokens"} if tokens else {}))
    y = torch.einsum("nk,bk...->bn...", weight, x) + bias.view(-1, *(1 for _ in size))
    y = kernels.reference_activation(y, activation)
    y = torch.einsum("nk,bk...->bn...", square, y) + y if residual else y
    assert_close(got.transpose(1, 2) if tokens else got, y)


@PROPERTY
@given(
    kind=st.sampled_from(("max", "avg", "avg_valid")),
    size=st.tuples(st.integers(4, 20), st.one_of(st.integers(4, 80), st.just(4200))),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padded=st.booleans(),
    ceil_mode=st.booleans(),
)
def test_pooling_equals_torch(
    kind: str,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padded: bool,
    ceil_mode: bool,
) -> None:
    x = seeded(2, 3, *size)
    x[0, 0, 1, 1] = NAN
    padding = tuple(k // 2 for k in kernel) if padded else (0, 0)
    if kind == "max":
        got = run_one(x, lambda b, v: b.max_pool2d(v, kernel, stride, padding, 1, ceil_mode))
        expected = F.max_pool2d(x, kernel, stride, padding, 1, ceil_mode)
    else:
        count = kind == "avg"
        got = run_one(x, lambda b, v: b.avg_pool2d(v, kernel, stride, padding, ceil_mode, count))
        expected = F.avg_pool2d(x, kernel, stride, padding, ceil_mode, count)
    assert_close(got, expected)


@pytest.mark.parametrize("shape", [(5,), (7, 13), (6, 5, 9), (3, 1, 1), (2, 40, 40)])
@pytest.mark.parametrize("activation", ["none", "relu6", "sigmoid"])
def test_elementwise_layers_equal_torch(shape: tuple[int, ...], activation: str) -> None:
    x = seeded(3, *shape)
    apply = kernels.reference_activation
    got = run_one(x, lambda b, v: b.add(v, b.activation(v, "silu"), activation))
    assert_close(got, apply(x + F.silu(x), activation))
    got = run_one(x, lambda b, v: b.mul(v, v, activation))
    assert_close(got, apply(x * x, activation))


def test_a_vector_scales_or_shifts_every_column_of_its_channel() -> None:
    x = seeded(3, 6, 5, 9)

    def gate(b: PlanBuilder, v: Value) -> Value:
        mean = b.global_avg_pool(v)
        return b.add(b.mul(v, b.activation(mean, "sigmoid")), b.reshape(mean, (6, 1, 1)))

    mean = x.mean((2, 3), keepdim=True)
    assert_close(run_one(x, gate), x * torch.sigmoid(mean) + mean)


@pytest.mark.parametrize("shape", [(5, 3, 7), (4, 1, 1), (3, 20, 20)])
def test_flatten_keeps_torchs_order_and_reshape_undoes_it(shape: tuple[int, ...]) -> None:
    x = seeded(2, *shape)
    assert torch.equal(run_one(x, lambda b, v: b.flatten(v)), x.flatten(1))
    back = run_one(x, lambda b, v: b.reshape(b.flatten(v), shape))
    assert torch.equal(back, x)
    columns = (shape[0], math.prod(shape[1:]))
    assert torch.equal(run_one(x, lambda b, v: b.reshape(v, columns)), x.flatten(2))


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_nan_goes_through_every_activation(activation: str) -> None:
    x = seeded(1, 4, 3, 3)
    x[0, 1, 1, 1] = NAN
    weight = torch.eye(4).view(4, 4, 1, 1)
    for layer in (
        lambda b, v: b.activation(v, activation),
        lambda b, v: b.add(v, v, activation),
        lambda b, v: b.conv2d(v, torch.ones(4, 1, 3, 3), None, 1, 1, 1, 4, activation),
        lambda b, v: b.conv2d(v, weight, activation=activation),
        lambda b, v: b.sparse_conv1x1(v, BlockRowWeight.pack(weight), activation=activation),
    ):
        assert run_one(x, layer)[0, 1, 1, 1].isnan()
