"""Products of N:M weights that change every step, against dense products of the masked weight."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from instruction_sets import needs_native

from aerogel.kernels import nm_mask
from aerogel.kernels._library import native
from aerogel.kernels.nm_trained import NMProduct, choose_masks
from aerogel.kernels.variants import SpmmVariant
from aerogel.sparsity import NM, Bidirectional, select_parameters

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
    rows, cols = product.size
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
    x = torch.randn(40, product.size[1])
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


def entries(shape, seed):
    """Few levels, so that groups are full of ties; both zeros, infinities and nan."""
    levels = torch.tensor([-torch.inf, -2.5, -0.0, 0.0, 1e-40, 1.0, -1.0, torch.inf, torch.nan])
    return levels[torch.randint(9, shape, generator=torch.Generator().manual_seed(seed))]


PATTERNS = [(n, m) for m in (4, 8, 16) for n in (1, 2, 4)] + [(3, 5), (7, 13), (9, 32), (32, 32)]


@pytest.mark.parametrize("shape", [(64, 96), (37, 131), (8, 300), (3, 5), (150, 16)])
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_chosen_masks_and_packed_weights_are_those_of_the_mask_kernel(
    instruction_set, threads, shape, n, m
):
    for seed in range(2):
        weight = entries(shape, seed) if seed else torch.randn(shape)
        ways = [NMProduct(shape, n, m, axis) for axis in (1, 0)]
        chosen = [torch.ones(shape, dtype=torch.bool) for _ in ways]
        for tokens in (40, 7, 40):
            xs = [torch.randn(tokens, way.size[1]) for way in ways]
            before = [m_._version for m_ in chosen]
            choose_masks(weight, *ways, *chosen)
            assert all(m_._version > v for m_, v in zip(chosen, before, strict=True))
            for way, x, mask in zip(ways, xs, chosen, strict=True):
                expected = nm_mask(weight, n, m, way.axis, magnitude=True)
                assert torch.equal(mask, expected)
                other = NMProduct(shape, n, m, way.axis).masked(x, weight, expected)
                ours = way.masked(x, weight, mask)
                # nan payloads may differ by the variant's order of operands, not by place
                assert torch.equal(ours.nan_to_num(), other.nan_to_num())
                assert torch.equal(ours.isnan(), other.isnan())


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize(("n", "m"), [(2, 8), (1, 8), (2, 4), (3, 16)])
@pytest.mark.parametrize("shape", [(64, 96), (80, 272), (50, 128), (37, 131)])
def test_every_width_of_a_stream_is_filled(
    instruction_set, threads, monkeypatch, shape, n, m, groups
):
    # Which width is fastest depends on the machine: each is set here.
    variant = SpmmVariant(2, groups, 1, 1, True)
    monkeypatch.setattr(NMProduct, "_candidates", lambda self, shape: [variant])
    weight = torch.randn(shape)
    ways = [NMProduct(shape, n, m, axis) for axis in (1, 0)]
    masks = [torch.empty(shape, dtype=torch.bool) for _ in ways]
    for _ in range(2):  # what the second finds packed, `choose_masks` packed
        choose_masks(weight, *ways, *masks)
        for way, mask in zip(ways, masks, strict=True):
            x = torch.randn(40, way.size[1])
            torch.testing.assert_close(
                way.masked(x, weight, mask),
                expected(x, weight, mask, way.axis),
                rtol=1e-5,
                atol=1e-4,
            )
        weight = torch.randn(shape)


def test_one_way_can_be_chosen_alone():
    weight, shape = torch.randn(32, 48), (32, 48)
    ways = NMProduct(shape, 2, 8, 1), NMProduct(shape, 2, 8, 0)
    mask = torch.zeros(shape, dtype=torch.bool)
    choose_masks(weight, *ways, None, mask)
    assert torch.equal(mask, nm_mask(weight, 2, 8, 0, magnitude=True))
    choose_masks(weight, *ways, mask, None)
    assert torch.equal(mask, nm_mask(weight, 2, 8, 1, magnitude=True))


def packings(monkeypatch):
    """Counts native passes over a weight."""
    module, calls = native(), []
    pack = module.nm_pack_ways
    monkeypatch.setattr(module, "nm_pack_ways", lambda *a: calls.append(a) or pack(*a))
    return calls


def test_a_product_packs_nothing_that_is_packed(monkeypatch):
    shape = (64, 64)
    ways = NMProduct(shape, 2, 8, 1), NMProduct(shape, 2, 8, 0)
    weight, x = torch.randn(shape), torch.randn(40, 64)
    masks = [torch.empty(shape, dtype=torch.bool) for _ in ways]
    for _ in range(40):  # until the variants are found
        choose_masks(weight, *ways, *masks)
        _ = [way.masked(x, weight, mask) for way, mask in zip(ways, masks, strict=True)]
    calls = packings(monkeypatch)
    for _ in range(3):
        _ = [way.masked(x, weight, mask) for way, mask in zip(ways, masks, strict=True)]
    assert not calls


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("change", ["weight", "data", "mask", "another", "storage"])
def test_what_was_packed_is_not_used_for_something_else(monkeypatch, axis, change):
    product = NMProduct((64, 48), 2, 8, axis)
    weight, mask = drawn((64, 48), 2, 8, axis)
    x = torch.randn(40, product.size[1])
    for _ in range(40):
        product.masked(x, weight, mask)
    if change == "weight":
        weight[3, 5] = 7.0
    elif change == "data":
        weight.data.mul_(2.0)
    elif change == "mask":
        mask.copy_(drawn((64, 48), 2, 8, axis, 1)[1])
    elif change == "another":
        weight = drawn((64, 48), 2, 8, axis, 1)[0]
    else:
        weight.data = drawn((64, 48), 2, 8, axis, 1)[0]
    calls = packings(monkeypatch)
    torch.testing.assert_close(
        product.masked(x, weight, mask), expected(x, weight, mask, axis), rtol=1e-5, atol=1e-5
    )
    assert len(calls) == 1


def test_a_backward_pass_over_masks_chosen_since_is_an_error():
    layer = torch.nn.Linear(48, 64)
    coupling = Bidirectional(NM(2, 8, axis=0))
    ref = select_parameters(layer)["weight"]
    coupling.attach(ref, NM(2, 8).select_largest(layer.weight))
    y = layer(torch.randn(80, 48, requires_grad=True))
    coupling.select_largest(ref, layer.weight.detach(), NM(2, 8))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_operands_that_do_not_fit_are_named():
    ways = NMProduct((16, 16), 2, 8, 1), NMProduct((16, 16), 2, 8, 0)
    weight, mask = drawn((16, 16), 2, 8, 1)
    with pytest.raises(ValueError, match=r"torch\.float64 \(16, 16\)"):
        choose_masks(weight.double(), *ways, mask, None)
    with pytest.raises(ValueError, match=r"torch\.uint8"):
        choose_masks(weight, *ways, mask.byte(), None)
    with pytest.raises(ValueError, match="contiguous"):
        choose_masks(weight.t(), *ways, mask, None)
    with pytest.raises(ValueError, match="m=33"):
        NMProduct((66, 66), 2, 33)


def test_a_stream_of_another_structure_is_refused():
    module = native()
    weight, mask = drawn((16, 16), 2, 8, 1)
    variant = module.SpmmVariant(1, 2, 1, 1, True)

    def pack(stream, n, m, rows=16, masked=True):
        mask_at = mask.data_ptr() if masked else 0
        return module.nm_pack_ways(
            weight.data_ptr(), rows, 16, n, m, stream, mask_at, None, 0, True, 1
        )

    stream = module.nm_packed(16, 16, 2, 8, variant)
    assert pack(stream, 2, 8)
    with pytest.raises(ValueError, match="1 of every 8 inputs"):
        pack(stream, 1, 8)
    with pytest.raises(ValueError, match="8 x 16"):
        pack(stream, 2, 8, rows=8)
    with pytest.raises(ValueError, match="expected 1 <= n <= m"):
        pack(stream, 0, 8)
    with pytest.raises(ValueError, match="mask: expected one"):
        pack(stream, 2, 8, masked=False)
    with pytest.raises(ValueError, match="ldx=0"):  # activations that are read in place
        module.nm_packed(16, 16, 2, 8, module.SpmmVariant(1, 2, 1, 1, False))
    with pytest.raises(ValueError, match="output=16"):
        module.nm_holds(stream, weight.data_ptr(), 16, 1, 16)
