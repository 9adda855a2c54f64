"""What Double Sparsity promises: labels kept beside keys, exact attention over the best."""

from __future__ import annotations

import json

import plans as make
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import prompts, tiny

from aerogel.attention import (
    AttentionContext,
    AttentionShape,
    ChannelOrder,
    DoubleSparsitySelector,
    attach,
    attend,
    calibrate,
    calibrate_channels,
    detach,
    load_selector,
    save_selector,
    select,
)
from aerogel.attention.labels import (
    gather_channels,
    label_scores,
    pack_labels,
    unpack_labels,
)

pytest.importorskip("transformers")

from aerogel.attention.cache import AerogelCache
from aerogel.attention.label_cache import LabelCacheLayer, OffloadedCacheLayer

WINDOWS = torch.randint(2, 63, (4, 24), generator=torch.Generator().manual_seed(0))


def order(heads: int, dim: int, layers: int = 1, seed: int = 0) -> ChannelOrder:
    draw = torch.Generator().manual_seed(seed)
    return ChannelOrder(
        {i: torch.rand(heads, dim, generator=draw).argsort(-1) for i in range(layers)}
    )


def context(shape, dim=16, padding=None, cache=None):
    q, k, v = make.tensors(shape, dim)
    return AttentionContext(q, k, v, shape, dim**-0.5, key_padding=padding, cache_layer=cache)


def everywhere(channels, **options):
    return DoubleSparsitySelector(channels, dense_layers=(), **options)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([2, 4, 8]), st.integers(1, 9), st.integers(0, 10**6))
