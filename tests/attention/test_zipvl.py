"""What ZipVL promises: a budget by mass, a choice fair to late tokens, a cache in codes."""

from __future__ import annotations

import itertools

import plans as make
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_models import prompts, tiny
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from aerogel.attention import (
    AttentionContext,
    AttentionShape,
    DensePlan,
    KeyListPlan,
    TokenPlan,
    ZipVLSelector,
    apply_zipvl,
    attach,
    attend,
    mass_budget,
    probe_rows,
    probe_scores,
)
from aerogel.attention.mixed_cache import MixedPrecisionCacheLayer
from aerogel.attention.quantise import quantise_keys, quantise_values, value_channels
from aerogel.kernels.attention_codes import pack_tokens, unpack_tokens


def context(batch=2, length=120, padding=None, seed=0, causal=True, sharp=1.0):
    shape = AttentionShape(batch, 4, 2, length, length, causal=causal)
    q, k, v = make.tensors(shape, seed=seed)
    return AttentionContext(q * sharp, k, v, shape, 0.25, key_padding=padding)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 10), min_size=1, max_size=30), st.floats(0.01, 1))
def test_the_budget_is_the_smallest_that_holds_the_share(weights, tau):
    scores = torch.tensor(weights)
    budget = int(mass_budget(scores, tau))
    ordered = scores.sort(descending=True).values.double()
    if tau == 1:
        assert budget == len(weights)
        return
    total = float(ordered.sum())
    assert float(ordered[:budget].sum()) >= tau * total - 1e-4
    if budget > 1:
        assert float(ordered[: budget - 1].sum()) <= tau * total + 1e-4
    assert budget <= int(mass_budget(scores, min(1.0, tau + 0.2)))


def test_flat_attention_needs_the_share_and_one_hot_attention_its_keys():
    length = 400
    q, k = torch.zeros(1, 2, length, 16), torch.zeros(1, 2, length, 16)
    rows = torch.tensor([[length - 1]])
    assert abs(int(mass_budget(probe_scores(q, k, rows), 0.9)) - 360) <= 1
    k[0, :, [7, 90], [0, 1]] = 100.0
    q[0, :, ::2, 0], q[0, :, 1::2, 1] = 100.0, 100.0
    rows = torch.arange(300, 400)[None]
    assert int(mass_budget(probe_scores(q, k, rows), 0.975)) == 2


@pytest.mark.parametrize("causal", [False, True])
def test_scores_are_the_probing_rows_of_the_full_matrix(causal):
    padding = torch.arange(120) >= torch.tensor([[0], [30]])
    ctx = context(padding=padding, causal=causal)
    rows = torch.tensor([[60, 90, 119], [70, 119, -1]])
    got = probe_scores(ctx.q, ctx.k, rows, causal=causal, key_padding=padding)
    k = ctx.k.repeat_interleave(2, 1)
    mask = padding[:, None, None] & (ctx.shape.causal_mask() if causal else True)
    weights = (ctx.q @ k.transpose(-1, -2) * 0.25).masked_fill(~mask, -torch.inf).softmax(-1)
    for b, chosen in enumerate(([60, 90, 119], [70, 119])):
        want = weights[b, :, chosen].sum(1).mean(0)
        torch.testing.assert_close(got[b], want, rtol=1e-5, atol=1e-6)
        assert float(got[b].sum()) == pytest.approx(len(chosen), rel=1e-5)
    assert (got[1, :30] == 0).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3000), st.floats(0, 1), st.floats(0, 1), st.integers(1, 300))
@example(length=100, recent=0.0, random=1.0, most=1)
def test_probes_are_distinct_rows_with_the_last_and_within_the_limit(length, recent, random, most):
    rows = probe_rows(length, recent, random, most)
    assert rows[-1] == length - 1
    assert (rows.diff() > 0).all()
    assert rows[0] >= 0
    assert len(rows) <= max(1, most)
    assert torch.equal(rows, probe_rows(length, recent, random, most))


