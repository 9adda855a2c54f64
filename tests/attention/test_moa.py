"""What MoA's selector promises: sizes by the rules, rings of exactly them, plan files."""

from __future__ import annotations

import json

import plans as make
import pytest
import torch
from tiny_models import prompts, tiny

from aerogel.attention import (
    AttentionContext,
    AttentionShape,
    ElasticSpan,
    MoAPlan,
    MoASelector,
    attach,
    attend,
    detach,
)
from aerogel.attention.cache import AerogelCache

MIXED = MoAPlan.of(
    [
        [ElasticSpan(0, 0.25), ElasticSpan(24, 0.125)],
        [ElasticSpan(-8, 1), ElasticSpan(0, 1)],
    ],
    block=8,
    sink=8,
)


def context(shape, tensors, layer=0):
    return AttentionContext(*tensors, shape, 0.25, layer_idx=layer)


def test_sizes_follow_the_rules():
    assert MIXED.cache_sizes(100, 60).tolist() == [[40, 48], [152, 160]]
    assert MIXED.cache_sizes(100, 0).tolist() == [[32, 40], [96, 104]]
    assert MIXED.cache_sizes(32, 0).tolist() == [[16, 32], [24, 32]]
    plan = MoAPlan.uniform(ElasticSpan(-1024, 1), 1, 1)
    assert plan.cache_sizes(1100, 0).tolist() == [[128]]
    assert plan.cache_sizes(8192, 1024).tolist() == [[8192]]
    assert MIXED.spans(100).tolist() == [[25, 36.5], [92, 100]]
    assert MIXED.density(160) == pytest.approx((40 + 48 + 152 + 160) / 4 / 160)


def test_the_whole_length_is_dense():
    shape = AttentionShape(1, 4, 2, 100, 100, causal=True)
    plan = MoAPlan.uniform(ElasticSpan(0, 1), 1, 2, 8, 8)
    for max_new in (0, 50):
        span = MoASelector(plan, max_new).plan_prefill(context(shape, make.tensors(shape)))
        assert span.density(shape) == 1


def test_a_prompt_sees_blocks_and_a_step_sees_the_ring():
    selector = MoASelector(MIXED, max_new=60, length=100)
    prompt, step = selector.span(0, 100), selector.span(0, 100, "token")
    assert prompt.sink.tolist() == [1, 1]
    assert prompt.window.tolist() == [4, 5]
    assert step.window.tolist() == [32, 40]
    assert step.cache_tokens() == [40, 48]
    shape = AttentionShape(1, 2, 2, 160, 160, causal=True)
    blocks, tokens = (p.to_dense_mask(shape) for p in (prompt, step))
    assert (tokens | ~blocks).all()
    assert int((tokens.sum(-1) - blocks.sum(-1)).max()) <= 7


@pytest.mark.parametrize("layer", [0, 1])
def test_rings_hold_the_first_and_the_last_tokens(layer):
    selector = MoASelector(MIXED, max_new=60, length=100)
    cache = selector.cache_layer(layer, 2)
    shape = AttentionShape(2, 4, 2, 150, 150, causal=True)
    q, k, v = make.tensors(shape)
    prompt = attend(q, k, v, plan=selector.span(layer, 100), causal=True)
    steps = attend(q, k, v, plan=selector.span(layer, 100, "token"), causal=True)
    new = cache.update(k[:, :, :100], v[:, :, :100])
    torch.testing.assert_close(cache.attend(q[:, :, :100], *new), prompt[:, :, :100])
    store = cache.keys.data_ptr()
    for n in range(100, 150):
        part = slice(n, n + 1)
        new = cache.update(k[:, :, part], v[:, :, part])
        out = cache.attend(q[:, :, part], *new)
        torch.testing.assert_close(out, steps[:, :, part], rtol=2e-5, atol=2e-5)
    assert cache.keys.data_ptr() == store
    for head, size in enumerate(MIXED.cache_sizes(100, 60)[layer].tolist()):
        held = cache.positions[0, cache.offsets[head] : cache.offsets[head + 1]]
        held = sorted(held[held >= 0].tolist())
        last = range(max(8, 150 - (size - 8)), 150)
        assert held == [*range(8), *last]