def test_packed_labels_are_within_half_a_step(bits, tokens, seed):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, tokens, 8, generator=draw) * 10
    x[0, 0, 0] = 2.5  # no range
    packed = pack_labels(x, bits)
    assert packed.codes.shape[-1] == bits
    error = (unpack_labels(packed, bits) - x).abs()
    assert (error <= packed.span[..., 1:] * 0.5001 + 1e-6).all()
    torch.testing.assert_close(unpack_labels(packed, bits)[0, 0, 0], x[0, 0, 0])
    q = torch.randn(2, 6, 1, 8, generator=draw)
    want = label_scores(q, unpack_labels(packed, bits))
    torch.testing.assert_close(label_scores(q, packed, bits), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("heads", [4, 2])
def test_labels_are_each_heads_own_channels(heads):
    k = torch.randn(3, 2, 5, 8)
    channels = order(heads, 8).layers[0][:, :3]
    label = gather_channels(k, channels)
    for h in range(heads):
        assert torch.equal(label[:, h], k[:, h * 2 // heads][..., channels[h]])
    assert label.is_contiguous()


@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
def test_all_channels_choose_the_exact_best_keys(heads):
    shape = AttentionShape(2, *heads, 3, 60, causal=True)
    ctx = context(shape)
    selector = everywhere(order(heads[0], 16), heavy_tokens=7, group_factor=1)
    mask = select(selector, ctx).to_dense_mask(shape)
    k = ctx.k.repeat_interleave(heads[0] // heads[1], 1)
    logits = (ctx.q @ k.transpose(-1, -2)).masked_fill(~shape.causal_mask(), -torch.inf)
    own = shape.positions()
    logits[:, :, torch.arange(3), own] = torch.inf
    want = torch.zeros_like(mask).scatter(-1, logits.topk(7).indices, True)
    assert torch.equal(mask, want)


def test_every_head_chooses_for_itself_and_each_row_keeps_its_own_key():
    shape = AttentionShape(2, 8, 2, 100, 100, causal=True)
    selector = everywhere(order(2, 16), heavy_tokens=9, sparse_prefill=True)
    mask = select(selector, context(shape)).to_dense_mask(shape)
    assert mask.shape[1] == 8
    assert not torch.equal(mask[:, 0], mask[:, 1])
    assert mask.diagonal(dim1=2, dim2=3).all()
    assert torch.equal(mask.sum(-1), (torch.arange(100) + 1).clamp(max=9).expand(2, 8, -1))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_never_chosen(side):
    shape = AttentionShape(2, 4, 2, 1, 50, causal=True)
    j = torch.arange(50)
    much = torch.tensor([[0], [30]])
    padding = j >= much if side == "left" else j < 50 - much
    plan = select(everywhere(order(4, 16), heavy_tokens=25), context(shape, padding=padding))
    kept = plan.to_dense_mask(shape)[:, :, 0]
    assert not (kept & ~padding[:, None]).any()
    assert (kept[1].sum(-1) == 20).all()


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([16, 4]), st.lists(st.integers(1, 9), min_size=1, max_size=5), st.data())
def test_labels_in_the_cache_are_those_of_its_keys(bits, cuts, data):
    selector = everywhere(order(4, 16), heavy_tokens=3, label_bits=bits)
    layer = LabelCacheLayer(selector)
    for n in cuts:
        shape = AttentionShape(3, 4, 2, n, n, causal=True)
        _, k, v = make.tensors(shape, seed=n)
        keys, _ = layer.update(k, v)
        layer.append_labels(keys, 0, 4)
        action = data.draw(st.sampled_from(["none", "crop", "reorder"]))
        if action == "crop":
            layer.crop(-data.draw(st.integers(1, n)))
        elif action == "reorder":
            layer.reorder_cache(torch.tensor([2, 0, 0]))
        want = selector.labels_of(layer.keys, 0, 4) if layer.keys.shape[2] else {}
        for name, part in want.items():
            assert torch.equal(layer.side[name], part)


def test_runs_hold_neighbours():
    shape = AttentionShape(1, 4, 4, 1, 103, causal=True)
    plan = select(everywhere(order(4, 16), heavy_tokens=32, run=16), context(shape))
    kept = plan.to_dense_mask(shape)[0, :, 0]
    for head in kept:
        runs = torch.nn.functional.pad(head, (0, 9)).view(-1, 16).any(-1)
        assert runs[-1]
        assert int(runs.sum()) == 2
        assert int(head.sum()) == 16 + 103 % 16


def test_statistics_are_means_over_all_pieces_however_they_are_cut():
    model = tiny("Llama")
    for metric in ("q", "k", "qk"):
        whole = calibrate_channels(model, [WINDOWS], metric)
        parts = calibrate_channels(model, WINDOWS.split(1), metric)
        for layer in (0, 1):
            assert torch.equal(whole.layers[layer], parts.layers[layer])
            assert whole.layers[layer].shape == (2, 8)
    single = calibrate_channels(model, [WINDOWS], "qk", share_group=False)
    assert single.layers[0].shape == (4, 8)
    assert calibrate_channels(model, [WINDOWS]).metric == "q"


def test_a_larger_channel_moves_forward_and_before_rope_means_before():
    model = tiny("Llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[8 + 5] *= 50  # head 1, channel 5
    found = calibrate_channels(model, [WINDOWS], "q", share_group=False)
    assert found.layers[1][1, 0] == 5
    partner = (found.layers[1][1] == 1).nonzero()  # rotary embedding would spread it to channel 1
    assert int(partner) > 0
    size = model.model.embed_tokens(WINDOWS)  # layer 0 by hand
    x = model.model.layers[0].input_layernorm(size)
    q = model.model.layers[0].self_attn.q_proj(x).unflatten(-1, (4, 8)).abs().mean((0, 1))
    assert torch.equal(found.layers[0], q.argsort(-1, descending=True))


def test_channel_files_are_ours_or_the_authors(tmp_path):
    ours = order(4, 8, layers=2)
    ours.save(tmp_path / "ours.json")
    again = ChannelOrder.load(tmp_path / "ours.json")
    assert all(torch.equal(again.layers[i], ours.layers[i]) for i in (0, 1))
    official = {f"model.layers.{i}.self_attn.qk_proj": ours.layers[i].tolist() for i in (0, 1)}
    official |= {"model.layers.0.self_attn.o_proj": [[0]], "model.layers.0.mlp.down_proj": [[1]]}
    (tmp_path / "official.json").write_text(json.dumps(official))
    again = ChannelOrder.load(tmp_path / "official.json")
    assert again.metric == "qk"
    assert torch.equal(again.layers[1], ours.layers[1])
    official["model.layers.0.self_attn.q_proj"] = ours.layers[0].tolist()
    with pytest.raises(ValueError, match="metric=''"):
        ChannelOrder.from_json(official)
    with pytest.raises(ValueError, match="permutation"):
        ChannelOrder({0: torch.zeros(2, 4).long()})
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="not a channel file"):
        ChannelOrder.load(tmp_path / "bad.json")


def generate(model, cache=True, **options):
    ids, mask = prompts(length=30)
    made = AerogelCache(model) if cache else None
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False,
        past_key_values=made, **options,
    ), made  # fmt: skip


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "GPTNeoX"])
@pytest.mark.parametrize("bits", [16, 4])
def test_generation_with_a_budget_for_all_keys_gives_the_models_own_tokens(family, bits):
    model = tiny(family)
    want = generate(model, cache=False)[0]
    selector = calibrate(
        model, "double-sparsity", WINDOWS, heavy_tokens=100, label_bits=bits, dense_layers=()
    )
    attach(model, selector)
    got, _ = generate(model)
    beams, _ = generate(model, num_beams=3)
    detach(model)
    assert torch.equal(got, want)
    assert torch.equal(beams, generate(model, cache=False, num_beams=3)[0])


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_offloading_with_a_budget_for_all_keys_gives_the_models_own_tokens(family):
    model = tiny(family, num_hidden_layers=4)
    want = generate(model, cache=False)[0]
    selector = calibrate(
        model, "double-sparsity", WINDOWS, heavy_tokens=100, dense_layers=(0,), offload=True
    )
    attach(model, selector)
    got, cache = generate(model)
    beams, _ = generate(model, num_beams=2)
    detach(model)
    assert torch.equal(got, want)
    assert torch.equal(beams, generate(model, cache=False, num_beams=2)[0])
    assert [layer.foretold for layer in cache.layers] == [0, 7, 7, 0]
    assert not cache.layers[0].side
    assert cache.layers[1].side["label"].shape[-2] == cache.get_seq_length()


