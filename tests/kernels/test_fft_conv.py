"""Long convolutions by transforms: the native kernels against torch.fft in double precision."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import ISAS, needs_native
from torch import Tensor

from aerogel import kernels
from aerogel.kernels import FrequencyMask, PreparedFilter, fft_conv, fft_conv_reference
from aerogel.kernels import fft_conv_trainable as trainable
from aerogel.kernels.fft_conv import check_conv, native_route
from aerogel.kernels.fft_conv_plan import find_route, grid_size

# Every outer step, part of a tile, several levels of splits, odd lengths.
LENGTHS = (1, 5, 17, 255, 256, 300, 512, 700, 784, 1000, 1024, 1290, 1700, 2048, 4096, 6144)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Within `tolerance` of the largest value: transforms mix all values of a row."""
    assert got.shape == expected.shape
    if expected.numel():
        scale = max(float(expected.abs().max()), 1e-30)
        assert float((got.double() - expected.double()).abs().max()) <= tolerance * scale


@needs_native
@pytest.mark.usefixtures("instruction_set")
@settings(max_examples=30, deadline=None)
@given(
    length=st.sampled_from(LENGTHS),
    taps=st.sampled_from(LENGTHS),
    batch=st.integers(0, 3),
    channels=st.integers(1, 3),
    gates=st.tuples(st.booleans(), st.booleans()),
    circular=st.booleans(),
    threads=st.integers(1, 3),
)
def test_convolution_matches_the_reference(
    length: int,
    taps: int,
    batch: int,
    channels: int,
    gates: tuple[bool, bool],
    circular: bool,
    threads: int,
) -> None:
    taps = min(taps, length) if circular else taps
    u, k = randn(batch, channels, length), randn(channels, taps, seed=1)
    both = [randn(batch, channels, length, seed=2 + i) if g else None for i, g in enumerate(gates)]
    got = fft_conv(u, k, *both, causal=not circular, threads=threads)
    doubles = [None if t is None else t.double() for t in (u, k, *both)]
    assert_close(got, fft_conv_reference(*doubles, causal=not circular))


@needs_native
@pytest.mark.usefixtures("instruction_set")
@settings(max_examples=25, deadline=None)
@given(
    length=st.sampled_from((1, 300, 512, 1000, 1024, 3000)),
    taps=st.sampled_from((1, 64, 256, 512, 1024)),
    gates=st.tuples(st.booleans(), st.booleans()),
    case=st.sampled_from(("causal", "circular", "lowpass", "blocks", "few blocks")),
)
def test_gradients_match_the_reference(
    length: int, taps: int, gates: tuple[bool, bool], case: str
) -> None:
    n, causal, mask = None, case != "circular", None
    if case == "circular":
        taps = min(taps, length)
    if case in ("lowpass", "blocks", "few blocks"):
        n = 8192
        mask = {
            "lowpass": FrequencyMask(lowpass=0.3),
            "blocks": FrequencyMask((8, 32, 32), (2, 0, 7)),
            "few blocks": FrequencyMask((16, 512), (14, 3)),
        }[case]
    tensors = [randn(2, 2, length), randn(2, taps, seed=1)]
    tensors += [randn(2, 2, length, seed=2 + i) for i in range(2)]
    used = [True, True, *gates]
    results = []
    for dtype in (torch.float32, torch.float64):  # native, reference
        inputs = [t.to(dtype).requires_grad_() for t in tensors]
        chosen = [t if use else None for t, use in zip(inputs, used, strict=True)]
        y = trainable(*chosen, n=n, causal=causal, mask=mask)
        wanted = [t for t, use in zip(inputs, used, strict=True) if use]
        results.append([y.detach(), *torch.autograd.grad(y, wanted, randn(*y.shape).to(dtype))])
    for got, expected in zip(*results, strict=True):
        assert_close(got, expected)


@needs_native
@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("length", [1000, 2048])
@pytest.mark.parametrize(
    "mask",
    [
        FrequencyMask(lowpass=0.25),
        FrequencyMask((16, 256), (0, 0)),
        FrequencyMask((16, 256), (14, 0)),
        FrequencyMask((16, 256), (15, 100)),
        FrequencyMask((4, 32, 32), (1, 5, 16)),
        FrequencyMask((8, 512), (5, 1), 0.5),
    ],
)
def test_masked_frequencies_match_the_masked_spectrum(length: int, mask: FrequencyMask) -> None:
    u, k = randn(2, 3, length).double(), randn(3, length, seed=1).double()
    kept = torch.fft.fft(k, 4096) * mask.kept(4096)
    expected = torch.fft.ifft(torch.fft.fft(u, 4096) * kept).real[..., :length]
    assert_close(fft_conv_reference(u, k, n=4096, mask=mask), expected, 1e-10)
    spec = check_conv(u.float(), k.float(), None, None, 4096, True, mask)
    assert native_route(u.float(), k.float(), spec) is not None
    assert_close(fft_conv(u.float(), k.float(), n=4096, mask=mask), expected)


