"""KV caches: growth, side state, rings."""

from __future__ import annotations

from dataclasses import replace

import plans as make
import pytest
import torch

from aerogel.attention import AttentionShape, SpanPlan, attend

pytest.importorskip("transformers")

from aerogel.attention.cache import SelectorCacheLayer, SpanCacheLayer


def grow(layer, k, v, cuts):
    outs, begin = [], 0
    for n in cuts:
        outs.append(layer.update(k[:, :, begin : begin + n], v[:, :, begin : begin + n]))
        begin += n
    return outs


def test_growth_is_concatenation_and_mostly_in_place():
    _, k, v = make.tensors(AttentionShape(2, 4, 2, 1, 200))
    layer = SelectorCacheLayer()
    addresses = set()
    begin = 0
    for n in (70, *([1] * 130)):
        keys, values = layer.update(k[:, :, begin : begin + n], v[:, :, begin : begin + n])
        begin += n
        assert torch.equal(keys, k[:, :, :begin])
        assert torch.equal(values, v[:, :, :begin])
        addresses.add(keys.data_ptr())
    assert len(addresses) == 2
    assert layer.get_seq_length() == 200


def test_side_state_follows_the_keys():
    _, k, v = make.tensors(AttentionShape(3, 2, 2, 1, 20))
    layer = SelectorCacheLayer()
    layer.update(k, v)
    layer.append_side("label", k[..., :2])
    layer.crop(-5)
    assert torch.equal(layer.side["label"], layer.keys[..., :2])
    layer.update(k[:, :, :3], v[:, :, :3])
    layer.append_side("label", k[:, :, :3, :2])
    assert torch.equal(layer.side["label"], layer.keys[..., :2])
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(layer.side["label"], layer.keys[..., :2])
    layer.batch_select_indices(torch.tensor([1]))
    layer.batch_repeat_interleave(2)
    layer.update(k[:2, :, :1], v[:2, :, :1])
    layer.append_side("label", k[:2, :, :1, :2])
    assert torch.equal(layer.side["label"], layer.keys[..., :2])
    assert layer.keys.shape[:3] == (2, 2, 19)
    layer.reset()
    assert layer.get_seq_length() == 0
    assert not layer.side


def test_reordered_beams_do_not_share_memory():
    _, k, v = make.tensors(AttentionShape(1, 1, 1, 1, 4))
    layer = SelectorCacheLayer()
    layer.update(k, v)
    kept = layer.keys
    layer.crop(-1)
    layer.update(v[:, :, :1], v[:, :, :1])
    assert torch.equal(layer.keys[:, :, 3], v[:, :, 0])
    assert torch.equal(kept[:, :, :3], k[:, :, :3])


def test_gradients_are_refused():
    _, k, v = make.tensors(AttentionShape(1, 1, 1, 1, 4))
    with pytest.raises(ValueError, match="gradients"):
        SelectorCacheLayer().update(k.requires_grad_(), v)


@pytest.mark.parametrize("granularity", ["token", "block"])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize("cuts", [[60, *([1] * 20)], [7, 40, 1, 1, 20, 1], [1] * 30])
def test_rings_give_the_span_over_all_tokens(granularity, heads, cuts):
    total = sum(cuts)
    shape = AttentionShape(3, *heads, total, total, causal=True)
    q, k, v = make.tensors(shape)
    spread = torch.arange(heads[0]).int()
    if granularity == "token":
        sink, window = spread % 3, 5 + spread * 2
    else:
        sink, window = spread % 2, 1 + spread % 3
    zeros = torch.zeros_like(sink)
    span = SpanPlan(sink, window, zeros, zeros, zeros.bool(), 4, granularity)
    padded = torch.tensor([0, 3, 10]) if cuts[0] > 20 else torch.zeros(3, dtype=torch.int64)
    padding = torch.arange(total) >= padded[:, None]
    plan = replace(span, first=padded.int())
    want = attend(q, k, v, plan=plan, causal=True, key_padding=padding)
    layer = SpanCacheLayer(span, heads[1])
    layer.note_padding(padded)
    begin, outs = 0, []
    for n in cuts:
        rows = slice(begin, begin + n)
        begin += n
        new = layer.update(k[:, :, rows], v[:, :, rows])
        outs.append(layer.attend(q[:, :, rows], *new))
    torch.testing.assert_close(torch.cat(outs, 2), want, rtol=2e-5, atol=2e-5)
    assert layer.get_seq_length() == total
    assert layer.get_mask_sizes(1) == (total + 1, 0)


def test_rings_refuse_what_they_cannot_hold():
    span = SpanPlan.uniform(1, 4, stride=2)
    with pytest.raises(ValueError, match="bounded"):
        SpanCacheLayer(span, 1)
    layer = SpanCacheLayer(SpanPlan.uniform(1, 4), 1)
    layer.update(*torch.zeros(2, 1, 1, 6, 8))
    with pytest.raises(ValueError, match="ring of 5"):
        layer.crop(-1)
    with pytest.raises(ValueError, match="below"):
        layer.crop(1)


@pytest.mark.parametrize("granularity", ["token", "block"])
def test_rings_that_have_not_gone_round_give_back_their_last_tokens(granularity):
    shape = AttentionShape(2, 4, 2, 40, 40, causal=True)
    q, k, v = make.tensors(shape)
    span = SpanPlan.uniform(2, 5, heads=2, stride=3, block=4, granularity="block")
    if granularity == "token":
        span = SpanPlan.uniform(8, 20, heads=2)
    else:
        span = replace(span, sink=torch.zeros(2, dtype=torch.int32))
    want = attend(q, k, v, plan=span, causal=True)
    layer = SpanCacheLayer(span, 2)
    layer.update(k[:, :, :11], v[:, :, :11])
    layer.update(*(t[:, :, 20:29].flip(-1) for t in (k, v)))  # of a draft that was refused
    layer.crop(-9)
    assert layer.get_seq_length() == 11
    for begin, end in ((11, 15), *((n, n + 1) for n in range(15, 40))):
        new = layer.update(k[:, :, begin:end], v[:, :, begin:end])
        got = layer.attend(q[:, :, begin:end], *new)
        torch.testing.assert_close(got, want[:, :, begin:end], rtol=2e-5, atol=2e-5)
    fresh = SpanCacheLayer(span, 2)
    fresh.update(k[:, :, :3], v[:, :, :3])
    fresh.crop(-3)
    assert fresh.get_seq_length() == 0