def test_the_foretold_query_is_the_next_layers_projection_of_this_input(monkeypatch):
    model = tiny("Llama", num_hidden_layers=4)
    attach(
        model,
        calibrate(
            model, "double-sparsity", WINDOWS, heavy_tokens=5, dense_layers=(0,), offload=True
        ),
    )
    queries, inputs = [], []
    keep = OffloadedCacheLayer.fetch_for
    monkeypatch.setattr(
        OffloadedCacheLayer,
        "fetch_for",
        lambda self, q: (queries.append((self.layer_idx, q)), keep(self, q)),
    )
    cache = AerogelCache(model)
    with torch.no_grad():
        model(WINDOWS[:1], past_key_values=cache)
        norm = model.model.layers[1].input_layernorm
        norm.register_forward_hook(lambda *a: inputs.append(a[-1]))
        model(WINDOWS[:1, :1], past_key_values=cache)
        at = torch.tensor([[24]])
        rotary = model.model.rotary_emb(inputs[0], at)
        q = model.model.layers[2].self_attn.q_proj(inputs[0]).view(1, 1, 4, 8).transpose(1, 2)
        cos, sin = rotary
        half = torch.cat([-q[..., 4:], q[..., :4]], -1)
    assert [layer for layer, _ in queries] == [1, 2]
    torch.testing.assert_close(queries[1][1], q * cos + half * sin)


def test_fetched_rows_are_the_chosen_rows_and_the_new_one():
    selector = everywhere(order(4, 16, layers=3), heavy_tokens=6, offload=True)
    layer = OffloadedCacheLayer(selector, 1)
    shape = AttentionShape(2, 4, 2, 40, 40, causal=True)
    q, k, v = make.tensors(shape)
    layer.attend(q[:, :, :39], *layer.update(k[:, :, :39], v[:, :, :39]))
    layer.fetch_for(q[:, :, 38:39])
    out = layer.attend(q[:, :, 39:], *layer.update(k[:, :, 39:], v[:, :, 39:]))
    assert layer.foretold == 1
    scores = selector.scores(q[:, :, 38:39], selector.labels_of(k[:, :, :39], 1, 4), 1, 2)[:, :, 0]
    mask = torch.zeros(2, 4, 40, dtype=torch.bool).scatter(-1, scores.topk(5).indices, True)
    mask[..., 39] = True
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    want = torch.nn.functional.scaled_dot_product_attention(
        q[:, :, 39:], k, v, attn_mask=mask[:, :, None]
    )
    torch.testing.assert_close(out, want, rtol=2e-5, atol=2e-5)


def test_sparse_steps_with_a_cache_are_the_rows_of_a_sparse_prompt():
    model = tiny("Llama")
    ids = prompts()[0][:1]
    channels = calibrate_channels(model, [WINDOWS], "qk")
    selector = DoubleSparsitySelector(
        channels, heavy_tokens=6, group_factor=2, dense_layers=(0,), sparse_prefill=True,
        dense_when_short=False,
    )  # fmt: skip
    attach(model, selector)
    with torch.no_grad():
        whole = model(ids).logits
        cache = AerogelCache(model)
        steps = [model(ids[:, :20], past_key_values=cache).logits]
        for i in range(20, ids.shape[1]):
            steps.append(model(ids[:, i : i + 1], past_key_values=cache).logits)
    detach(model)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)


def test_a_selector_survives_its_file(tmp_path):
    model = tiny("Llama")
    selector = calibrate(model, "double-sparsity", WINDOWS, heavy_tokens=5, label_bits=4)
    save_selector(selector, model, tmp_path / "s.safetensors")
    loaded = load_selector(tmp_path / "s.safetensors", model)
    assert loaded.options() == selector.options()
    with pytest.raises(ValueError, match="another model"):
        load_selector(tmp_path / "s.safetensors", tiny("Llama", num_hidden_layers=3))