def test_the_normalised_score_chooses_and_the_plain_score_counts():
    selector = ZipVLSelector(keep_last=1)
    scores = torch.tensor([[3.0, 1.0, 0.9, 0.9, 0.1]])
    rows = torch.tensor([[0, 1, 2, 3, 4]])  # token j is seen by 5 - j of them
    zero = torch.zeros(1, dtype=torch.long)
    chosen = selector.choose(scores, rows, torch.tensor([3]), zero)
    assert chosen[0].nonzero().flatten().tolist() == [0, 3, 4]  # 0.6, 0.45, and the last
    ties = selector.choose(torch.ones(1, 5), torch.tensor([[4]]), torch.tensor([2]), zero)
    assert ties[0].nonzero().flatten().tolist() == [3, 4]
    first = ZipVLSelector(keep_first=2).choose(scores, rows, torch.tensor([1]), zero)
    assert first[0].nonzero().flatten().tolist() == [0, 1, 4]
    full = ZipVLSelector(normalizer="full").choose(scores, rows, torch.tensor([3]), zero)
    assert torch.equal(full, chosen)


def test_all_mass_is_dense_attention_and_more_mass_more_tokens():
    ctx = context(sharp=3.0)
    counts = []
    for tau in (0.3, 0.6, 0.9, 0.99, 1.0):
        plan = ZipVLSelector(tau).plan_prefill(ctx)
        plan.validate(ctx.shape)
        counts.append(plan.count)
    assert all((a <= b).all() for a, b in itertools.pairwise(counts))
    assert (counts[-1] == 120).all()
    assert (counts[0] < 60).all()
    got = attend(ctx.q, ctx.k, ctx.v, plan=plan, causal=True)
    want = scaled_dot_product_attention(ctx.q, ctx.k, ctx.v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_chosen_tokens_attend_among_themselves_and_the_others_get_zero():
    padding = torch.arange(120) >= torch.tensor([[0], [30]])
    ctx = context(padding=padding, sharp=3.0)
    plan = ZipVLSelector(0.7).plan_prefill(ctx)
    mask = torch.zeros(2, 120, dtype=torch.bool)
    for b in range(2):
        mask[b, plan.index[b, : plan.count[b]].long()] = True
    assert mask[:, -1].all()
    assert not (mask & ~padding).any()
    pairs = mask[:, None, :, None] & mask[:, None, None] & ctx.shape.causal_mask()
    got = attend(ctx.q, ctx.k, ctx.v, plan=plan, causal=True, key_padding=padding)
    want = attend(ctx.q, ctx.k, ctx.v, plan=KeyListPlan.from_bitmask(pairs), backend="reference")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for part in (TokenPlan.from_mask(mask[:1], "both"), TokenPlan.from_mask(mask[1:], "both")):
        shared = attend(ctx.q, ctx.k, ctx.v, plan=part, causal=True)
        reference = attend(ctx.q, ctx.k, ctx.v, plan=part, causal=True, backend="reference")
        torch.testing.assert_close(shared, reference, rtol=1e-5, atol=1e-5)


def test_a_prompt_in_a_batch_gets_the_plan_it_gets_alone():
    alone = context(1, 90, sharp=3.0)
    q, k, v = (torch.nn.functional.pad(t, (0, 0, 30, 0)) for t in (alone.q, alone.k, alone.v))
    other = context(1, 120, seed=1)
    batch = [torch.cat(pair) for pair in ((other.q, q), (other.k, k), (other.v, v))]
    padding = torch.arange(120) >= torch.tensor([[0], [30]])
    ctx = context(padding=padding)
    ctx.q, ctx.k, ctx.v = batch
    plan = ZipVLSelector(0.7).plan_prefill(ctx)
    want = ZipVLSelector(0.7).plan_prefill(alone)
    assert plan.count[1] == want.count[0]
    assert torch.equal(plan.index[1, : plan.count[1]] - 30, want.index[0, : want.count[0]])


def test_later_tokens_do_not_reach_earlier_rows_of_a_fixed_plan():
    ctx = context(sharp=3.0)
    plan = ZipVLSelector(0.8).plan_prefill(ctx)
    before = attend(ctx.q, ctx.k, ctx.v, plan=plan, causal=True)
    k, v = ctx.k.clone(), ctx.v.clone()
    k[:, :, 70:], v[:, :, 70:] = 5.0, 5.0
    after = attend(ctx.q, k, v, plan=plan, causal=True)
    assert torch.equal(before[:, :, :70], after[:, :, :70])


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([2, 4, 8]), st.integers(1, 40), st.integers(0, 999))
def test_packing_is_a_bijection_and_errors_stay_within_half_a_step(bits, tokens, seed):
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (2, 3, tokens, 16), generator=draw).to(torch.uint8)
    packed = pack_tokens(codes, bits)
    assert packed.shape == (2, 3, -(-tokens // 16), 16 * bits // 8, 16)
    assert torch.equal(unpack_tokens(packed, bits)[:, :, :tokens], codes)
    x = torch.randn(2, 3, tokens, 16, generator=draw) * 10 + 30
    x[:, :, :, 3] = 7.7  # a constant channel
    for scales in (torch.float16, torch.float32):
        keys = quantise_keys(x, bits, scales=scales)
        error = (keys.dequantised() - x).abs()
        assert (error <= keys.step.float() / 2 + 1e-4).all()
        channel = value_channels(x, scales=scales)
        values = quantise_values(x, bits, channel, scales=scales)
        error = (values.dequantised() - x).abs()
        half = channel.float() * values.step[:, :, :tokens].float() / 2
        assert (error <= half + 1e-4).all()


def test_tokens_of_two_values_are_exact_and_padding_moves_no_range():
    v = torch.randint(0, 2, (2, 3, 20, 16)).float() * 3 - 1
    v[:, :, 0], v[:, :, 1] = 2, -1  # every channel the same largest number
    channel = value_channels(v, scales=torch.float32)
    got = quantise_values(v, 2, channel, scales=torch.float32).dequantised()
    torch.testing.assert_close(got, v, rtol=1e-5, atol=1e-5)
    real = torch.arange(20) < torch.tensor([[20], [9]])
    wild = torch.where(real[:, None, :, None], v, 1e6)
    keys = quantise_keys(wild, 4, real)
    assert float(keys.low[1].max()) <= 2
    assert float((keys.dequantised() - v)[1, :, :9].abs().max()) <= 0.11


def layer_after(steps, gap=100, length=60, **options):
    """A cache layer after a prompt and single steps; the queries, keys and values of all."""
    shape = AttentionShape(2, 4, 2, length + steps, length + steps, causal=True)
    q, k, v = make.tensors(shape)
    layer = MixedPrecisionCacheLayer(stream_gap=gap, **options)
    outputs = []
    for rows in (slice(0, length), *(slice(i, i + 1) for i in range(length, length + steps))):
        new = (q[:, :, rows], k[:, :, rows], v[:, :, rows])
        layer.update(*new[1:])
        outputs.append(layer.attend(*new))
    return layer, torch.cat(outputs, 2), (q, k, v)


def test_streams_close_every_hundred_tokens_and_old_codes_stay():
    layer, _, _ = layer_after(250)
    assert layer.keys.shape[2] == 50
    assert layer.get_seq_length() == 310
    positions = torch.cat([s.positions for s in layer.segments], 1)
    for row in positions:
        assert sorted(row[row >= 0].tolist()) == list(range(260))
    starts = [int(s.positions[s.positions >= 0].min()) for s in layer.segments]
    assert {min(starts), 60, 160} <= {s // 10 * 10 for s in starts}
    before = [s.parts()[1].data_ptr() for s in layer.segments]
    new = torch.randn(2, 2, 1, 16)
    layer.update(new, new)
    layer.attend(torch.randn(2, 4, 1, 16), new, new)
    assert [s.parts()[1].data_ptr() for s in layer.segments] == before
    assert all(t.dtype != torch.float32 for s in layer.segments for t in s.parts()), (
        "codes and ranges only"
    )


def test_sixteen_bits_are_exact_and_eight_nearly():
    for bits, tolerance in ((16, 2e-5), (8, 5e-2)):
        options = {"bits_important": bits, "bits_other": bits}
        _, got, (q, k, v) = layer_after(130, gap=40, **options)
        want = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_eviction_attends_to_the_important_tokens_alone():
    selector = ZipVLSelector(0.5)
    layer = MixedPrecisionCacheLayer(selector.plan_prefill, bits_important=16, kv="evict")
    ctx = context(length=80, sharp=3.0)
    plan = selector.plan_prefill(ctx)
    layer.update(ctx.k, ctx.v)
    layer.attend(ctx.q, ctx.k, ctx.v)
    q, k, v = make.tensors(AttentionShape(2, 4, 2, 1, 1), seed=9)
    layer.update(k, v)
    got = layer.attend(q, k, v)
    keys, values = torch.cat([ctx.k, k], 2), torch.cat([ctx.v, v], 2)
    mask = torch.zeros(2, 1, 1, 81, dtype=torch.bool)
    for b in range(2):
        mask[b, 0, 0, plan.index[b, : plan.count[b]].long()] = True
    mask[..., -1] = True
    want = scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert mask.sum() < 120


def test_bytes_count_codes_ranges_and_tail():
    layer, _, (_, k, _v) = layer_after(0, length=512)
    half = 2 * k.numel() * 2
    assert layer.nbytes() < half / 3
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0, 3]))
    assert layer.segments[0].positions.shape[0] == 2
    layer.reset()
    assert layer.nbytes() == layer.get_seq_length() == 0


