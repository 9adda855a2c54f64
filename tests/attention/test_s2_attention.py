"""What S2-Attention promises: published tables, coverage, training, a cache of the stated size."""

from __future__ import annotations

import warnings

import plans as make
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import prompts, tiny, transformers

from aerogel.attention import (
    AttentionContext,
    AttentionShape,
    CustomBlockPattern,
    DensePlan,
    LocalStridePattern,
    S2Selector,
    attach,
    attend,
    detach,
)
from aerogel.attention.cache import AerogelCache, SpanCacheLayer
from aerogel.attention.lowering import lower
from aerogel.attention.ops import tile_attention
from aerogel.kernels import native_available

CAUSAL = "1 11 111 1011 10011 100111 1001011 10010011"


def rows(text):
    return [[int(x) for x in row] for row in text.split()]


def test_the_worked_tables():
    mask = LocalStridePattern(1, 1, 16, 2, 3).mask(8, 8)[0].int().tolist()
    assert [row[: i + 1] for i, row in enumerate(mask)] == rows(CAUSAL)
    both = LocalStridePattern(1, 1, 16, 2, 3, causal=False).mask(8, 8)[0].int().tolist()
    assert both[:2] == rows("11001001 11100100")
    uneven = LocalStridePattern(1, 1, 16, (2, 1), 3, causal=False).mask(8, 8)[0].int().tolist()
    assert uneven[:3] == rows("10010010 11001001 01100100")


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.booleans(), st.booleans(),
    st.integers(0, 2),
)  # fmt: skip
def test_uneven_windows_and_both_kinds_of_columns_follow_the_published_rule(
    left, right, stride, causal, absolute, dense_heads
):
    position = "absolute" if absolute else "relative"
    local = left if causal else (left, right)
    pattern = LocalStridePattern(
        4, 4, 16, local, stride, dense_heads, head_offset=1, causal=causal, position=position
    )
    step, right = max(1, stride // 4), 1 if causal else right
    mask = pattern.mask(7, 9, past=1)
    for h in range(4):
        for i in range(1, 8):
            for j in range(9):
                beyond = max(0, i - j - left + 1) + max(0, j - i - right + 1)
                column = (j + h * step + 1) % stride == 0 if absolute else beyond % stride == 0
                kept = beyond == 0 or column or h >= 4 - dense_heads
                assert bool(mask[h, i - 1, j]) == (kept and (j <= i or not causal))


@pytest.mark.parametrize("causal", [True, False])
def test_patterns_that_no_cache_can_shrink_still_run(causal):
    local = 2 if causal else (1, 3)
    selector = S2Selector(16, local, 3, position="relative")
    assert S2Selector(**selector.options()).sizes == selector.sizes
    shape = AttentionShape(2, 4, 4, 90, 90, causal=causal)
    q, k, v = make.tensors(shape)
    plan = selector.plan_prefill(context(shape, q, k, v))
    mask = selector.pattern(4, 4, causal).mask(6, 6)
    mask = mask.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :90, :90]
    want = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask & shape.causal_mask()
    )
    torch.testing.assert_close(
        attend(q, k, v, plan=plan, causal=causal), want, rtol=2e-5, atol=2e-5
    )
    if causal:
        assert selector.cache_layer(0, 4) is None
        assert selector.pattern(4, 4).cache_tokens(90) == [96] * 4
        with pytest.raises(ValueError, match="relative"):
            selector.pattern(4, 4).span()


@pytest.mark.skipif(not native_available(), reason="needs the tile kernels")
@pytest.mark.parametrize("rows", [90, 33])
def test_small_blocks_share_tiles_of_64_rows_and_nothing_changes(rows):
    shape = AttentionShape(2, 4, 2, rows, 90, causal=True)
    q, k, v = (t.requires_grad_() for t in make.tensors(shape))
    plan = LocalStridePattern(4, 2, 4, 3, 5, step=1).span()
    (merged,) = plan.streams(shape)
    assert merged.block_q == 64
    results = []
    for streams in ([merged], lower(plan.passes(shape), shape)):
        assert results == [] or streams[0].block_q <= 4
        o, lse = tile_attention(q, k, v, streams[0], shape, scale=0.25)
        results.append((o, lse, *torch.autograd.grad(o.square().sum() + lse.sum(), (q, k, v))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_the_plan_is_the_block_mask(data):
    block = data.draw(st.sampled_from([2, 4, 16]))
    pattern = LocalStridePattern(
        8, 4, block, data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9)),
        data.draw(st.integers(0, 2)), data.draw(st.integers(0, 5)),
    )  # fmt: skip
    length = data.draw(st.integers(1, 120))
    q_len = data.draw(st.integers(1, length))
    shape = AttentionShape(1, 8, 4, q_len, length, causal=True)
    blocks = -(-length // block)
    wide = pattern.mask(blocks, blocks).repeat_interleave(block, 1).repeat_interleave(block, 2)
    want = wide[:, length - q_len : length, :length] & shape.causal_mask()
    plan = pattern.span()
    plan.validate(shape)
    assert torch.equal(plan.to_dense_mask(shape)[0], want)
    assert torch.equal(plan.row_counts(shape)[0], want.sum(-1))


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 20))
def test_coverage_is_the_union_of_the_heads(heads, stride, offset):
    pattern = LocalStridePattern(heads, heads, 16, 1, stride, head_offset=offset)
    union = pattern.mask(3 * stride, 3 * stride).any(0)[-1]
    found = pattern.coverage()
    assert found.complete == bool(union.all())
    assert set(found.residues) == {j % stride for j in range(3 * stride - 1) if union[j]} or (
        stride == 1
    )
    if heads < stride:
        assert not found.complete


