"""Layers of long convolutions: one result for all algorithms, settings that do what they say."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from aerogel.kernels import FrequencyMask, fft_conv_reference
from aerogel.nn import (
    FlashFFTConv,
    FrequencySparseConv,
    HyenaOperator,
    LongConv,
    PartialConv,
    depthwise_conv1d,
    fft_conv,
    shorten_filters,
    sparsify_frequency,
)


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == expected.shape
    scale = float(expected.abs().max())
    assert float((got.double() - expected.double()).abs().max()) <= tolerance * scale


@pytest.mark.parametrize("n", [256, 512, 1000, 1024, 4096, 6144, 16384])
@pytest.mark.parametrize(
    ("algorithm", "causal"),
    [
        *((name, True) for name in ("auto", "fft", "monarch", "hybrid", "overlap_save")),
        *((name, False) for name in ("auto", "fft", "monarch", "hybrid")),
    ],
)
def test_algorithms_agree_with_gradients(n: int, algorithm: str, causal: bool) -> None:
    torch.manual_seed(0)
    length = n // 2 if causal else n
    shapes = [(1, 2, length), (2, length), (1, 2, length), (1, 2, length)]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    dy = torch.randn(1, 2, length, dtype=torch.float64)

    def computed(dtype: torch.dtype, way: str, count: int) -> list[Tensor]:
        inputs = [t.to(dtype).requires_grad_() for t in tensors[:count]]
        gates = dict(zip(("pre_gate", "post_gate"), inputs[2:], strict=False))
        y = fft_conv(*inputs[:2], n=n, causal=causal, algorithm=way, **gates)
        return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(dtype))]

    for count in (2, 3, 4):  # no gate, one, both
        expected = computed(torch.float64, "fft", count)
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
            for got, want in zip(computed(dtype, algorithm, count), expected, strict=True):
                assert_close(got, want, tolerance)


def test_the_reference_is_the_sum_that_defines_the_convolution() -> None:
    u, k = torch.randn(2, 3, 40, dtype=torch.float64), torch.randn(3, 40, dtype=torch.float64)
    apart = torch.arange(40)[:, None] - torch.arange(40)
    shifted = k[:, apart % 40]
    circular = torch.einsum("bhj,hij->bhi", u, shifted)
    causal = torch.einsum("bhj,hij->bhi", u, shifted * (apart >= 0))
    assert_close(fft_conv(u, k, algorithm="fft", causal=False), circular, 1e-12)
    assert_close(fft_conv(u, k, algorithm="fft"), causal, 1e-12)


def test_module_is_causal_where_both_fit_and_circular_where_not() -> None:
    u, k = torch.randn(2, 3, 512), torch.randn(3, 512)
    for n, causal in ((1024, True), (512, False)):
        expected = fft_conv_reference(u.double(), k.double(), n=n, causal=causal)
        assert_close(FlashFFTConv(n)(u, k), expected)


def test_partial_equals_a_filter_with_zeros() -> None:
    u, k = torch.randn(2, 3, 512), torch.randn(3, 512)
    cut = torch.cat((k[:, :100], torch.zeros(3, 412)), 1)
    expected = fft_conv_reference(u.double(), cut.double())
    assert_close(PartialConv(1024, 100)(u, k), expected)
    assert_close(fft_conv(u, k, partial=100, algorithm="overlap_save"), expected)


@pytest.mark.parametrize("algorithm", ["auto", "monarch", "hybrid"])
def test_frequency_patterns_equal_masked_spectra(algorithm: str) -> None:
    u, k = torch.randn(2, 3, 2048), torch.randn(3, 2048)
    for conv in (
        FrequencySparseConv(4096, 0.25),
        FrequencySparseConv(4096, 0.25, pattern="block"),
        FrequencySparseConv(4096, factors=(8, 16, 32), zeros=(4, 0, 5)),
    ):
        conv.algorithm = algorithm
        assert conv.freq_keep is not None
        kept = torch.fft.fft(k.double(), 4096) * conv.freq_keep.kept(4096)
        spectrum = torch.fft.fft(u.double(), 4096) * kept
        assert_close(conv(u, k), torch.fft.ifft(spectrum).real[..., :2048])
    assert FrequencySparseConv(4096, 1.0).freq_keep == FrequencyMask()


@pytest.mark.parametrize("layout", ["BHL", "BLH"])
def test_depthwise_convolution_is_the_long_one_with_few_taps(layout: str) -> None:
    u, k = torch.randn(2, 3, 40), torch.randn(3, 4)
    x = u if layout == "BHL" else u.transpose(1, 2)
    y = depthwise_conv1d(x, k, layout=layout)
    y = y if layout == "BHL" else y.transpose(1, 2)
    assert_close(y, fft_conv_reference(u.double(), k.double()))


@pytest.mark.parametrize("make", [LongConv, HyenaOperator])
def test_layers_are_causal_and_every_parameter_learns(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    layer = make(8, 300)
    time_dim = 2 if make is LongConv else 1
    x = torch.randn(2, 8, 300) if time_dim == 2 else torch.randn(2, 300, 8)
    changed = x.clone()
    changed.narrow(time_dim, 200, 100).add_(3)
    with torch.no_grad():
        difference = (layer(x) - layer(changed)).abs()
    assert float(difference.narrow(time_dim, 0, 200).max()) < 1e-4
    assert float(difference.narrow(time_dim, 200, 100).max()) > 1e-3
    layer(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in layer.parameters())


def test_trained_models_are_made_sparse_and_dense_again() -> None:
    model = nn.Sequential(LongConv(4, 256), LongConv(4, 256))
    x = torch.randn(2, 4, 256)
    with torch.no_grad():
        dense = model(x)
        assert sparsify_frequency(model, 0.5) == 2
        assert not torch.equal(model(x), dense)
        assert sparsify_frequency(model, 0.0) == 2
        assert torch.equal(model(x), dense)
        assert shorten_filters(model, 64) == 2
        cut = copy.deepcopy(model)
        shorten_filters(cut, None)
        for layer in cut:
            layer.kernel[:, 64:] = 0
        assert_close(model(x), cut(x))


def test_compiled_layer_is_one_graph_and_learns_the_same() -> None:
    layer, u = LongConv(4, 300), torch.randn(2, 4, 300)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    results = []
    for call in (layer, compiled):
        layer.zero_grad()
        y = call(u)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in layer.parameters())])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(u), layer(u))


def test_state_is_plain_and_loads() -> None:
    model = HyenaOperator(4, 64)
    other = HyenaOperator(4, 64)
    other.load_state_dict(model.state_dict())
    x = torch.randn(1, 64, 4)
    assert torch.equal(model(x), other(x))


def test_bad_arguments_are_named() -> None:
    u, k = torch.zeros(1, 2, 8), torch.zeros(2, 8)
    with pytest.raises(ValueError, match="algorithm='fast'"):
        fft_conv(u, k, algorithm="fast")
    with pytest.raises(ValueError, match="partial=0"):
        fft_conv(u, k, partial=0)
    with pytest.raises(ValueError, match="algorithm='overlap_save'"):
        fft_conv(u, k, freq_keep=0.5, algorithm="overlap_save")
    with pytest.raises(ValueError, match="seqlen=0"):
        FlashFFTConv(0)
    with pytest.raises(ValueError, match="keep=None"):
        FrequencySparseConv(64)
    with pytest.raises(ValueError, match=r"keep=1.5"):
        FrequencySparseConv(64, 1.5)
    with pytest.raises(ValueError, match="pattern='high'"):
        FrequencySparseConv(64, 0.5, pattern="high")
    with pytest.raises(ValueError, match="seqlen=24"):
        FrequencySparseConv(24, 0.5, pattern="block")
    with pytest.raises(ValueError, match=r"factors=\(8, 4\)"):
        FrequencySparseConv(64, factors=(8, 4), zeros=(1, 1))
    with pytest.raises(ValueError, match="layout='LBH'"):
        depthwise_conv1d(u, k, layout="LBH")
    with pytest.raises(ValueError, match=r"weight: shape \(3, 8\)"):
        depthwise_conv1d(u, torch.zeros(3, 8))
    with pytest.raises(ValueError, match="order=1"):
        HyenaOperator(4, 8, order=1)
    with pytest.raises(ValueError, match="d=0"):
        LongConv(0, 8)
    with pytest.raises(ValueError, match=r"sparsity=1"):
        sparsify_frequency(LongConv(2, 8), 1.0)
    with pytest.raises(ValueError, match="no long convolution"):
        sparsify_frequency(nn.Linear(2, 2), 0.5)
    with pytest.raises(ValueError, match="taps=0"):
        shorten_filters(LongConv(2, 8), 0)


def test_a_long_convolution_of_the_authors_reads_to_both_sides():
    d, length = 3, 20
    state = {
        "D": torch.randn(1, d),
        "kernel": torch.randn(1, d, 2 * length),
        "output_linear.0.weight": torch.randn(2 * d, d),
        "output_linear.0.bias": torch.randn(2 * d),
        "flashfftconv.twid": torch.zeros(1),
    }
    layer = LongConv.from_published(state, squash=0.3).eval()
    u = torch.randn(2, d, length)
    k = state["kernel"][0]
    k = k.sign() * (k.abs() - 0.3).relu()
    apart = torch.arange(length)[:, None] - torch.arange(length)
    y = torch.einsum("bhj,hij->bhi", u, k[:, apart % (2 * length)]) + state["D"].T * u
    y = nn.functional.gelu(y).transpose(1, 2) @ state["output_linear.0.weight"].T
    want = nn.functional.glu(y + state["output_linear.0.bias"], -1).transpose(1, 2)
    torch.testing.assert_close(layer(u), want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="expected"):
        LongConv.from_published({"D": state["D"]})
    with pytest.raises(ValueError, match="kernel"):
        LongConv.from_published(state | {"kernel": torch.randn(2, d, 8)})