def test_a_model_generates_with_its_mixed_cache():
    model = tiny("Llama")
    ids, mask = prompts()
    options = {"attention_mask": mask, "max_new_tokens": 12, "min_new_tokens": 12}
    options["do_sample"] = False
    want = model.generate(ids, **options)
    handle = apply_zipvl(model, 1.0, bits_important=16, bits_other=16, stream_gap=5)
    assert torch.equal(model.generate(ids, past_key_values=handle.cache(), **options), want)
    assert handle.ratios == [1.0, 1.0]
    handle.remove()
    assert torch.equal(model.generate(ids, **options), want)
    handle = apply_zipvl(model, 0.5)
    cache = handle.cache()
    model.generate(ids, past_key_values=cache, **options)
    assert all(0 < ratio < 0.8 for ratio in handle.ratios)
    assert cache.get_seq_length() == 51
    handle.remove()
    model.set_attn_implementation("aerogel:zipvl")
    model.generate(ids, **options)


def test_every_key_head_may_choose_for_itself():
    padding = torch.arange(120) >= torch.tensor([[0], [30]])
    ctx = context(padding=padding, sharp=3.0)
    selector = ZipVLSelector(0.7, per_kv_head=True)
    plan = selector.plan_prefill(ctx)
    plan.validate(ctx.shape)
    assert selector.ratios[0] == pytest.approx(
        float((plan.count / torch.tensor([[120], [90]])).mean())
    )
    mask = torch.zeros(2, 2, 120, dtype=torch.bool)
    for head in range(2):
        q, k, v = ctx.q[:, 2 * head : 2 * head + 2], ctx.k[:, head : head + 1], ctx.v[:, :1]
        alone = AttentionContext(
            q, k, v, AttentionShape.of(q, k, causal=True), 0.25, key_padding=padding
        )
        want = ZipVLSelector(0.7).plan_prefill(alone)
        assert torch.equal(plan.count[:, head], want.count)
        for b in range(2):
            chosen = want.index[b, : want.count[b]].long()
            assert torch.equal(plan.index[b, head, : want.count[b]].long(), chosen)
            mask[b, head, chosen] = True
    assert not torch.equal(mask[:, 0], mask[:, 1])
    wide = mask.repeat_interleave(2, 1)
    pairs = wide[..., None] & wide[:, :, None] & ctx.shape.causal_mask()
    got = attend(ctx.q, ctx.k, ctx.v, plan=plan, causal=True, key_padding=padding)
    want = attend(ctx.q, ctx.k, ctx.v, plan=KeyListPlan.from_bitmask(pairs), backend="reference")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_cache_by_key_heads_evicts_for_each():
    selector = ZipVLSelector(0.5, per_kv_head=True)
    options = {"bits_important": 16, "kv": "evict", "per_kv_head": True}
    layer = MixedPrecisionCacheLayer(selector.plan_prefill, **options)
    ctx = context(length=80, sharp=3.0)
    plan = selector.plan_prefill(ctx)
    layer.update(ctx.k, ctx.v)
    got = layer.attend(ctx.q, ctx.k, ctx.v, scale=0.25)
    torch.testing.assert_close(got, attend(ctx.q, ctx.k, ctx.v, plan=plan, causal=True))
    layer.batch_select_indices(torch.tensor([1, 0]))
    q, k, v = make.tensors(AttentionShape(2, 4, 2, 1, 1), seed=9)
    layer.update(k, v)
    keys, values = (torch.cat([a.flip(0), b], 2) for a, b in ((ctx.k, k), (ctx.v, v)))
    mask = torch.zeros(2, 2, 81, dtype=torch.bool)
    for b in range(2):
        for head in range(2):
            mask[b, head, plan.index[1 - b, head, : plan.count[1 - b, head]].long()] = True
    mask[..., -1] = True
    want = scaled_dot_product_attention(
        q, keys, values, attn_mask=mask.repeat_interleave(2, 1)[:, :, None], enable_gqa=True
    )
    torch.testing.assert_close(layer.attend(q, k, v), want, rtol=1e-5, atol=1e-5)