def test_incomplete_coverage_is_said_once():
    selector = S2Selector(16, 2, 8)
    with pytest.warns(UserWarning, match="read by no head"):
        selector.pattern(2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        selector.pattern(2, 2)
        S2Selector(16, 2, 8, dense_layers=(0,)).pattern(2, 2)
        S2Selector(16, 2, 8, dense_heads=1).pattern(2, 2)


def test_columns_are_absolute_so_that_blocks_can_go():
    pattern = LocalStridePattern(4, 4, 16, 2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CustomBlockPattern(pattern.mask(12, 12), 16).evictable()
    i, j = torch.arange(12)[:, None], torch.arange(12)
    relative = ((i - j) % 4 == 0) & (j <= i)
    with pytest.warns(UserWarning, match="relative stride"):
        assert not CustomBlockPattern(relative[None], 16).evictable()


def test_all_query_heads_of_a_key_head_share_a_pattern_and_the_last_are_dense():
    pattern = LocalStridePattern(8, 4, 16, 1, 8, dense_heads=1)
    assert pattern.shifts == [0, 1, 2, 3]
    mask = pattern.mask(10, 10)
    assert torch.equal(mask[3], torch.ones(10, 10).tril().bool())
    same = LocalStridePattern(8, 4, 16, 1, 8, homo_head=True).mask(10, 10)
    assert all(torch.equal(head, same[0]) for head in same)


@pytest.mark.parametrize("stride", [1, 3])
def test_a_long_window_or_every_column_is_dense(stride):
    local = 1 if stride == 1 else 100
    shape = AttentionShape(2, 4, 2, 130, 130, causal=True)
    assert LocalStridePattern(4, 2, 16, local, stride).span().density(shape) == 1


def context(shape, q, k, v, layer=0, padding=None):
    return AttentionContext(q, k, v, shape, 0.25, layer_idx=layer, key_padding=padding)


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_are_those_of_masked_dense_attention(causal):
    shape = AttentionShape(2, 4, 4, 100, 100, causal=causal)
    q, k, v = make.tensors(shape)
    plan = S2Selector(16, 1, 4).plan_prefill(context(shape, q, k, v))
    blocks = LocalStridePattern(4, 4, 16, 1, 4, causal=causal).mask(7, 7)
    mask = blocks.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :100, :100]
    mask = mask & shape.causal_mask()
    results = []
    for dense in (False, True):
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        if dense:
            out = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=mask)
        else:
            out = attend(*inputs, plan=plan, causal=causal)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"dense_heads": 1}, {"head_offset": 2}])
@pytest.mark.parametrize("cuts", [[1] * 70, [50, *([1] * 30)], [9, 30, 1, 1, 20, 1, 5]])
def test_decoding_with_an_evicting_cache_is_masked_attention(options, cuts):
    total = sum(cuts)
    shape = AttentionShape(3, 8, 4, total, total, causal=True)
    q, k, v = make.tensors(shape)
    pattern = LocalStridePattern(8, 4, 4, 3, 4, **options)
    padded = torch.tensor([0, 3, 8]) if cuts[0] > 8 else torch.zeros(3, dtype=torch.int64)
    padding = torch.arange(total) >= padded[:, None]
    plan = pattern.span(padded.int())
    want = attend(q, k, v, plan=plan, causal=True, key_padding=padding)
    layer = SpanCacheLayer(pattern.span(), 4)
    layer.note_padding(padded)
    begin, outs = 0, []
    for n in cuts:
        part = slice(begin, begin + n)
        begin += n
        new = layer.update(k[:, :, part], v[:, :, part])
        outs.append(layer.attend(q[:, :, part], *new))
        assert layer.offsets.diff().tolist() == pattern.cache_tokens(begin)
    torch.testing.assert_close(torch.cat(outs, 2), want, rtol=2e-5, atol=2e-5)
    assert layer.keys.shape[1] == sum(pattern.cache_tokens(total))
    layer.reset()
    assert layer.offsets.diff().tolist() == pattern.cache_tokens(0)