@needs_native
@pytest.mark.usefixtures("instruction_set")
def test_short_filter_in_segments_equals_one_shot() -> None:
    u, k = randn(2, 2, 70_001), randn(2, 300, seed=1)
    route = find_route(140_002, 70_001, 300, True, None)
    assert route is not None
    assert route.n < 70_001 // 8
    assert_close(fft_conv(u, k), fft_conv_reference(u.double(), k.double()))


@needs_native
@pytest.mark.usefixtures("instruction_set")
def test_every_thread_count_gives_the_same_bits() -> None:
    u, k, dy = randn(5, 7, 5000), randn(7, 5000, seed=1), randn(5, 7, 5000, seed=2)
    seen = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            inputs = u.clone().requires_grad_(), k.clone().requires_grad_()
            y = trainable(*inputs)
            seen.append((y.detach(), *torch.autograd.grad(y, inputs, dy)))
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, seen[0], strict=True))


@needs_native
def test_every_instruction_set_is_near_the_others() -> None:
    u, k = randn(2, 3, 3000), randn(3, 3000, seed=1)
    before, results = kernels.isa(), []
    try:
        for name in ISAS:
            kernels.set_isa(name)
            results.append(fft_conv(u, k))
    finally:
        kernels.set_isa(before)
    for other in results[1:]:
        assert_close(other, results[0], 1e-6)


def test_later_values_do_not_reach_earlier_ones() -> None:
    u, k = randn(1, 2, 1500), randn(2, 1500, seed=1)
    changed = u.clone()
    changed[..., 700:] += 5
    difference = (fft_conv(u, k) - fft_conv(changed, k)).abs()
    assert float(difference[..., :700].max()) < 1e-4 < float(difference[..., 700:].max())


@pytest.mark.parametrize("length", [3, 256, 1000, 4096, 20_000])
def test_delta_filter_is_the_identity(length: int) -> None:
    u, delta = randn(2, 3, length), torch.zeros(3, length)
    delta[:, 0] = 1
    assert_close(fft_conv(u, delta), u, 1e-6)


def test_other_strides_are_read_right() -> None:
    wide = randn(4, 6, 2000)
    k = randn(3, 900, seed=1)
    for u in (wide[::2, 1::2, 5:905], wide.transpose(0, 1)[:2, :3, :900], wide[:2, :3, ::2]):
        gate = wide.flip(2)[: u.shape[0], :3, : u.shape[2]]
        expected = fft_conv_reference(u.double(), k.double(), gate.double())
        assert_close(fft_conv(u, k, gate), expected)
    one = randn(1, 1, 900).expand(4, 3, 900)
    assert_close(fft_conv(one, k), fft_conv_reference(one.double(), k.double()))
    assert_close(fft_conv(one, k.t().contiguous().t()), fft_conv(one, k), 0.0)


def test_extremes_stay_finite_and_near() -> None:
    for scale in (1e-30, 1e-12, 1e12, 1e18):
        u, k = scale * randn(1, 2, 1024), randn(2, 1024, seed=1)
        assert_close(fft_conv(u, k), fft_conv_reference(u.double(), k.double()))
    u = randn(1, 2, 1024)
    u[0, 0, 3] = torch.nan
    y = fft_conv(u, randn(2, 1024))
    assert bool(y[0, 0, 3:].isnan().all())
    assert bool(y[0, 1].isfinite().all())


def test_shorter_dtypes_are_computed_in_float32() -> None:
    u, k = randn(2, 3, 700).bfloat16(), randn(3, 700, seed=1).bfloat16()
    y = fft_conv(u, k)
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, fft_conv(u.float(), k.float()).bfloat16())
    assert fft_conv(u.double(), k.double()).dtype is torch.float64