def test_shared_labels_follow_the_mean_rank():
    channels = ChannelOrder({0: torch.tensor([[0, 1, 2, 3], [0, 2, 1, 3]])})
    assert channels.shared(1).layers[0].tolist() == [[0, 1, 2, 3]]
    selector = everywhere(channels, group_factor=2, share_group=True)
    assert selector.label_channels(0, 2, 1, 4).tolist() == [[0, 1]]
    with pytest.raises(ValueError, match="kv_heads=3"):
        channels.shared(3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heavy_tokens": 0}, "heavy_tokens must be at least 1, got 0"),
        ({"heavy_tokens": 1, "offload": True}, "at least 2 with offload"),
        ({"group_factor": 3}, "group_factor=3"),
        ({"label_bits": 5}, "label_bits=5"),
        ({"run": 0}, "run must be at least 1, got 0"),
        ({"run": 200}, "run=200"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DoubleSparsitySelector(order(4, 16), **options)


def test_bad_calls_are_named():
    shape = AttentionShape(1, 4, 2, 1, 300, causal=True)
    with pytest.raises(ValueError, match="of another model"):
        select(everywhere(order(3, 16)), context(shape))
    with pytest.raises(ValueError, match="no layer 0"):
        select(everywhere(ChannelOrder({5: order(4, 16).layers[0]})), context(shape))
    with pytest.raises(ValueError, match="AerogelCache"):
        select(everywhere(order(4, 16)), context(shape, cache=object()))
    model = tiny("Llama")
    with pytest.raises(ValueError, match="no tokens"):
        calibrate_channels(model, [])
    with pytest.raises(ValueError, match="metric='v'"):
        calibrate_channels(model, [WINDOWS], "v")
    assert not hasattr(model, "_forward_hooks") or not model._forward_hooks
    single = tiny("Llama", num_hidden_layers=1)
    with pytest.raises(ValueError, match="two in succession"):
        attach(single, everywhere(order(4, 8), offload=True))
    neox = tiny("GPTNeoX")
    with pytest.raises(ValueError, match="foretold"):
        attach(neox, everywhere(order(4, 8, layers=2), offload=True))


def test_sparse_attention_is_exact_over_the_chosen_keys():
    shape = AttentionShape(2, 4, 2, 1, 90, causal=True)
    ctx = context(shape)
    plan = select(everywhere(order(4, 16), heavy_tokens=11), ctx)
    k, v = (t.repeat_interleave(2, 1) for t in (ctx.k, ctx.v))
    mask = plan.to_dense_mask(shape)
    want = torch.nn.functional.scaled_dot_product_attention(ctx.q, k, v, attn_mask=mask)
    got = attend(ctx.q, ctx.k, ctx.v, plan=plan, causal=True)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("heads", "padding"), [((4, 4), False), ((8, 2), True)])
@pytest.mark.parametrize(("bits", "run"), [(16, 1), (4, 1), (16, 4)])
def test_a_step_in_one_go_is_the_step_of_its_plan(heads, padding, bits, run):
    shape = AttentionShape(2, *heads, 2, 90, causal=True)
    selector = everywhere(
        order(heads[0], 16), heavy_tokens=12, run=run, label_bits=bits, dense_when_short=False
    )
    real = torch.arange(90) >= torch.tensor([[0], [30]]) if padding else None
    _, k, v = make.tensors(shape)
    layer = LabelCacheLayer(selector)
    layer.update(k, v)
    ctx = context(shape, padding=real, cache=layer)
    sink = torch.randn(heads[0])
    with torch.no_grad():
        got = selector.attention(ctx, softcap=5.0, sink_logit=sink)
        plan = select(selector, ctx)
    want = attend(
        ctx.q, ctx.k, ctx.v, plan=plan, causal=True, key_padding=real, softcap=5.0, sink_logit=sink
    )
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_short_contexts_are_read_whole_and_long_ones_are_not():
    selector = everywhere(order(8, 64), heavy_tokens=128)
    lengths = [128, 512, 4096, 32768]
    whole = [selector.reads_all(AttentionShape(1, 8, 8, 1, n, causal=True), 4) for n in lengths]
    assert whole == [True, True, False, False]
    shape = AttentionShape(1, 8, 8, 1, 128, causal=True)
    _, k, v = make.tensors(shape, 64)
    layer = LabelCacheLayer(selector)
    layer.update(k, v)
    ctx = context(shape, 64, cache=layer)
    want = torch.nn.functional.scaled_dot_product_attention(ctx.q, ctx.k, ctx.v)
    with torch.no_grad():
        assert torch.equal(selector.attention(ctx), want)
    assert layer.side["label"].shape[-2] == 128
