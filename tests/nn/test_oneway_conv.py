"""One-way convolutions: the factored form is the dense one, and fits are as good as they say."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aerogel.nn import (
    OneWayConv2d,
    OneWayConv3d,
    OneWayConvTranspose2d,
    OneWayConvTranspose3d,
    compress_a_priori,
    fold,
)

KINDS = (OneWayConv2d, OneWayConv3d, OneWayConvTranspose2d, OneWayConvTranspose3d)
MODES = ("chain", "per_kernel", "cp")


def maps(layer: Any, side: int = 7) -> torch.Tensor:
    return torch.randn(2, layer.in_channels, *[side + j for j in range(layer.dims)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"dilation": 2}, {"padding": 1}])
def test_factored_form_equals_the_dense_layer(kind: Any, mode: str, options: Any) -> None:
    torch.manual_seed(0)
    layer = kind(3, 4, 3, rank=2, mode=mode, **options)
    x = maps(layer)
    torch.testing.assert_close(layer(x), layer.to_dense()(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("mode", MODES)
def test_circular_padding_commutes(kind: Any, mode: str) -> None:
    layer = kind(3, 4, 3, mode=mode, padding_mode="circular")
    x = maps(layer)
    torch.testing.assert_close(layer(x), layer.to_dense()(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES[:2])
def test_depthwise_equals_the_dense_layer(kind: Any, mode: str) -> None:
    layer = kind(4, 4, 3, mode=mode, groups=4)
    x = maps(layer)
    torch.testing.assert_close(layer(x), layer.to_dense()(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS[2:])
def test_output_padding_is_kept(kind: Any) -> None:
    layer = kind(3, 4, 3, 2, output_padding=1)
    x = maps(layer)
    assert layer(x).shape[2:] == tuple(2 * n for n in x.shape[2:])
    torch.testing.assert_close(layer(x), layer.to_dense()(x), atol=1e-5, rtol=1e-5)


def test_parameter_counts_follow_the_formulas() -> None:
    count = lambda layer: layer.num_parameters  # noqa: E731
    assert count(OneWayConv2d(8, 6, (3, 5), bias=False)) == 6 * (8 * 3 + 6 * 5)
    assert count(OneWayConv3d(8, 6, 3, bias=False)) == 6 * (8 * 3 + 6 * 3 + 6 * 3)
    assert count(OneWayConv3d(8, 6, 3, rank=2, mode="per_kernel", bias=False)) == 2 * 48 * 9
    assert count(OneWayConv3d(8, 6, 3, rank=5, mode="cp", bias=False)) == 5 * (8 + 9 + 6)
    assert OneWayConv3d(8, 6, 3).num_parameters_dense == nn.Conv3d(8, 6, 3).weight.numel() + 6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES[:2])
def test_full_rank_reproduces_a_plain_layer(kind: Any, mode: str) -> None:
    conv = kind._plain()(3, 4, 3, stride=2, padding=1)
    made = kind.from_dense(conv, mode=mode)
    x = maps(made)
    torch.testing.assert_close(made(x), conv(x), atol=1e-5, rtol=1e-5)


def test_error_of_a_chain_is_the_discarded_singular_values() -> None:
    conv = nn.Conv2d(4, 5, 3).double()
    made = OneWayConv2d.from_dense(conv, 6)
    unfolded = conv.weight.permute(1, 2, 3, 0).reshape(12, 15)
    lost = torch.linalg.svdvals(unfolded)[6:].square().sum()
    error = (made.materialize() - conv.weight).square().sum()
    torch.testing.assert_close(error, lost, rtol=1e-4, atol=0)


def test_cp_recovers_a_tensor_of_its_rank() -> None:
    torch.manual_seed(1)
    conv = OneWayConv3d(5, 6, 3, rank=2, mode="cp").double().to_dense()
    made = OneWayConv3d.from_dense(conv, 2, "cp")
    assert (made.materialize() - conv.weight).norm() < 1e-3 * conv.weight.norm()


def test_separable_kernels_need_one_term_and_rotated_ones_more() -> None:
    sobel = torch.outer(torch.tensor([1.0, 2, 1]), torch.tensor([-1.0, 0, 1]))
    conv = nn.Conv2d(1, 1, 3, bias=False)
    for kernel, separable in ((sobel, True), (torch.eye(3), False)):
        with torch.no_grad():
            conv.weight.copy_(kernel[None, None])
        made = OneWayConv2d.from_dense(conv, 1, "per_kernel").materialize()
        assert torch.allclose(made, conv.weight, atol=1e-6) == separable


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("mode", MODES)
def test_initial_variance_is_a_plain_layers(kind: Any, mode: str) -> None:
    torch.manual_seed(0)
    layer = kind(32, 32, 3, mode=mode, rank=3 if mode == "per_kernel" else 32, padding="valid")
    ratio = float(layer(maps(layer, 9)).var()) / 2.0
    assert 1 / 1.5 < ratio < 1.5


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_through_the_dense_kernel(kind: Any, mode: str) -> None:
    torch.manual_seed(0)
    layer = kind(3, 4, 3, rank=2, mode=mode).double()
    x = maps(layer).double().requires_grad_()
    wanted = [x, *layer.parameters()]
    found = torch.autograd.grad(layer(x).square().sum(), wanted)
    conv = F.conv2d if layer.dims == 2 else F.conv3d
    dense = conv(x, layer.materialize(), layer.bias, padding=1)
    torch.testing.assert_close(found, torch.autograd.grad(dense.square().sum(), wanted))


def test_its_text_tells_the_share_of_the_dense_parameters() -> None:
    assert "rank=6, parameters=0.281 of dense" in repr(OneWayConv3d(8, 6, 3))


def test_an_empty_batch_keeps_its_shape() -> None:
    assert OneWayConv3d(3, 4, 3, 2)(torch.zeros(0, 3, 5, 6, 7)).shape == (0, 4, 3, 3, 4)


def test_recomputing_gives_the_same_gradients() -> None:
    layer = OneWayConv3d(3, 4, 3)
    x = maps(layer)
    found = []
    for layer.checkpoint in (False, True):
        found.append(torch.autograd.grad(layer(x).square().sum(), list(layer.parameters())))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 4}, "even kernel"),
        ({"rank": 0}, "rank=0"),
        ({"groups": 2}, "groups=2"),
        ({"mode": "svd"}, "mode='svd'"),
        ({"padding_mode": "reflect"}, "padding_mode='reflect'"),
        ({"padding": "full"}, "padding='full'"),
        ({"stride": (1, 2, 3)}, "stride"),
        ({"in_channels": 0}, "in_channels=0"),
    ],
)
def test_bad_arguments_are_named(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OneWayConv2d(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3, **options})


def test_rank_above_the_exact_bound_is_cut_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="3 is exact"):
        assert OneWayConv2d(4, 4, 3, rank=9, mode="per_kernel").rank == 3


def test_other_layers_and_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected an nn\.Conv2d"):
        OneWayConv2d.from_dense(nn.Conv3d(2, 2, 3))
    with pytest.raises(ValueError, match="x: shape"):
        OneWayConv2d(4, 4, 3)(torch.zeros(1, 3, 8, 8))


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))


def test_compression_replaces_all_but_the_first_and_1x1() -> None:
    made = compress_a_priori(network(), rank=lambda name, conv: 5)
    assert [type(each) for each in made] == [nn.Conv2d, OneWayConv2d, nn.ReLU, nn.Conv2d]
    assert made[1].rank == 5
    with pytest.raises(ValueError, match="no convolution"):
        compress_a_priori(network(), skip=("first", "1x1", "1"))
    with pytest.raises(ValueError, match="1: groups=2"):
        compress_a_priori(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2)))


@pytest.mark.parametrize("dense", [True, False])
def test_fold_takes_the_faster_form_and_computes_the_same(dense: bool) -> None:
    made = compress_a_priori(network())
    x = torch.randn(1, 3, 9, 9)
    times = {"factored": 2.0 if dense else 1.0, "dense": 1.0 if dense else 2.0}
    folded = fold(made, x, measure=lambda contenders, seconds: times)
    assert isinstance(folded.model[1], nn.Conv2d) == dense == folded.layers[0].dense
    torch.testing.assert_close(folded.model(x), made(x), atol=1e-5, rtol=1e-5)
    assert math.isclose(folded.layers[0].dense_seconds, times["dense"])
    with pytest.raises(ValueError, match="no one-way layer"):
        fold(network(), x)