def test_empty_sequences_give_empty_results_and_zero_gradients() -> None:
    assert fft_conv(torch.zeros(0, 3, 8), torch.ones(3, 8)).shape == (0, 3, 8)
    assert fft_conv(torch.zeros(2, 0, 8), torch.ones(0, 8)).shape == (2, 0, 8)
    assert fft_conv(torch.zeros(2, 3, 0), torch.ones(3, 8)).shape == (2, 3, 0)
    k = torch.ones(3, 8, requires_grad=True)
    trainable(torch.zeros(0, 3, 8), k).sum().backward()
    assert k.grad is None or not k.grad.any()


@needs_native
def test_prepared_filter_gives_the_same_bits() -> None:
    u, k, gate = randn(2, 3, 1000), randn(3, 1000, seed=1), randn(2, 3, 1000, seed=2)
    for options in ({}, {"n": 4096, "mask": FrequencyMask((16, 256), (14, 0))}):
        prepared = PreparedFilter(k, 1000, **options)
        assert torch.equal(prepared(u, gate, gate), fft_conv(u, k, gate, gate, **options))
    with pytest.raises(ValueError, match="length 999"):
        prepared(u[..., :999])


@needs_native
def test_reference_mode_uses_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    u, k = randn(2, 3, 1000), randn(3, 1000, seed=1)
    monkeypatch.setenv("AEROGEL_KERNELS", "reference")
    assert torch.equal(fft_conv(u, k), fft_conv_reference(u, k))


@settings(max_examples=200, deadline=None)
@given(length=st.integers(1, 1 << 21))
def test_sizes_waste_at_most_a_third(length: int) -> None:
    size = grid_size(length)
    assert size >= length
    assert length <= 256 or size <= max(512, 1.5 * length)


@needs_native
@pytest.mark.parametrize("mask", [None, FrequencyMask((16, 128), (14, 1))])
@pytest.mark.parametrize("gated", [False, True])
def test_operator_passes_opcheck(mask: FrequencyMask | None, gated: bool) -> None:
    tensors = [randn(2, 3, 300), randn(3, 300, seed=1)]
    tensors += [randn(2, 3, 300, seed=2), randn(2, 3, 300, seed=3)] if gated else []
    inputs = [t.requires_grad_() for t in tensors] + [None] * (4 - len(tensors))
    parts = mask or FrequencyMask()
    settings_ = (2048, True, list(parts.factors), list(parts.zeros), parts.lowpass)
    torch.library.opcheck(torch.ops.aerogel.fft_conv.default, (*inputs, *settings_))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(3, 8)}, r"u: shape \(3, 8\)"),
        ({"k": torch.zeros(4, 8)}, r"k: shape \(4, 8\), expected \(3, taps\)"),
        ({"k": torch.zeros(3, 8, dtype=torch.complex64)}, "k: torch.complex64, expected a real"),
        ({"u": torch.zeros(2, 3, 8).half()}, "u: float16 on the CPU"),
        ({"pre_gate": torch.zeros(2, 3, 7)}, r"pre_gate: shape \(2, 3, 7\)"),
        ({"post_gate": torch.zeros(1, 3, 8)}, r"post_gate: shape \(1, 3, 8\)"),
        ({"n": 14}, "n=14: expected at least 15"),
        ({"n": 7, "causal": False}, "n=7: expected at least 8"),
        ({"mask": FrequencyMask(lowpass=0.0)}, "freq_keep=0.0"),
        ({"mask": FrequencyMask(lowpass=1.5)}, "freq_keep=1.5"),
        ({"mask": FrequencyMask((4, 5), (0, 0))}, r"factors=\(4, 5\): expected a product of n=16"),
        ({"mask": FrequencyMask((4, 4), (0, 4))}, r"zeros=\(0, 4\)"),
        ({"mask": FrequencyMask((4, 4), (0,))}, r"zeros=\(0,\)"),
        ({"threads": 0}, "threads=0"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    arguments = {"u": torch.zeros(2, 3, 8), "k": torch.zeros(3, 8), **change}
    with pytest.raises(ValueError, match=message):
        fft_conv(arguments.pop("u"), arguments.pop("k"), **arguments)


@needs_native
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1000, 4, 4, 4), "n=1000, outer=4"),
        ((1024, 8, 8, 8), "n=1024, outer=8"),
        ((1024, 4, 5, 4), "blocks=5"),
        ((4096, 16, 4, 9), "inputs=9"),
        ((1024, 0, 1, 1), "outer=0"),
    ],
)
def test_native_plan_refuses_contradictions(shape: tuple[int, ...], message: str) -> None:
    from aerogel.kernels._library import native

    with pytest.raises(ValueError, match=message):
        native().fft_conv_plan(*shape, True, False, False)
