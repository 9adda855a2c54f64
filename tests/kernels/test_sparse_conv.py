"""The sparse convolution against F.conv2d: every instruction set, geometry, block and variant."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from instruction_sets import needs_native
from torch import Tensor

from aerogel import kernels
from aerogel.kernels import (
    BlockRowWeight,
    ConvGeometry,
    PlanBuilder,
    SpmmVariant,
    sparse_conv2d,
    sparse_conv2d_reference,
    sparse_conv_variants,
)
from aerogel.kernels._library import native

pytestmark = [needs_native, pytest.mark.usefixtures("instruction_set")]

BLOCKS = (1, 2, 4)
NAN = float("nan")


def random_kernel(out: int, per_group: int, kh: int, kw: int, density: float) -> Tensor:
    g = torch.Generator().manual_seed(out + 7 * per_group + 31 * kh + kw)
    mask = torch.rand(out, per_group, kh, kw, generator=g) < density
    return torch.randn(out, per_group, kh, kw, generator=g) * mask


def legal_variants(block: int) -> list[SpmmVariant]:
    groups = (1, 2, 4, native().spmm_lockstep())
    widest = {g: native().spmm_max_vectors(g, block) for g in groups}
    return [
        SpmmVariant(vectors, groups, *rest)
        for groups, limit in widest.items()
        for vectors in range(1, limit + 1)
        for rest in ((1, 1, True, 1), (3, 4, False, 3), (2, 1, True, 2))
    ]


def assert_close(got: Tensor, x: Tensor, kernel: Tensor, *bias: Tensor, **how: object) -> None:
    """Within 1e-5 of sum |w| |x| of torch in float64."""
    geometry = {k: how[k] for k in ("stride", "padding", "dilation", "groups") if k in how}
    wide = F.conv2d(x.double(), kernel.double(), *(b.double() for b in bias), **geometry)
    residual = how.get("residual")
    if isinstance(residual, Tensor):
        wide = wide + residual
    expected = kernels.reference_activation(wide, str(how.get("activation", "none")))
    scale = 1 + F.conv2d(x.double().abs(), kernel.double().abs(), **geometry)
    assert got.shape == expected.shape
    assert ((got - expected).abs() <= 1e-5 * scale).all()


@settings(max_examples=120, deadline=None)
@given(
    groups=st.sampled_from([1, 1, 2, 3]),
    inputs=st.integers(1, 5),
    outputs=st.integers(1, 9),
    size=st.tuples(st.integers(1, 20), st.integers(1, 40)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    dilation=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    batch=st.integers(0, 3),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    block=st.sampled_from(BLOCKS),
    activation=st.sampled_from(sorted(kernels.ACTIVATIONS)),
    data=st.data(),
)
def test_any_geometry_matches_torch(
    groups: int,
    inputs: int,
    outputs: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    batch: int,
    density: float,
    block: int,
    activation: str,
    data: st.DataObject,
) -> None:
    for length, k, p, d in zip(size, kernel, padding, dilation, strict=True):
        assume(length + 2 * p > d * (k - 1))
    if groups > 1:
        outputs *= block
    weight = random_kernel(groups * outputs, inputs, *kernel, density)
    packed = BlockRowWeight.pack(weight.flatten(1), block)
    x = torch.randn(batch, groups * inputs, *size)
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    shape = F.conv2d(x, weight, **how).shape
    how["activation"] = activation
    if data.draw(st.booleans()):
        how["residual"] = torch.randn(shape)
    bias = [torch.randn(groups * outputs)] if data.draw(st.booleans()) else []
    geometry = ConvGeometry.of(kernel, stride, padding, dilation, groups)
    offered = sparse_conv_variants(packed, geometry, size)
    variant = data.draw(st.sampled_from([None, *offered, *legal_variants(block)]))
    threads = data.draw(st.integers(1, 3))
    got = sparse_conv2d(
        x, packed, *bias, kernel_size=kernel, **how, variant=variant, threads=threads
    )
    assert_close(got, x, weight, *bias, **how)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(
    ("shape", "groups", "stride", "dilation"),
    [
        ((12, 9, 31), 1, 1, 1),
        ((12, 31, 9), 3, 1, 2),
        ((12, 25, 24), 1, 2, 1),
        ((12, 1, 200), 2, 1, 1),
    ],
)
def test_variants_and_thread_counts_give_the_same_bits(
    block: int, shape: tuple[int, int, int], groups: int, stride: int, dilation: int
) -> None:
    weight = random_kernel(48, 12 // groups, 3, 3, 0.3)
    packed = BlockRowWeight.pack(weight.flatten(1), block)
    x = torch.randn(2, *shape)
    how = {"stride": stride, "padding": dilation, "dilation": dilation, "groups": groups}
    first = sparse_conv2d(x, packed, kernel_size=3, **how, activation="silu", threads=1)
    assert_close(first, x, weight, **how, activation="silu")
    for i, variant in enumerate(legal_variants(block)):
        again = sparse_conv2d(
            x, packed, kernel_size=3, **how, activation="silu", variant=variant, threads=1 + i % 3
        )
        assert torch.equal(first, again), variant


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("bad", [NAN, float("inf"), float("-inf")])
def test_non_finite_inputs_reach_exactly_the_outputs_that_store_them(
    bad: float, padding: int
) -> None:
    weight = torch.zeros(6, 3, 3, 3)
    weight[0, 1, 0, 0] = weight[2, 1, 2, 1] = weight[3, 0, 1, 1] = weight[5, 1, 2, 2] = 1.0
    packed = BlockRowWeight.pack(weight.flatten(1), 1)
    x = torch.ones(1, 3, 9, 10)
    x[0, 1, 4, 5] = bad
    reached = F.conv2d((~x.isfinite()).float(), weight, None, 1, padding) != 0
    for variant in legal_variants(1):
        y = sparse_conv2d(x, packed, kernel_size=3, padding=padding, variant=variant)
        assert torch.equal(~y.isfinite(), reached)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 4), (5, 17), (7, 7), (9, 33), (14, 14)])
def test_what_scratch_held_before_does_not_matter(size: tuple[int, int], stride: int) -> None:
    weight = random_kernel(10, 7, 3, 3, 0.5)
    packed = BlockRowWeight.pack(weight.flatten(1), 1)
    x = torch.randn(3, 7, *size)
    how = {"stride": stride, "padding": 1}
    for variant in legal_variants(1):
        call = {"kernel_size": 3, **how, "variant": variant, "threads": 1}
        sparse_conv2d(torch.full((1, 7, 20, 36), NAN), packed, **call)
        assert_close(sparse_conv2d(x, packed, **call), x, weight, **how)


@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "gelu"])
@pytest.mark.parametrize("width", [40, 56, 64, 90])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 2), (2, 5)])
def test_rows_of_several_vectors_equal_torch(
    kernel: int, stride: int, width: int, activation: str
) -> None:
    weight = random_kernel(12, 9, kernel, kernel, 0.4)
    packed = BlockRowWeight.pack(weight.flatten(1), 1)
    x = torch.randn(2, 9, 21, width)
    how = {"stride": stride, "padding": kernel // 2, "activation": activation}
    how["residual"] = torch.randn_like(F.conv2d(x, weight, None, stride, kernel // 2))
    for variant in legal_variants(1)[::3]:
        y = sparse_conv2d(x, packed, kernel_size=kernel, variant=variant, **how)
        assert_close(y, x, weight, **how)


def test_nan_weights_spread_and_empty_rows_give_the_bias() -> None:
    weight = torch.zeros(4, 2, 3, 3)
    weight[1, 1, 1, 1] = NAN
    packed = BlockRowWeight.pack(weight.flatten(1), 1)
    bias = torch.arange(4.0)
    y = sparse_conv2d(torch.ones(2, 2, 5, 6), packed, bias, kernel_size=3, padding=1)
    assert y[:, 1].isnan().all()
    for row in (0, 2, 3):
        assert (y[:, row] == bias[row]).all()


def test_all_zero_weights_give_the_epilogue_of_the_bias() -> None:
    packed = BlockRowWeight.pack(torch.zeros(8, 27), 4)
    bias, residual = torch.randn(8), torch.randn(1, 8, 6, 6)
    y = sparse_conv2d(
        torch.full((1, 3, 6, 6), NAN), packed, bias, kernel_size=3, padding=1,
        activation="relu", residual=residual,
    )  # fmt: skip
    assert torch.equal(y, torch.relu(bias[:, None, None] + residual))


def test_nothing_is_read_or_written_outside_the_tensors() -> None:
    weight = random_kernel(5, 3, 3, 3, 0.7)
    packed = BlockRowWeight.pack(weight.flatten(1), 1)
    storage = torch.full((3 * 35 + 64,), NAN)
    x = storage[32 : 32 + 3 * 35].view(1, 3, 5, 7)
    x.copy_(torch.randn(1, 3, 5, 7))
    guarded = torch.full((5 * 35 + 64,), 123.0)
    out = guarded[32 : 32 + 5 * 35].view(1, 5, 5, 7)
    for stride in (1, 2):
        target = out if stride == 1 else None
        for variant in legal_variants(1):
            y = sparse_conv2d(
                x, packed, kernel_size=3, padding=1, stride=stride, variant=variant, out=target
            )
            assert_close(y, x, weight, padding=1, stride=stride)
    assert (guarded[:32] == 123).all()
    assert (guarded[-32:] == 123).all()


def test_strided_inputs_are_read_right() -> None:
    weight = random_kernel(6, 4, 3, 3, 0.5)
    packed = BlockRowWeight.pack(weight.flatten(1), 2)
    for x in (
        torch.randn(2, 4, 8, 6).contiguous(memory_format=torch.channels_last),
        torch.randn(4, 4, 8, 6)[::2],
        torch.randn(2, 9, 8, 6)[:, 3:7],
        torch.randn(2, 4, 10, 9)[..., 1:9, 2:8],
        torch.randn(1, 4, 8, 6).expand(3, -1, -1, -1),
        torch.randn(2, 1, 8, 6).expand(-1, 4, -1, -1),
    ):
        assert_close(sparse_conv2d(x, packed, kernel_size=3, padding=1), x, weight, padding=1)


def test_values_changed_in_place_are_seen() -> None:
    weight = random_kernel(4, 2, 3, 3, 0.5)
    packed = BlockRowWeight.pack(weight.flatten(1))
    x = torch.randn(1, 2, 6, 6)
    before = sparse_conv2d(x, packed, kernel_size=3)
    packed.values.mul_(2.0)
    torch.testing.assert_close(sparse_conv2d(x, packed, kernel_size=3), 2 * before)


def test_gradients_other_dtypes_and_reference_mode_take_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = random_kernel(4, 2, 3, 3, 0.5)
    packed = BlockRowWeight.pack(weight.flatten(1))
    x = torch.randn(1, 2, 6, 6, requires_grad=True)
    sparse_conv2d(x, packed, kernel_size=3).sum().backward()
    expected = x.detach().clone().requires_grad_()
    F.conv2d(expected, weight).sum().backward()
    torch.testing.assert_close(x.grad, expected.grad)
    double = BlockRowWeight.pack(weight.double().flatten(1))
    wide = sparse_conv2d(x.detach().double(), double, kernel_size=3)
    assert torch.equal(wide, F.conv2d(x.detach().double(), weight.double()))
    monkeypatch.setenv("AEROGEL_KERNELS", "reference")
    got = sparse_conv2d(x.detach(), packed, kernel_size=3)
    assert torch.equal(got, sparse_conv2d_reference(x.detach(), packed, kernel_size=3))


BAD = {
    "x: shape": {"x": torch.zeros(2, 6, 6)},
    "weight: shape": {"kernel_size": 5},
    "groups=3": {"groups": 3},
    "groups=0": {"groups": 0},
    "groups=1.5": {"groups": 1.5},
    "blocks of 4 rows cross": {"groups": 2, "weight": BlockRowWeight.pack(torch.ones(12, 9), 4)},
    "stride=0": {"stride": 0},
    r"padding=\(1, 2, 3\)": {"padding": (1, 2, 3)},
    "too large for a plane": {"dilation": 4},
    "bias: shape": {"bias": torch.zeros(5)},
    "residual: shape": {"residual": torch.zeros(1, 12, 6, 6)},
    "did you mean 'relu'": {"activation": "reul"},
    "threads=0": {"threads": 0},
    "out: ": {"out": torch.zeros(1)},
    "vectors=99": {"variant": SpmmVariant(99)},
}


@pytest.mark.parametrize("message", list(BAD))
def test_bad_arguments_are_named(message: str) -> None:
    arguments = {
        "x": torch.zeros(1, 2, 6, 6),
        "weight": BlockRowWeight.pack(torch.ones(12, 18), 1),
        "kernel_size": 3,
        **BAD[message],
    }
    with pytest.raises(ValueError, match=message):
        sparse_conv2d(**arguments)


@settings(max_examples=40, deadline=None)
@given(
    groups=st.sampled_from([1, 2]),
    size=st.tuples(st.integers(3, 20), st.integers(3, 30)),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    block=st.sampled_from(BLOCKS),
    batch=st.integers(1, 3),
    threads=st.integers(1, 3),
    data=st.data(),
)
def test_a_plan_gives_what_the_call_gives(
    groups: int,
    size: tuple[int, int],
    stride: int,
    dilation: int,
    block: int,
    batch: int,
    threads: int,
    data: st.DataObject,
) -> None:
    """Two convolutions: one reads the caller's bare tensor, one a padded plane."""
    weights = [random_kernel(8, 6 // groups, 3, 3, 0.4), random_kernel(8, 8 // groups, 3, 3, 0.4)]
    first, second = (BlockRowWeight.pack(w.flatten(1), block) for w in weights)
    x, bias = torch.randn(batch, 6, *size), torch.randn(8)
    how = {"stride": stride, "padding": dilation, "dilation": dilation, "groups": groups}
    y = sparse_conv2d(x, first, kernel_size=3, **how, activation="gelu")
    z = sparse_conv2d(
        y, second, bias, kernel_size=3, padding=1, groups=groups, residual=y, activation="relu"
    )
    builder = PlanBuilder(batch, threads)
    value = builder.input((6, *size))
    one = builder.sparse_conv2d(value, first, 3, **how, activation="gelu")
    variant = data.draw(st.sampled_from([None, *legal_variants(block)]))
    two = builder.sparse_conv2d(
        one, second, 3, bias, padding=1, groups=groups, residual=one, activation="relu",
        variant=variant,
    )  # fmt: skip
    assert one.shape == y.shape[1:]
    builder.output(two)
    plan = builder.build()
    plan.run([x])
    plan._native_plan().fill_idle_arenas(NAN)
    assert torch.equal(plan.run([x])[0], z)


def test_a_plan_describes_and_checks_its_sparse_convolutions() -> None:
    builder = PlanBuilder()
    x = builder.input((2, 6, 6))
    packed = BlockRowWeight.pack(torch.ones(12, 18), 1)
    with pytest.raises(ValueError, match="weight: shape"):
        builder.sparse_conv2d(x, packed, 5)
    with pytest.raises(TypeError, match="BlockRowWeight"):
        builder.sparse_conv2d(x, torch.ones(12, 18), 3)
    builder.output(builder.sparse_conv2d(x, packed, 3, name="conv"))
    (row,) = builder.build().describe()
    assert (row.name, row.kind, row.flops) == ("conv", "sparse_conv2d", 2 * 12 * 18 * 16)


def test_geometry_takes_numbers_or_pairs() -> None:
    assert ConvGeometry.of(3, 2, (1, 0)).numbers == [3, 3, 2, 2, 1, 0, 1, 1]
