"""Combiner: every position keeps a weight, nothing later has one, its cache forgets tokens."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tiny_models import prompts, tiny
from torch.nn.functional import scaled_dot_product_attention

from aerogel.attention import (
    AttentionContext,
    AttentionShape,
    Bank,
    BankPlan,
    DensePlan,
    attach,
    attend,
    detach,
)
from aerogel.attention.cache import AerogelCache
from aerogel.attention.combiner import CombinerSelector, span_numbers
from aerogel.attention.combiner_cache import CombinerCache
from aerogel.attention.combiner_layer import CombinerAttention
from aerogel.attention.selector import select
from aerogel.attention.summaries import combiner_summary, pool
from aerogel.models.combiner import CombinerLM

transformers = pytest.importorskip("transformers")

VARIANTS = ["fixed", "logsparse", "axial", "mixture"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def selector(variant: str, size: int = 4, **options) -> CombinerSelector:
    options.setdefault("row_summary", "wsum")
    return CombinerSelector(variant, size, **options)


def output(chosen, q, k, v, *, causal=True, padding=None, **options):
    shape = AttentionShape.of(q, k, causal=causal)
    ctx = AttentionContext(q, k, v, shape, q.shape[-1] ** -0.5, key_padding=padding)
    plan = select(chosen, ctx)
    plan.validate(shape)
    return attend(q, k, v, plan=plan, causal=causal, key_padding=padding, **options)


def tensors(length: int, heads: int = 4, key_heads: int = 2, dim: int = 8):
    q = torch.randn(2, heads, length, dim)
    return q, torch.randn(2, key_heads, length, dim), torch.randn(2, key_heads, length, dim)


@pytest.mark.parametrize("length", [16, 23])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_earlier_position_has_a_weight_and_no_later_one(variant, length):
    q, k, _ = tensors(length)
    one_hot = torch.eye(length).expand(2, 2, -1, -1)
    weights = output(selector(variant), q, k, one_hot)  # [B, H, L, L]
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, length))
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    assert (weights[..., visible] > 0).all()
    assert (weights[..., ~visible] == 0).all()


@pytest.mark.parametrize("variant", ["fixed", "mixture"])
def test_without_the_causal_rule_every_position_has_a_weight(variant):
    q, k, _ = tensors(16)
    weights = output(selector(variant), q, k, torch.eye(16).expand(2, 2, -1, -1), causal=False)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 16))
    assert (weights > 0).all()


def test_the_own_block_may_be_covered_twice():
    q, k, v = tensors(16)
    once, twice = (
        output(selector("fixed", exclude_own=own), q, k, v, causal=False) for own in (True, False)
    )
    assert not torch.allclose(once, twice)


def test_the_weights_are_the_factorised_expectation():
    q, k, v = tensors(12, 1, 1)
    got = output(selector("fixed"), q, k, v)
    scale = 8**-0.5
    for row in range(12):
        block = row // 4
        logits = [q[0, 0, row] @ k[0, 0, j] * scale for j in range(block * 4, row + 1)]
        values = [v[0, 0, j] for j in range(block * 4, row + 1)]
        for region in range(block):
            span = slice(region * 4, region * 4 + 4)
            inner = (k[0, 0, span] @ q[0, 0, span].amax(0) * scale).softmax(0)
            logits.append(q[0, 0, row] @ k[0, 0, span].amax(0) * scale)
            values.append(inner @ v[0, 0, span])
        want = torch.stack(logits).softmax(0) @ torch.stack(values)
        torch.testing.assert_close(got[0, 0, row], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["fixed", "axial"])
def test_one_segment_is_dense_attention(variant):
    q, k, v = tensors(16)
    want = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(output(selector(variant, 16), q, k, v), want, rtol=2e-5, atol=2e-5)


def test_regions_of_one_token_are_dense_attention():
    q, k, v = tensors(16)
    want = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(output(selector("fixed", 1), q, k, v), want, rtol=2e-5, atol=2e-5)


def test_log_sparse_spans_partition_all_earlier_positions():
    length = 4096
    firsts = list(itertools.accumulate((length >> level for level in range(1, 12)), initial=0))[:-1]
    numbers = span_numbers(length, torch.tensor(firsts))
    covered = torch.zeros(length, dtype=torch.int64)
    end = torch.arange(length)  # [0, i) is the spans in descending order of length, laid end to end
    start = torch.zeros(length, dtype=torch.int64)
    for level in range(11, 0, -1):
        number = numbers[:, level - 1]
        used = number >= 0
        span = number - firsts[level - 1]
        assert torch.equal((span << level)[used], start[used])
        start = torch.where(used, start + (1 << level), start)
        covered += used
    assert torch.equal(start + (end & 1), end)
    assert int((covered + 1 + (end & 1)).max()) <= 1 + 12


@pytest.mark.parametrize("variant", VARIANTS)
def test_later_tokens_change_nothing_before_them(variant):
    layer = CombinerAttention(32, 4, 2, variant=variant, seg_len=4).eval()
    x = torch.randn(2, 24, 32)
    other = x.clone()
    other[:, 13:] = torch.randn(2, 11, 32)
    torch.testing.assert_close(layer(x)[:, :13], layer(other)[:, :13])


@pytest.mark.parametrize("variant", VARIANTS)
def test_native_is_the_reference_with_gradients(variant):
    results = []
    inputs = tensors(40, dim=16)
    for backend in ("auto", "reference"):
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = output(selector(variant, 8), *leaves, backend=backend)
        draw = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        results.append((out, *torch.autograd.grad(out, leaves, draw)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_right_padding_changes_nothing(variant):
    q, k, v = tensors(22)
    padding = (torch.arange(22) < 14).expand(2, -1)
    got = output(selector(variant), q, k, v, padding=padding)[:, :, :14]
    want = output(selector(variant), q[:, :, :14], k[:, :, :14], v[:, :, :14])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_summary_of_padding_alone_is_never_read():
    q, k, v = tensors(16)
    padding = (torch.arange(16) >= 8).expand(2, -1)
    got = output(selector("fixed"), q, k, v, padding=padding)[:, :, 8:]
    want = output(selector("fixed"), q[:, :, 8:], k[:, :, 8:], v[:, :, 8:])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_is_prefill(variant):
    model = CombinerLM(40, 32, 2, 24, 4, variant=variant, seg_len=4, num_kv_heads=2).eval()
    ids = torch.randint(40, (2, 22))
    with torch.no_grad():
        want = model(ids)
        cache = model.make_cache()
        steps = [model(ids[:, :6], cache=cache)]
        steps += [model(ids[:, i : i + 1], cache=cache) for i in range(6, 22)]
    torch.testing.assert_close(torch.cat(steps, 1), want, rtol=1e-4, atol=1e-4)
    if variant == "fixed":
        assert cache[0].raw[1].shape[2] == 22 % 4
        assert cache[0].finished.k.shape[2] == 22 // 4


def test_log_sparse_decoding_makes_each_summary_once(monkeypatch):
    layer = CombinerAttention(32, 4, 2, variant="logsparse").eval()
    made = []
    once = layer.selector.summarise
    monkeypatch.setattr(
        layer.selector, "summarise", lambda q, *rest: made.append(q.shape[2]) or once(q, *rest)
    )
    x, cache = torch.randn(2, 33, 32), CombinerCache()
    with torch.no_grad():
        parts = [layer(x[:, i : i + 1], cache=cache) for i in range(20)]
        parts.append(layer(x[:, 20:], cache=cache))
        assert sorted(made) == [2] * 8 + [4] * 4 + [8] * 2 + [16] + [32]
        torch.testing.assert_close(torch.cat(parts, 1), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["max", "mean", "sum"])
def test_pooling_leaves_padding_out(how):
    x = torch.arange(1.0, 6).view(1, 1, 5, 1)
    real = torch.tensor([[True, False, True, True, False]])
    want = {"max": [1, 4, 0], "mean": [1, 3.5, 0], "sum": [1, 7, 0]}[how]
    assert pool(x, 2, how, real).flatten().tolist() == want


def test_positive_parts_may_be_pooled():
    q, k, v = tensors(8, 1, 1)
    found = selector("fixed", relu=True).summarise(q, k, v, 4, 0.5)
    torch.testing.assert_close(found.k, k.relu().unflatten(2, (2, 4)).amax(3))
    top = q.relu().unflatten(2, (2, 4)).amax(3)
    for run in range(2):
        span = slice(4 * run, 4 * run + 4)
        weights = (top[:, 0, run, None] @ k[:, 0, span].transpose(1, 2) * 0.5).softmax(-1)
        torch.testing.assert_close(found.v[:, 0, run, None], weights @ v[:, 0, span])


@pytest.mark.parametrize("variant", VARIANTS)
def test_dropout_acts_inside_summaries_too(variant):
    q, k, v = tensors(24)
    chosen = selector(variant, dropout=0.5)
    torch.manual_seed(1)
    first = output(chosen, q, k, v)
    assert not torch.equal(output(chosen, q, k, v), first)
    assert torch.equal(output(chosen.eval(), q, k, v), output(selector(variant), q, k, v))


@pytest.mark.parametrize(
    "options",
    [
        {"summary": "mean"},
        {"share_summary_over_group": True},
        {"deepset": True},
        {"variant": "axial", "row_summary": "proj"},
        {"variant": "axial", "row_summary": "none"},
        {"dropout": 0.2},
    ],
)
def test_every_parameter_learns(options):
    layer = CombinerAttention(32, 4, 2, seg_len=4, **options)
    layer(torch.randn(2, 16, 32)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_regions_of_equal_keys_and_values_are_read_as_their_token():
    q, k, v = tensors(8, 1, 1)
    k, v = (x[:, :, ::4].repeat_interleave(4, 2) for x in (k, v))
    found = combiner_summary(q, k, v, 4)
    torch.testing.assert_close(found.k, k[:, :, ::4])
    torch.testing.assert_close(found.v, v[:, :, ::4])


def test_a_bank_hides_the_keys_that_do_not_exist():
    q, k, v = tensors(6, 2, 2)
    bank = Bank(DensePlan(), k, v, "none", torch.arange(6).expand(2, -1) < 4)
    got = attend(q, k, v, plan=BankPlan((bank,)))
    want = scaled_dot_product_attention(q, k[:, :, :4], v[:, :, :4])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CombinerSelector("strided"), "variant must be one of .*, got 'strided'"),
        (lambda: CombinerSelector("fixed", 0), "seg_len must be at least 1, got 0"),
        (lambda: CombinerSelector("mixture", 1), "seg_len must be at least 2, got 1"),
        (lambda: CombinerSelector("fixed", 4, "median"), "summary must be one of .*, got 'median'"),
        (lambda: CombinerSelector("axial", 4), "d_model=None"),
        (lambda: CombinerAttention(32, 4, variant="axial", causal=False), "causal=False"),
        (lambda: CombinerAttention(32, 4, variant="logsparse", causal=False), "causal=False"),
        (lambda: CombinerAttention(30, 4), "d_model=30"),
        (lambda: CombinerAttention(32, 4, seg_len=9)(torch.ones(1, 8, 32)), "seg_len=9"),
        (
            lambda: CombinerAttention(32, 4, variant="mixture", seg_len=4, causal=False)(
                torch.ones(1, 9, 32)
            ),
            "multiple of seg_len=4",
        ),
        (lambda: CombinerLM(9, 32, 1, 8)(torch.zeros(1, 9, dtype=torch.long)), "9 tokens"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_cache_of_another_variant_is_an_error():
    cache = CombinerCache()
    x = torch.randn(1, 4, 32)
    CombinerAttention(32, 4, variant="fixed", seg_len=4)(x, cache=cache)
    with pytest.raises(ValueError, match="filled by"):
        CombinerAttention(32, 4, variant="mixture", seg_len=4)(x, cache=cache)


OPTIONS = {"variant": "fixed", "seg_len": 4}


def built(**changes):
    """A tiny Llama that was made with Combiner in its configuration."""
    model = tiny("Llama")
    model.config.aerogel_combiner = {**OPTIONS, **changes}
    model.set_attn_implementation("aerogel:combiner")
    return model


def test_a_transformers_model_built_with_it_trains_and_loads_by_name(tmp_path):
    model = built()
    ids = prompts(length=22)[0]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    want = model(input_ids=ids, use_cache=False).logits
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="aerogel:combiner"
    )
    torch.testing.assert_close(again(input_ids=ids, use_cache=False).logits, want)
    later = ids.clone()
    later[:, 15:] = 5
    got = model(input_ids=later, use_cache=False).logits
    torch.testing.assert_close(got[:, :15], want[:, :15], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_generates_from_a_cache_what_it_generates_without(variant):
    model = built(variant=variant, row_summary="wsum")
    ids = torch.randint(2, 63, (2, 14))
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    want = model.generate(ids, use_cache=False, **options)
    attach(model, "combiner")
    cache = AerogelCache(model)
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), want)
    assert cache.get_seq_length() == 22
    if variant == "fixed":  # 22 tokens: five summaries, and two raw tokens
        state = cache.layers[0].state
        assert (state.finished.k.shape[2], state.raw[0].shape[2]) == (5, 2)
    beams = {**options, "num_beams": 3}
    with_cache = model.generate(ids, past_key_values=AerogelCache(model), **beams)
    assert torch.equal(with_cache, model.generate(ids, use_cache=False, **beams))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cache_knows_sinks_and_names_what_it_does_not_know(variant):
    chosen, sink = selector(variant), torch.randn(4)
    layer = chosen.cache_layer(0, 2)
    q, k, v = tensors(14)
    layer.update(k, v)
    want = output(chosen, q, k, v, sink_logit=sink)
    torch.testing.assert_close(layer.attend(q, k, v, sink_logit=sink), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"window, softcap, dropout_p: .* CombinerCacheLayer"):
        layer.attend(q, k, v, window=3, softcap=1.0, dropout_p=0.1)


def test_a_model_trained_densely_is_refused():
    model = tiny("Llama")
    ids, mask = prompts(length=12)
    with pytest.raises(ValueError, match="aerogel_combiner"):
        attach(model, "combiner")
    model.set_attn_implementation("aerogel:combiner")
    with pytest.raises(ValueError, match="aerogel_combiner"):
        model(input_ids=ids)
    model = built()
    with pytest.raises(ValueError, match="built with"):
        attach(model, CombinerSelector(seg_len=8))
    with pytest.raises(ValueError, match="AerogelCache"):
        model.generate(ids, max_new_tokens=2)
    attach(model, "combiner")
    with pytest.raises(ValueError, match="left padding"):
        model.generate(
            ids, attention_mask=mask, max_new_tokens=2, past_key_values=AerogelCache(model)
        )
    detach(model)
    with pytest.raises(ValueError, match="crop"):
        CombinerSelector().cache_layer(0, 2).crop(-1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_authors_parameters_load(variant):
    """Parameters as flax lays them out: (in, heads, width) and (heads, width, out)."""
    model = CombinerLM(
        9, 16, 2, 24, 4, variant=variant, seg_len=4, activation="relu", norm_eps=1e-6, hidden=20,
        head_bias=True,
    ).eval()  # fmt: skip
    nn = {name: p.detach() for name, p in model.named_parameters()}

    def norm(name):
        return {"scale": nn[f"{name}.weight"], "bias": nn[f"{name}.bias"]}

    def dense(name):
        return {"kernel": nn[f"{name}.weight"].T, "bias": nn[f"{name}.bias"]}

    def into(name):
        return {"kernel": nn[f"{name}.weight"].T.reshape(16, 4, 4)}

    def out(name):
        return {"kernel": nn[f"{name}.weight"].T.reshape(4, 4, 16)}

    layers = {}
    for i in range(2):
        at = f"blocks.{i}.attention"
        attention = {name: into(f"{at}.{name}") for name in ("query", "key", "value")}
        if variant == "axial":
            attention["DenseGeneral_0"] = out(f"{at}.selector.row_out")
            attention["LayerNorm_0"] = norm(f"{at}.selector.row_norm")
            attention["DenseGeneral_1"] = into(f"{at}.selector.row_key")
            attention["DenseGeneral_2"] = out(f"{at}.out")
        else:
            attention["DenseGeneral_0"] = out(f"{at}.out")
        kind = "_SelfAttAxialRowmajor_0" if variant == "axial" else "_SelfAttSqrtn_0"
        layers[f"transformer_layer_{i}"] = {
            "LayerNorm_0": norm(f"blocks.{i}.before"),
            "LayerNorm_1": norm(f"blocks.{i}.between"),
            kind: attention,
            "MlpBlock_0": {
                "Dense_0": dense(f"blocks.{i}.mlp.0"),
                "Dense_1": dense(f"blocks.{i}.mlp.2"),
            },
        }
    places = {"AddPositionEmbs_0": {"pos_embedding": nn["place.weight"][None]}}
    outer = {"LayerNorm_0": norm("norm"), "Dense_0": dense("head")}
    params = {"Embed_0": {"embedding": nn["embed.weight"]}}
    params["autoreg_model"] = {**layers, **places, **outer}
    ids = torch.randint(9, (2, 24))
    again = CombinerLM.from_published({"params": params}, 24, variant=variant, seg_len=4).eval()
    torch.testing.assert_close(again(ids), model(ids))
    del params["autoreg_model"]["AddPositionEmbs_0"]
    fixed = CombinerLM.from_published(params, 24, variant=variant, seg_len=4).place.weight.detach()
    assert float(fixed[3, 0]) == pytest.approx(math.sin(3))
    assert float(fixed[3, 8]) == pytest.approx(math.cos(3))
    with pytest.raises(ValueError, match="authors' model"):
        CombinerLM.from_published({"lm": {}}, 24, variant=variant)
