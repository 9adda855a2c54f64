"""The sparse product against its reference: every instruction set, block, layout and variant."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import needs_native
from torch import Tensor

from aerogel import kernels
from aerogel.kernels import BlockRowWeight, spmm, spmm_reference, spmm_variants
from aerogel.kernels._library import native

pytestmark = [needs_native, pytest.mark.usefixtures("instruction_set")]

BLOCKS = (1, 2, 4)
SIZES = (1, 2, 3, 5, 7, 8, 13, 16, 17, 31, 49, 64, 67, 101)


def random_weight(rows: int, cols: int, density: float, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, cols, generator=g) < density
    return torch.randn(rows, cols, generator=g) * mask


def assert_matches(got: Tensor, x: Tensor, weight: BlockRowWeight, *bias: Tensor, **how: object):
    """Within 1e-5 of sum |w| |x| of the float64 reference."""
    double = BlockRowWeight(
        weight.values.double(), weight.columns, weight.row_ptr, weight.shape, weight.block
    )
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in how.items()}
    layout = str(how.get("layout", "channels"))
    expected = spmm_reference(x.double(), double, *(b.double() for b in bias), **wide)
    magnitude = BlockRowWeight(
        double.values.abs(), weight.columns, weight.row_ptr, weight.shape, weight.block
    )
    scale = 1 + spmm_reference(x.double().abs(), magnitude, layout=layout)
    assert got.shape == expected.shape
    assert ((got - expected).abs() <= 1e-5 * scale).all()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from(SIZES),
    cols=st.sampled_from(SIZES),
    columns=st.sampled_from(SIZES),
    batch=st.integers(0, 3),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    block=st.sampled_from(BLOCKS),
    activation=st.sampled_from(sorted(kernels.ACTIVATIONS)),
    layout=st.sampled_from(["channels", "tokens"]),
    with_bias=st.booleans(),
    with_residual=st.booleans(),
    data=st.data(),
)
def test_any_shape_matches_the_reference(
    rows: int,
    cols: int,
    columns: int,
    batch: int,
    density: float,
    block: int,
    activation: str,
    layout: str,
    with_bias: bool,
    with_residual: bool,
    data: st.DataObject,
) -> None:
    weight = BlockRowWeight.pack(random_weight(rows, cols, density, 7), block)
    tokens = layout == "tokens"
    x = torch.randn((batch, columns, cols) if tokens else (batch, cols, columns))
    residual = torch.randn((batch, columns, rows) if tokens else (batch, rows, columns))
    bias = [torch.randn(rows)] if with_bias else []
    how = {"activation": activation, "layout": layout}
    if with_residual:
        how["residual"] = residual
    variant = data.draw(st.sampled_from(spmm_variants(weight, columns, layout)))
    threads = data.draw(st.integers(1, 3))
    got = spmm(x, weight, *bias, **how, variant=variant, threads=threads)
    assert_matches(got, x, weight, *bias, **how)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("layout", ["channels", "tokens"])
def test_variants_and_thread_counts_give_the_same_bits(block: int, layout: str) -> None:
    weight = BlockRowWeight.pack(random_weight(93, 130, 0.2, 1), block)
    x = torch.randn((2, 130, 10, 11) if layout == "channels" else (2, 67, 130))
    first = spmm(x, weight, layout=layout, threads=1)
    columns = 110 if layout == "channels" else 134
    for variant in spmm_variants(weight, columns, layout):
        for threads in (1, 2, 5):
            again = spmm(x, weight, layout=layout, variant=variant, threads=threads)
            assert torch.equal(first, again), (variant, threads)


def legal_variants(block: int) -> list[kernels.SpmmVariant]:
    """Every register tile; rows in lockstep need packed activations."""
    lockstep = native().spmm_lockstep()
    widest = {g: native().spmm_max_vectors(g, block) for g in (1, 2, 4, lockstep)}
    return [
        kernels.SpmmVariant(vectors, groups, *rest)
        for groups, limit in widest.items()
        for vectors in range(1, limit + 1)
        for rest in ((1, 1, False, 1), (3, 4, True, 3), (2, 2, False, 5), (1, 1, True, 2))
        if groups < lockstep or rest[2]
    ]


@pytest.mark.parametrize("block", BLOCKS)
def test_every_register_tile_is_right(block: int) -> None:
    weight = BlockRowWeight.pack(random_weight(37, 29, 0.4, 2), block)
    x, bias = torch.randn(1, 29, 211), torch.randn(37)
    residual = torch.randn(1, 37, 211)
    how = {"activation": "relu6", "residual": residual}
    first = spmm(x, weight, bias, **how)
    assert_matches(first, x, weight, bias, **how)
    for variant in legal_variants(block):
        assert torch.equal(first, spmm(x, weight, bias, **how, variant=variant)), variant


@pytest.mark.parametrize("block", BLOCKS)
def test_rows_of_every_length_are_right_in_panels_of_every_width(block: int) -> None:
    # Loops take several columns at a time and planes this large are asked for ahead.
    lengths = torch.arange(14).repeat_interleave(block)
    order = torch.rand(14, 64, generator=torch.Generator().manual_seed(3)).argsort(1).argsort(1)
    keep = order.repeat_interleave(block, 0) < lengths[:, None]
    weight = BlockRowWeight.pack(random_weight(14 * block, 64, 1.0, 3) * keep, block)
    x, bias = torch.randn(1, 64, 1201), torch.randn(14 * block)
    first = spmm(x, weight, bias)
    assert_matches(first, x, weight, bias)
    for vectors in range(1, native().spmm_max_vectors(1, block) + 1):
        for pack, column_tiles in ((False, 1), (False, 8), (True, 1), (True, 8)):
            variant = kernels.SpmmVariant(vectors, 1, 1, 1, pack, column_tiles)
            assert torch.equal(first, spmm(x, weight, bias, variant=variant)), variant


@pytest.mark.parametrize("activation", sorted(kernels.ACTIVATIONS))
def test_activations_are_accurate_over_their_whole_range(activation: str) -> None:
    x = torch.cat([torch.linspace(-20, 20, 4001), torch.tensor([-1e30, -88.0, 0.0, 88.0, 1e30])])
    weight = BlockRowWeight.pack(torch.ones(1, 1))
    got = spmm(x.reshape(1, 1, -1), weight, activation=activation).flatten()
    expected = kernels.reference_activation(x.double(), activation)
    error = (got.double() - expected).abs()
    assert (error <= 1e-6 + 1e-6 * expected.abs()).all(), x[error.argmax()]


@pytest.mark.parametrize("activation", sorted(kernels.ACTIVATIONS))
@pytest.mark.parametrize("layout", ["channels", "tokens"])
def test_nan_reaches_the_outputs_that_use_it_and_no_others(activation: str, layout: str) -> None:
    dense = torch.zeros(6, 5)
    dense[0, 0] = dense[1, 3] = dense[4, 3] = 1.0
    weight = BlockRowWeight.pack(dense, 1)
    x = torch.ones(1, 9, 5) if layout == "tokens" else torch.ones(1, 5, 9)
    (x[0, 4] if layout == "tokens" else x[0, :, 4])[3] = float("nan")
    packed = [kernels.SpmmVariant(1, native().spmm_lockstep(), pack=True)]
    for variant in spmm_variants(weight, 9, layout) + packed:
        y = spmm(x, weight, activation=activation, layout=layout, variant=variant)
        planes = y[0].t() if layout == "tokens" else y[0]
        where = planes.isnan().nonzero().tolist()
        assert where == [[1, 4], [4, 4]]


def test_rows_in_lockstep_keep_the_sign_of_zero() -> None:
    """Their shorter rows are padded with steps that may not even turn -0.0 into 0.0."""
    lockstep = native().spmm_lockstep()
    dense = torch.zeros(lockstep, 3)
    dense[0] = 1.0  # longer than all the others, whose sums are -0.0
    weight = BlockRowWeight.pack(dense, 1)
    bias = torch.full((lockstep,), -0.0)
    variant = kernels.SpmmVariant(1, lockstep, pack=True)
    y = spmm(torch.ones(1, 3, 5), weight, bias, variant=variant)[0]
    assert (y[0] == 3).all()
    assert (y[1:] == 0).all()
    assert y[1:].signbit().all()


def test_infinities_and_nan_weights_propagate() -> None:
    dense = torch.zeros(3, 4)
    dense[0, 1], dense[1, 2] = 2.0, float("nan")
    weight = BlockRowWeight.pack(dense, 1)
    x = torch.ones(1, 4, 7)
    x[0, 1, 3] = float("-inf")
    y = spmm(x, weight)[0]
    assert y[0, 3] == float("-inf")
    assert y[0, :3].tolist() == [2.0] * 3
    assert y[1].isnan().all()
    assert (y[2] == 0).all()


def test_non_finite_values_beyond_a_row_are_never_mixed_in() -> None:
    """Vectors reach past the last column; what lies there must not matter."""
    weight = BlockRowWeight.pack(random_weight(8, 5, 1.0, 3))
    storage = torch.full((5, 23), float("nan"))
    storage[:, :17] = torch.randn(5, 17)
    x = storage[None, :, :17]
    assert not x.is_contiguous()
    for variant in spmm_variants(weight, 17):
        assert_matches(spmm(x, weight, variant=variant), x, weight)


@pytest.mark.parametrize("columns", [1, 7, 49])
def test_nothing_is_written_outside_the_result(columns: int) -> None:
    weight = BlockRowWeight.pack(random_weight(6, 5, 0.5, 3), 2)
    x = torch.randn(1, 5, columns)
    for variant in spmm_variants(weight, columns):
        guarded = torch.full((6 * columns + 64,), 123.0)
        out = guarded[32 : 32 + 6 * columns].view(1, 6, columns)
        spmm(x, weight, variant=variant, out=out)
        assert (guarded[:32] == 123).all()
        assert (guarded[32 + 6 * columns :] == 123).all()
        assert_matches(out, x, weight)


def strided_inputs() -> dict[str, Tensor]:
    torch.manual_seed(0)
    base = torch.randn(3, 12, 8, 6)
    return {
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "every second image": torch.randn(6, 12, 8, 6)[::2],
        "slice of channels": torch.randn(3, 20, 8, 6)[:, 4:16],
        "cropped planes": torch.randn(3, 12, 10, 9)[..., 1:9, 2:8],
        "transposed planes": torch.randn(3, 12, 6, 8).transpose(2, 3),
        "expanded batch": torch.randn(1, 12, 8, 6).expand(3, -1, -1, -1),
        "expanded channels": torch.randn(3, 1, 8, 6).expand(-1, 12, -1, -1),
        "one image": torch.randn(1, 20, 8, 6)[:, :12].expand(3, -1, -1, -1),
    }


@pytest.mark.parametrize("name", list(strided_inputs()))
def test_strided_inputs_and_residuals_are_read_right(name: str) -> None:
    weight = BlockRowWeight.pack(random_weight(12, 12, 0.5, 4), 1)
    x = strided_inputs()[name]
    assert_matches(spmm(x, weight, residual=x), x, weight, residual=x)


def test_strided_tokens_and_biases_are_read_right() -> None:
    weight = BlockRowWeight.pack(random_weight(12, 10, 0.5, 5), 4)
    x = torch.randn(10, 3, 7).permute(2, 1, 0)
    bias = torch.randn(24)[::2]
    assert_matches(spmm(x, weight, bias, layout="tokens"), x, weight, bias, layout="tokens")


def test_result_may_replace_its_residual() -> None:
    weight = BlockRowWeight.pack(random_weight(9, 9, 0.5, 6))
    x, y = torch.randn(2, 9, 25), torch.randn(2, 9, 25)
    expected = spmm(x, weight, residual=y, activation="gelu")
    assert spmm(x, weight, residual=y, activation="gelu", out=y) is y
    assert torch.equal(y, expected)


def test_other_dtypes_take_the_reference() -> None:
    weight = BlockRowWeight.pack(random_weight(5, 6, 0.5, 7).double())
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    assert torch.equal(spmm(x, weight), spmm_reference(x, weight))


def test_reference_mode_runs_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AEROGEL_KERNELS", "reference")
    weight = BlockRowWeight.pack(random_weight(5, 6, 0.5, 8))
    x = torch.randn(2, 6, 4)
    assert torch.equal(spmm(x, weight), spmm_reference(x, weight))


def test_concurrent_calls_do_not_disturb_each_other() -> None:
    from concurrent.futures import ThreadPoolExecutor

    weight = BlockRowWeight.pack(random_weight(64, 64, 0.3, 9))
    inputs = [torch.randn(1, 50, 64) for _ in range(8)]
    expected = [spmm(x, weight, layout="tokens", threads=1) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda x: spmm(x, weight, layout="tokens", threads=2), inputs * 5))
    assert all(torch.equal(a, b) for a, b in zip(got, expected * 5, strict=True))