def seeing():
    """A tiny vision-language model, a prompt with 16 places for its picture, and the picture."""
    import transformers

    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        image_size=28, patch_size=7, projection_dim=32,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=tiny("Llama").config, image_token_index=62,
        vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    ids = torch.randint(2, 60, (2, 24))
    ids[:, 2:18] = 62
    return model, {"input_ids": ids, "pixel_values": torch.randn(2, 3, 28, 28)}


def test_a_vision_language_model_reads_pictures_with_its_tower_untouched():
    model, inputs = seeing()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    want = model.generate(**inputs, **options)
    handle = apply_zipvl(model, 1.0, bits_important=16, bits_other=16, stream_gap=3)
    tower = model.config.vision_config._attn_implementation
    assert "aerogel" not in tower
    assert torch.equal(model.generate(**inputs, past_key_values=handle.cache(), **options), want)
    assert handle.ratios == [1.0, 1.0]
    handle.remove()
    assert torch.equal(model.generate(**inputs, **options), want)
    handle = apply_zipvl(model, 0.5, per_kv_head=True)
    cache = handle.cache()
    model.generate(**inputs, past_key_values=cache, **options)
    assert all(0 < ratio < 0.8 for ratio in handle.ratios)
    assert cache.get_seq_length() == 29


def test_a_dense_prompt_may_be_stored_by_importance():
    model = tiny("Llama")
    ids, mask = prompts()
    with torch.no_grad():
        want = model(ids, attention_mask=mask).logits
        handle = apply_zipvl(model, 0.5, sparse_prompt=False)
        cache = handle.cache()
        got = model(ids, attention_mask=mask, past_key_values=cache).logits
        alone = model(ids, attention_mask=mask).logits
    real = mask.bool()
    torch.testing.assert_close(got[real], want[real], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone[real], want[real], rtol=1e-4, atol=1e-5)
    assert {s.keys.bits for s in cache.layers[0].segments} == {2, 4}
    assert all(0 < ratio < 0.8 for ratio in handle.ratios)
    assert cache.nbytes() == sum(layer.nbytes() for layer in cache.layers) > 0


