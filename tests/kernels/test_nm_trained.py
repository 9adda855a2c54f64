"""Products of N:M weights that change every step, against dense products of the masked weight."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from instruction_sets import needs_native

from aerogel.kernels import nm_mask
from aerogel.kernels.nm_trained import NMProduct

pytestmark = needs_native


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def drawn(shape, n, m, axis, seed=0):
    """A weight and its mask."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return weight, nm_mask(weight.abs(), n, m, axis)


def expected(x, weight, mask, axis, bias=None):
    kept = (weight * mask).double()
    y = x.double() @ (kept.t() if axis == 1 else kept)
    return (y if bias is None else y + bias.double()).float()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("shape", "n", "m"),
    [
        ((64, 96), 2, 8),
        ((19, 37), 2, 8),  # the last group is shorter on either axis, rows fill no register
        ((96, 64), 1, 8),
        ((40, 256), 2, 8),
        ((256, 40), 2, 8),
        ((9, 9), 2, 8),  # the last group has fewer than n
        ((24, 20), 1, 4),
        ((21, 35), 2, 5),
        ((48, 70), 3, 16),
        ((70, 48), 2, 13),
        ((5, 3), 2, 4),
        ((8, 8), 8, 8),
    ],
)
def test_every_step_multiplies_by_the_masked_weight(instruction_set, threads, shape, n, m, axis):
    product = NMProduct(shape, n, m, axis)
    rows, cols = product.pattern.shape
    for tokens in (1, 33):
        x, bias = torch.randn(tokens, cols), torch.randn(rows)
        for step in range(6):  # other variants, other weights, one structure
            weight, mask = drawn(shape, n, m, axis, step)
            result = product.masked(x, weight, mask, bias)
            torch.testing.assert_close(
                result, expected(x, weight, mask, axis, bias), rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("axis", [0, 1])
def test_the_bits_depend_neither_on_threads_nor_on_what_was_before(axis):
    before = torch.get_num_threads()
    x = torch.randn(2, 40, 128)
    weight, mask = drawn((128, 128), 2, 8, axis)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        product = NMProduct((128, 128), 2, 8, axis)
        for step in (1, 2):
            product.masked(x, *drawn((128, 128), 2, 8, axis, step))
        results += [product.masked(x, weight, mask) for _ in range(12)]
    torch.set_num_threads(before)
    assert results[0].shape == (2, 40, 128)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("change", ["more", "fewer", "elsewhere", "all"])
def test_a_mask_of_another_pattern_is_left_to_others(axis, change):
    product = NMProduct((32, 48), 2, 8, axis)
    weight, mask = drawn((32, 48), 2, 8, axis)
    x = torch.randn(40, product.pattern.shape[1])
    group = mask[24:32, 47] if axis == 0 else mask[31, 40:48]
    kept = group.clone()
    if change == "more":
        group[(~kept).nonzero()[0]] = True
    elif change == "fewer":
        group[kept.nonzero()[0]] = False
    elif change == "elsewhere":  # as many in all, but another group has them
        group[kept.nonzero()[0]] = False
        other = mask[16:24, 47] if axis == 0 else mask[31, 32:40]
        other[(~other).nonzero()[0]] = True
    else:
        mask.fill_(True)
    assert product.masked(x, weight, mask) is None
    weight, mask = drawn((32, 48), 2, 8, axis, 1)
    torch.testing.assert_close(
        product.masked(x, weight, mask), expected(x, weight, mask, axis), rtol=1e-5, atol=1e-5
    )


def test_a_step_allocates_no_stream_once_the_variant_is_found():
    product = NMProduct((64, 64), 2, 8)
    x = torch.randn(40, 64)
    for step in range(40):
        product.masked(x, *drawn((64, 64), 2, 8, 1, step))
    streams = dict(product._streams)
    product.masked(x, *drawn((64, 64), 2, 8, 1, 50))
    assert all(product._streams[key] is stream for key, stream in streams.items())
    assert len(product._streams) == len(streams)


def test_copies_have_streams_of_their_own():
    product = NMProduct((16, 16), 2, 8, 0)
    weight, mask = drawn((16, 16), 2, 8, 0)
    x = torch.randn(3, 16)
    y = product.masked(x, weight, mask)
    other = copy.deepcopy(product)
    assert (other.shape, other.n, other.m, other.axis) == ((16, 16), 2, 8, 0)
    assert torch.equal(other.masked(x, weight, mask), y)


def test_what_the_kernel_cannot_read_is_named():
    product = NMProduct((16, 8), 2, 8)
    x = torch.randn(3, 8)
    assert product.fits(x, None)
    assert not product.fits(x.double())
    assert not product.fits(x, torch.randn(2, device="meta"))
    with pytest.raises(ValueError, match=r"weight: \(8, 16\)"):
        product.masked(x, torch.randn(8, 16), torch.ones(16, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask: torch\.uint8"):
        product.masked(x, torch.randn(16, 8), torch.ones(16, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="n=3, m=2"):
        NMProduct((16, 8), 3, 2)
    with pytest.raises(ValueError, match="axis=2"):
        NMProduct((16, 8), 2, 8, 2)


def test_a_stream_of_another_structure_is_refused():
    weight, mask = drawn((16, 16), 2, 8, 1)
    product = NMProduct((16, 16), 2, 8)
    product.masked(torch.randn(3, 16), weight, mask)
    stream = next(iter(product._streams.values()))
    with pytest.raises(ValueError, match="1 of every 8 inputs"):
        stream.nm_refill(weight.data_ptr(), mask.data_ptr(), 16, 1, 1, 8, 1)
    with pytest.raises(ValueError, match="expected 1 <= n <= m"):
        stream.nm_refill(weight.data_ptr(), mask.data_ptr(), 16, 1, 0, 8, 1)
    with pytest.raises(ValueError, match="neighbours"):
        stream.nm_refill(weight.data_ptr(), mask.data_ptr(), 16, 2, 2, 8, 1)