def test_left_padding_changes_nothing_but_the_positions():
    shape = AttentionShape(1, 4, 4, 90, 90, causal=True)
    q, k, v = make.tensors(shape)
    selector = S2Selector(16, 1, 4)
    want = attend(q, k, v, plan=selector.plan_prefill(context(shape, q, k, v)), causal=True)
    longer = AttentionShape(1, 4, 4, 97, 97, causal=True)
    q, k, v = (torch.nn.functional.pad(t, (0, 0, 7, 0)) for t in (q, k, v))
    padding = torch.arange(97)[None] >= 7
    plan = selector.plan_prefill(context(longer, q, k, v, padding=padding))
    got = attend(q, k, v, plan=plan, causal=True, key_padding=padding)
    torch.testing.assert_close(got[:, :, 7:], want, rtol=2e-5, atol=2e-5)


def test_a_custom_mask_runs_and_refuses_what_it_does_not_cover():
    mask = torch.rand(4, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.4
    mask = (mask.cummin(1).values | torch.eye(6).bool()).tril()
    shape = AttentionShape(1, 4, 4, 50, 90, causal=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pattern = CustomBlockPattern(mask, 16)
    wide = mask.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, 40:90, :90]
    plan = pattern.plan(shape)
    assert torch.equal(plan.to_dense_mask(shape)[0], wide & shape.causal_mask())
    with pytest.raises(ValueError, match="97 keys"):
        pattern.plan(AttentionShape(1, 4, 4, 97, 97, causal=True))
    with pytest.raises(ValueError, match="empty"):
        CustomBlockPattern(torch.zeros(1, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="above the diagonal"):
        CustomBlockPattern(torch.ones(1, 4, 4, dtype=torch.bool))


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"block": 24}, "power of two"),
        ({"local_blocks": 0}, "local_blocks"),
        ({"stride": 0}, "stride"),
        ({"local_blocks": (2, 1)}, "causal=True"),
        ({"local_blocks": (2, 0), "causal": False}, "local_blocks"),
        ({"position": "moving"}, "position"),
        ({"dense_heads": 3}, "dense_heads"),
        ({"dense_heads": 1, "homo_head": True}, "homo_head"),
        ({"num_heads": 3}, "multiple"),
    ],
)
def test_bad_sizes_are_named(sizes, words):
    with pytest.raises(ValueError, match=words):
        LocalStridePattern(**{"num_heads": 4, "num_kv_heads": 2, **sizes})


def test_a_model_generates_the_same_with_any_cache_and_padding():
    model = tiny("Llama")
    ids, mask = prompts()
    selector = attach(model, S2Selector(4, 2, 2, dense_layers=(1,)))
    assert isinstance(selector.plan_prefill(context(*_call(), layer=1)), DensePlan)
    options = {"max_new_tokens": 12, "do_sample": False, "min_new_tokens": 12}
    want = model.generate(ids, attention_mask=mask, **options)
    cache = AerogelCache(model)
    got = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    assert torch.equal(got, want)
    assert isinstance(cache.layers[0], SpanCacheLayer)
    assert cache.layers[0].keys.shape[1] < cache.layers[1].keys.shape[2] * 2
    detach(model)


def _call():
    shape = AttentionShape(1, 4, 2, 8, 8, causal=True)
    return shape, *make.tensors(shape)


def test_the_name_s2_takes_its_pattern_from_the_configuration(tmp_path):
    model = tiny("Llama")
    ids = torch.randint(2, 63, (2, 40))
    shards = {"block": 4, "local_blocks": 2, "stride": 2}
    attach(model, S2Selector(**shards))
    want = model(input_ids=ids).logits
    detach(model)
    model.config.aerogel_s2 = shards
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, attn_implementation="aerogel:s2"
        )
        torch.testing.assert_close(again(input_ids=ids).logits, want)
    attach(again, "s2", stride=1)
    assert not torch.allclose(again(input_ids=ids).logits, want)


def test_a_model_trained_densely_is_served_with_a_warning():
    model = tiny("Llama")
    with pytest.warns(UserWarning, match="aerogel_s2"):
        attach(model, S2Selector(4, 2, 2))