def test_costs_count_the_probing_rows():
    ctx = context(1, 100, sharp=3.0)
    selector = ZipVLSelector(0.6)
    count = int(selector.plan_prefill(ctx).count)
    rows = probe_rows(100)
    assert len(rows) == 10
    pairs = count * (count + 1) / 2 + float((rows + 1).sum())
    assert selector.costs[0] == pytest.approx(pairs / 5050)
    assert selector.ratios[0] == count / 100


def test_no_matrix_of_all_rows_and_keys_is_made():
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for each in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(each, torch.Tensor):
                    self.numbers = max(self.numbers, each.numel())
            return out

    ctx = context(1, 3000)
    with Largest() as seen:
        ZipVLSelector(0.9).plan_prefill(ctx)
    assert seen.numbers <= 256 * 3000


def test_a_stream_is_chosen_under_the_soft_cap():
    """By hand: capped logits are nearly alike, so 0.85 of the weight is that of nine in ten."""
    layer = MixedPrecisionCacheLayer(stream_gap=10, tau=0.85)
    k = torch.randn(1, 2, 10, 16) * 10
    q = torch.randn(1, 4, 1, 16) * 10
    layer.update(k[:, :, :1], k[:, :, :1])
    layer.attend(q, k[:, :, :1], k[:, :, :1], softcap=0.1)
    for i in range(10):
        new = k[:, :, i : i + 1]
        layer.update(new, new)
        layer.attend(q, new, new, softcap=0.1)
    counts = {s.keys.bits: int((s.positions >= 0).sum()) for s in layer.segments[1:]}
    assert counts == {4: 9, 2: 1}


