"""Keys chosen by labels, the largest of many and pooled blocks, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import needs_native

from aerogel import kernels
from aerogel.kernels.attention_select import choose_blocks, chosen_tiles
from aerogel.kernels.attention_select_reference import choose_blocks_reference

pytestmark = needs_native
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def labels_of(draw: torch.Generator, shape: tuple[int, int, int, int], bits: int, kind: int):
    """Small integers, so that sums are exact and many scores are equal; and their span."""
    if bits == 16:
        return torch.randint(-2, 3, shape, generator=draw).to(TYPES[kind]), None
    *rows, width = shape
    codes = torch.randint(0, 256, (*rows, width * bits // 8), generator=draw, dtype=torch.uint8)
    span = torch.randint(-1, 3, (*rows, 2), generator=draw).float()
    return codes, span


@pytest.mark.usefixtures("instruction_set")
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    keys=st.integers(1, 700),
    width=st.sampled_from([4, 16, 64]),
    bits=st.sampled_from([16, 16, 8, 4, 2]),
    run=st.sampled_from([1, 1, 4, 16]),
    window=st.sampled_from([None, 50]),
    late=st.integers(-40, 3),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_chosen_keys_are_those_of_the_reference(seed, keys, width, bits, run, window, late, flags):
    draw = torch.Generator().manual_seed(seed)
    batch, heads, group, rows, count, kind = (
        int(torch.randint(1, n, (), generator=draw)) for n in (4, 3, 4, 5, max(2, keys // 2), 4)
    )
    query = torch.randint(-2, 3, (batch, heads * group, rows, width), generator=draw).float()
    labels, span = labels_of(draw, (batch, heads, keys, width), bits, kind - 1)
    causal, keep_own, padded = flags
    padding = torch.rand(batch, keys, generator=draw) > 0.3 if padded else None
    offset = max(0, keys + late)
    rule = kernels.KeyRule(count, run, offset, causal, window, keep_own)
    got, found = kernels.choose_by_labels(
        query, labels, span, rule=rule, bits=bits, key_padding=padding, threads=int(seed % 3) + 1
    )
    want, want_found = kernels.choose_by_labels_reference(query, labels, span, bits, padding, rule)
    assert torch.equal(found, want_found)
    assert torch.equal(got, want)
    scores = kernels.label_scores(query, labels, span, bits=bits)
    expected = kernels.label_scores_reference(query, labels, span, bits=bits)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("rows", "most"), [(1, 1), (3, 64), (5, 65), (4, 200)])
def test_tiles_of_chosen_keys_end_where_the_keys_do(rows, most):
    found = torch.arange(rows).mul(most).div(max(1, rows - 1), rounding_mode="floor")
    keys = torch.arange(rows * most, dtype=torch.int32).view(rows, most)
    tiles = chosen_tiles(keys, found)
    lengths = tiles.length.view(rows, -1)
    assert lengths.sum(1).tolist() == found.tolist()
    assert (lengths[:, :-1] >= lengths[:, 1:]).all()
    strided = chosen_tiles(keys, torch.stack([found, found], 1)[:, 0])
    assert torch.equal(strided.length, tiles.length)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("width", [8, 12, 16, 24, 48, 64])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7])
def test_codes_of_any_width_score_as_the_labels_they_stand_for(bits, width, rows):
    draw = torch.Generator().manual_seed(width)
    for keys in (1, 15, 16, 63, 129, 300):
        codes, _ = labels_of(draw, (2, 2, keys, width), bits, 0)
        query = torch.randn(2, 2, rows, width, generator=draw)
        span = torch.randn(2, 2, keys, 2, generator=draw)
        span[0, 1, -1, 0], span[1, 0, 0, 1] = torch.nan, torch.inf
        scores = kernels.label_scores(query, codes, span, bits=bits)
        expected = kernels.label_scores_reference(query, codes, span, bits=bits)
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=2e-4, equal_nan=True)


@pytest.mark.usefixtures("instruction_set")
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), n=st.integers(1, 3000), share=st.floats(0, 1), ties=st.booleans()
)
def test_the_largest_are_exact_and_ties_go_to_the_lowest_place(seed, n, share, ties):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(3, n, generator=draw)
    x = (2 * x).round() if ties else x
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0, 1e-40, -1e-40])
    at = torch.randint(0, n, special.shape, generator=draw)
    x[0, at] = special
    k = round(share * n)
    assert torch.equal(kernels.largest_keys(x, k), kernels.largest_keys_reference(x, k))


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("length", "dim"), [(1, 7), (64, 64), (150, 80)])
def test_pools_are_those_of_the_reference(length, dim, dtype):
    x = torch.randn(2, length, 3, dim).to(dtype).transpose(1, 2)
    for names in (("avg",), ("max", "min", "avg"), ("min",)):
        got = kernels.pool_rows(x, 64, names)
        want = kernels.pool_rows_reference(x, 64, names)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_labels_in_a_longer_buffer_are_read_in_place():
    buffer = torch.randn(2, 4, 100, 16)
    query = torch.randn(2, 4, 1, 16)
    got = kernels.choose_by_labels(query, buffer[:, :, :77], rule=kernels.KeyRule(9))
    want = kernels.choose_by_labels(query, buffer[:, :, :77].clone(), rule=kernels.KeyRule(9))
    assert all(map(torch.equal, got, want))


def test_label_attention_is_attention_over_the_chosen_keys():
    q, k, v = (torch.randn(2, heads, n, 32) for heads, n in ((4, 2), (2, 90), (2, 90)))
    labels, rule = k[..., :8].contiguous(), kernels.KeyRule(70)
    keys, found = kernels.choose_by_labels(q[..., :8], labels, rule=rule)
    mask = torch.zeros(2, 4, 2, 91, dtype=torch.bool)
    real = torch.arange(70) < found[..., None]
    mask.scatter_(-1, torch.where(real, keys, 90).long(), True)
    o, _ = kernels.label_attention(q, k, v, q[..., :8], labels, rule=rule)
    want = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask[..., :90], enable_gqa=True
    )
    torch.testing.assert_close(o, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 4}, "bits=4"),
        ({"labels": torch.randn(1, 3, 9, 8)}, "labels"),
        ({"key_padding": torch.ones(1, 8, dtype=torch.bool)}, "key_padding"),
        ({"span": torch.randn(1, 2, 9, 2), "bits": 8}, "span"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"query": torch.randn(1, 4, 1, 8), "labels": torch.randn(1, 2, 9, 8)}
    arguments["rule"] = kernels.KeyRule(2)
    with pytest.raises(ValueError, match=message):
        kernels.choose_by_labels(**{**arguments, **change})
    with pytest.raises(ValueError, match="count=0"):
        kernels.KeyRule(0)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_codes_are_those_of_the_reference(bits: int) -> None:
    x = torch.randn(2, 3, 1500, 16, generator=torch.Generator().manual_seed(bits))
    x[0, 0, 0] = 7.0  # one value only
    x[0, 0, 1] = torch.arange(16) / 2  # ties
    for rows in (x, x.bfloat16(), x.transpose(1, 2)[:, :1], x[:, :, :0]):
        codes, span = kernels.pack_codes(rows, bits, threads=2)
        want_codes, want_span = kernels.pack_codes_reference(rows, bits)
        assert torch.equal(codes, want_codes)
        assert torch.equal(span, want_span)
    with pytest.raises(ValueError, match="bits=3"):
        kernels.pack_codes(x, 3)
    with pytest.raises(ValueError, match="15 channels"):
        kernels.pack_codes(x[..., :15], 4)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("count", [0, 1, 6, 99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
def test_blocks_are_those_of_the_reference(instruction_set, own, count, dtype, threads):
    draw = torch.Generator().manual_seed(count)
    for shape in ((2, 3, 40, 40), (1, 1, 1, 1), (0, 2, 5, 5), (2, 1, 0, 0)):
        n = shape[-1]
        scores = torch.randn(shape, generator=draw).mul(4).round().to(dtype)  # many are equal
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
        scores[..., n // 2 : n // 2 + 1, : n // 3] = torch.nan
        scores[..., n // 3 : n // 2, :] = -torch.inf
        for dense in (None, torch.arange(shape[0]) * 7 - 1 + n // 2):
            got = choose_blocks(scores, count, own=own, dense_from=dense, threads=threads)
            want = choose_blocks_reference(scores, min(count, n), own=own, dense_from=dense)
            for ours, theirs in zip(got, want, strict=True):
                assert ours.dtype == theirs.dtype
                assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="count=-1"):
        choose_blocks(torch.zeros(1, 1, 2, 2), -1, own=True)