def test_chunks_of_a_prompt_are_the_prompt():
    selector = MoASelector(MIXED, max_new=60, length=100)
    shape = AttentionShape(1, 4, 2, 100, 100, causal=True)
    q, k, v = make.tensors(shape)
    want = attend(q, k, v, plan=selector.span(0, 100), causal=True)
    cache, outs = selector.cache_layer(0, 2), []
    for part in (slice(0, 35), slice(35, 70), slice(70, 100)):
        new = cache.update(k[:, :, part], v[:, :, part])
        outs.append(cache.attend(q[:, :, part], *new))
    torch.testing.assert_close(torch.cat(outs, 2), want, rtol=2e-5, atol=2e-5)


def test_more_tokens_than_the_cache_was_sized_for_are_refused():
    selector = MoASelector(MIXED, max_new=2, length=30)
    cache = selector.cache_layer(0, 2)
    _, k, v = make.tensors(AttentionShape(1, 4, 2, 1, 33))
    with pytest.raises(ValueError, match="sized for 32"):
        cache.update(k, v)
    cache.update(k[:, :, :32], v[:, :, :32])
    with pytest.raises(ValueError, match="ring"):
        cache.crop(-1)
    shape = AttentionShape(1, 4, 2, 40, 40, causal=True)
    with pytest.raises(ValueError, match="40 keys"):
        selector.plan_prefill(context(shape, make.tensors(shape)))


def test_without_a_length_the_first_prompt_makes_the_sizes():
    _, k, v = make.tensors(AttentionShape(1, 4, 2, 1, 33))
    cache = MoASelector(MIXED, max_new=2).cache_layer(1, 2)
    for length in (30, 16):
        cache.update(k[:, :, :length], v[:, :, :length])
        fixed = MoASelector(MIXED, max_new=2, length=length).cache_layer(1, 2)
        assert torch.equal(cache.offsets, fixed.offsets)
        with pytest.raises(ValueError, match=f"sized for {length + 2}"):
            cache.update(k[:, :, :3], v[:, :, :3])
        cache.reset()


def test_plan_files_and_options_survive_a_round_trip(tmp_path):
    MIXED.save(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["alphas"] == [[0, 24], [-8, 0]]
    assert MoAPlan.load(tmp_path / "plan.json", 8, 8) == MIXED
    options = json.loads(json.dumps(MoASelector(MIXED, 7, 30).options()))
    again = MoASelector(**options)
    assert (again.plan, again.max_new, again.length) == (MIXED, 7, 30)
    (tmp_path / "bad.json").write_text('{"alphas": 1}')
    with pytest.raises(ValueError, match="lists of lists"):
        MoAPlan.load(tmp_path / "bad.json")


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"beta must be in \[0, 1\], got 1\.5"):
        ElasticSpan(0, 1.5)
    with pytest.raises(ValueError, match="layer 1, head 0"):
        MIXED.cache_sizes(8, 0)
    with pytest.raises(ValueError, match="heads per layer"):
        MoAPlan(((1.0,),), ((0.5, 0.5),))
    with pytest.raises(ValueError, match="multiple of the block"):
        MoAPlan(((1.0,),), ((0.5,),), 64, 10)
    model = tiny("Llama", num_hidden_layers=3)
    with pytest.raises(ValueError, match="expected 3 layers of 2 or 4"):
        attach(model, MoASelector(MIXED))


def test_a_model_generates_the_same_with_rings_as_with_all_keys():
    model = tiny("Llama")
    ids, mask = prompts()
    options = {"max_new_tokens": 10, "do_sample": False, "min_new_tokens": 10}
    attach(model, MoASelector(MIXED, 12, ids.shape[1]))
    want = model.generate(ids, attention_mask=mask, **options)
    cache = AerogelCache(model)
    got = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    detach(model)
    assert torch.equal(got, want)
    sizes = MIXED.cache_sizes(ids.shape[1], 12)
    assert [layer.keys.shape[1] for layer in cache.layers] == sizes.sum(1).tolist()
