"""SparseConv1x1: the same function masked, packed, saved and loaded; bad layers are refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from aerogel import kernels
from aerogel.nn import SparseConv1x1

SIZES = (1, 3, 7, 8, 13, 32)


def rounding(layer: SparseConv1x1, x: torch.Tensor) -> torch.Tensor:
    """1e-5 of sum |w| |x| for every output."""
    return 1e-5 * (1 + torch.nn.functional.conv2d(x.abs(), layer.masked_weight.detach().abs()))


@settings(max_examples=30, deadline=None)
@given(
    inputs=st.sampled_from(SIZES),
    outputs=st.sampled_from(SIZES),
    side=st.sampled_from([1, 2, 7]),
    batch=st.integers(0, 2),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    block=st.sampled_from([1, 2, 4]),
    activation=st.sampled_from(["none", "relu6", "hardswish"]),
)
def test_packed_layer_computes_what_the_masked_one_does(
    inputs: int,
    outputs: int,
    side: int,
    batch: int,
    density: float,
    block: int,
    activation: str,
) -> None:
    outputs *= block
    layer = SparseConv1x1(inputs, outputs, density, block, activation=activation)
    x = torch.randn(batch, inputs, side, side)
    residual = torch.randn(batch, outputs, side, side)
    with torch.no_grad():
        expected = layer(x, residual)
        limit = rounding(layer, x)
        dense = layer.masked_weight
        got = layer.finalize()(x, residual)
        assert torch.equal(layer.masked_weight, dense)
    assert ((got - expected).abs() <= limit).all()


@pytest.mark.parametrize("block", [1, 2, 4])
def test_density_is_exact_and_blocks_share_their_zeros(block: int) -> None:
    layer = SparseConv1x1(50, 40, 0.1, block)
    units = layer.mask.flatten(1).unflatten(0, (-1, block))
    assert (units.any(1) == units.all(1)).all()
    assert int(units.all(1).sum()) == round(0.1 * 40 * 50 / block)
    assert layer.finalize().density == pytest.approx(0.1)


def test_layer_without_weights_is_its_bias() -> None:
    layer = SparseConv1x1(5, 8, 0.0)
    x = torch.randn(2, 5, 4, 4)
    for _ in ("masked", "packed"):
        with torch.no_grad():
            assert torch.equal(layer(x), layer.bias[:, None, None].expand(2, 8, 4, 4))
        layer = layer if layer.finalized else layer.finalize()


def test_gradients_of_the_training_form_are_right() -> None:
    layer = SparseConv1x1(4, 6, 0.5, 2, activation="silu").double()
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    weights = dict(layer.named_parameters())

    def run(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(weights, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *weights.values()))
    layer(x).sum().backward()
    assert (layer.weight.grad[~layer.mask] == 0).all()
    assert (layer.weight.grad[layer.mask] != 0).any()


def test_pruned_weights_keep_their_value_and_may_return() -> None:
    layer = SparseConv1x1(6, 4, 1.0)
    before = layer.weight.detach().clone()
    layer.prune_(0.25)
    kept = layer.mask.clone()
    assert torch.equal(layer.weight, before)
    assert before[kept].abs().min() >= before[~kept].abs().max()
    layer.prune_(1.0)
    assert torch.equal(layer.masked_weight, before)


def test_packed_state_is_small_and_finalizes_the_layer_that_loads_it() -> None:
    layer = SparseConv1x1(64, 64, 0.1, 4).finalize()
    state = layer.state_dict()
    size = sum(t.numel() * t.element_size() for t in state.values())
    assert size < 0.2 * 64 * 64 * 4
    twin = SparseConv1x1(64, 64, 0.5, 4)
    twin.load_state_dict(state)
    x = torch.randn(1, 64, 5, 5)
    assert twin.finalized
    assert torch.equal(twin(x), layer(x))
    with pytest.raises(ValueError, match="packed weight"):
        SparseConv1x1(64, 32, 0.5).load_state_dict(state)


def test_training_state_comes_back_with_its_mask() -> None:
    layer, twin = SparseConv1x1(9, 8, 0.3), SparseConv1x1(9, 8, 0.3)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin.masked_weight, layer.masked_weight)


def test_nan_weights_reach_the_outputs_of_their_row_alone() -> None:
    layer = SparseConv1x1(3, 4, 1.0)
    with torch.no_grad():
        layer.weight[1, 2] = layer.weight[2, 0] = float("nan")
        layer.mask[2, 0] = False  # a masked weight plays no part, whatever it holds
        x = torch.randn(1, 3, 2, 2)
        for y in (layer(x), layer.finalize()(x)):
            assert [bool(row.isnan().all()) for row in y[0]] == [False, True, False, False]
            assert y[0, 2].isfinite().all()


def test_a_convolution_is_taken_over_and_given_back() -> None:
    conv = nn.Conv2d(16, 12, 1)
    x = torch.randn(1, 16, 6, 6)
    whole = SparseConv1x1.from_conv(conv)
    torch.testing.assert_close(whole(x), conv(x))
    sparse = SparseConv1x1.from_conv(conv, density=0.25, block=4)
    assert sparse.density == 0.25
    torch.testing.assert_close(sparse.to_conv()(x), sparse(x))
    again = SparseConv1x1.from_conv(sparse.to_conv(), block=4).finalize()
    assert again.density == 0.25


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kernel_size": 3}, r"conv.kernel_size=\(3, 3\)"),
        ({"stride": 2}, r"conv.stride=\(2, 2\)"),
        ({"padding": 1}, r"conv.padding=\(1, 1\)"),
        ({"groups": 2}, "conv.groups=2"),
    ],
)
def test_only_plain_1x1_convolutions_are_taken(kwargs: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseConv1x1.from_conv(nn.Conv2d(4, 4, **{"kernel_size": 1, **kwargs}))
    with pytest.raises(ValueError, match="got Linear"):
        SparseConv1x1.from_conv(nn.Linear(4, 4))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 4, 1.5), "density=1.5"),
        ((4, 4, 0.5, 3), "block=3: expected one of 4, 2, 1"),
        ((4, 6, 0.5, 4), "block=4 does not divide out_channels=6"),
        ((0, 4, 0.5), "in_channels=0"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseConv1x1(*arguments)


def test_wrong_inputs_and_finished_layers_are_refused() -> None:
    layer = SparseConv1x1(4, 4, 0.5)
    with pytest.raises(ValueError, match=r"expected \(batch, 4, H, W\)"):
        layer(torch.randn(1, 5, 2, 2))
    with pytest.raises(RuntimeError, match="still trains"):
        _ = layer.packed
    layer.finalize()
    for call in (layer.finalize, lambda: layer.prune_(0.5)):
        with pytest.raises(RuntimeError, match="finalized"):
            call()
    with pytest.raises(ValueError, match="did you mean 'relu6'"):
        SparseConv1x1(4, 4, 0.5, activation="relu_6")


def test_columns_beyond_int16_are_stored_wider() -> None:
    layer = SparseConv1x1(40_000, 2, 1.0)
    with torch.no_grad():
        layer.mask[:] = False
        layer.mask[0, 39_999] = layer.mask[1, 0] = True
        x = torch.randn(1, 40_000, 1, 2)
        expected = layer(x)
        layer.finalize()
        assert layer.packed.columns.dtype is torch.int32
        torch.testing.assert_close(layer(x), expected)


def test_other_devices_take_the_dense_product_and_are_told_once() -> None:
    import importlib

    module = importlib.import_module("aerogel.kernels.spmm")
    module.warn_of_device.cache_clear()
    layer = SparseConv1x1(4, 6, 0.5).finalize().to("meta")
    x = torch.empty(2, 4, 3, 3, device="meta")
    weight = kernels.BlockRowWeight(layer.values, layer.columns, layer.row_ptr, (6, 4), 1)
    with pytest.warns(UserWarning, match="activations on 'meta' are multiplied by the dense"):
        assert kernels.spmm(x, weight).shape == (2, 6, 3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernels.spmm(x, weight)