def test_first_layers_and_later_chunks_are_dense():
    ctx = context()
    assert isinstance(ZipVLSelector(0.5, dense_layers=1).plan_prefill(ctx), DensePlan)
    chunk = AttentionShape(2, 4, 2, 50, 120, causal=True)
    ctx = AttentionContext(ctx.q[:, :, -50:], ctx.k, ctx.v, chunk, 0.25)
    assert isinstance(ZipVLSelector(0.5).plan_prefill(ctx), DensePlan)
    both = ZipVLSelector(0.5, causal=False).plan_prefill(context(causal=False, sharp=3.0))
    assert isinstance(both, TokenPlan)


def test_what_does_not_fit_is_refused():
    right = torch.arange(120) < torch.tensor([[120], [80]])
    windowed = context()
    windowed.window = 20
    ctx = context()
    empty = AttentionContext(
        ctx.q[:, :, :0], ctx.k[:, :, :0], ctx.v[:, :, :0],
        AttentionShape(2, 4, 2, 0, 0, causal=True), 0.25,
    )  # fmt: skip
    for call, words in (
        (lambda: ZipVLSelector(0), r"tau must be in \(0, 1\], got 0"),
        (lambda: ZipVLSelector(1.1), r"tau must be in \(0, 1\], got 1.1"),
        (lambda: ZipVLSelector(probe_recent=2), r"probe_recent must be in \[0, 1\], got 2"),
        (lambda: ZipVLSelector(probe_recent=0, probe_random=0), "one above 0"),
        (lambda: ZipVLSelector(probe_max=0), "probe_max must be at least 1, got 0"),
        (lambda: ZipVLSelector(bits_other=3), "bits_other=3"),
        (lambda: ZipVLSelector(stream_gap=0), "stream_gap must be at least 1, got 0"),
        (lambda: ZipVLSelector(kv="half"), "kv must be one of .*, got 'half'"),
        (lambda: ZipVLSelector(normalizer="rows"), "normalizer must be one of .*, got 'rows'"),
        (lambda: ZipVLSelector().plan_prefill(context(padding=right)), "left padding"),
        (lambda: ZipVLSelector().plan_prefill(windowed), "window=20"),
        (lambda: ZipVLSelector().plan_prefill(context(causal=False)), "causal=True"),
        (lambda: ZipVLSelector().plan_prefill(empty), "at least one token"),
        (lambda: pack_tokens(torch.zeros(1, 1, 1, 6, dtype=torch.uint8), 2), "head_dim=6"),
        (lambda: mass_budget(torch.ones(3), 0), r"tau must be in \(0, 1\], got 0"),
        (lambda: layer_after(0)[0].crop(-1), "crop"),
        (lambda: apply_zipvl(torch.nn.Linear(2, 2)), "Linear has no attention layer"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    model = tiny("Mistral")
    attach(model, ZipVLSelector())
    with pytest.raises(ValueError, match="sliding window"):
        model(prompts()[0])
