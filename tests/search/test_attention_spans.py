"""MoA's search: the influence is a derivative, the program is exact, budgets hold."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")
pytest.importorskip("transformers")

import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from aerogel.attention import (
    ElasticSpan,
    MoAPlan,
    attach,
    calibrate,
    detach,
    load_selector,
    save_selector,
)
from aerogel.attention.cache import AerogelCache
from aerogel.search import SpanSearch, pareto_front, profile_influence, validate
from aerogel.search.attention_spans import influence, removal_effect, rule_mask
from aerogel.search.span_program import SpanProgram


def test_the_effect_is_the_derivative_of_removing_a_value():
    draw = torch.Generator().manual_seed(0)
    q, k, v, target = (torch.randn(6, 4, generator=draw, dtype=torch.float64) for _ in range(4))
    logits = (q @ k.T * 0.5).masked_fill(~torch.ones(6, 6).tril().bool(), -torch.inf)
    weights = logits.softmax(-1)

    def loss(a):
        return ((a @ v - target) ** 3).sum()

    out = (weights @ v).requires_grad_()
    (grad,) = torch.autograd.grad(((out - target) ** 3).sum(), out)
    effect = removal_effect(q, k, v, grad, 0.5)
    for i in range(1, 6):
        for j in range(i + 1):
            without = weights[i].clone()
            without[j] = 0
            change = torch.zeros_like(weights)
            change[i] = without / without.sum() - weights[i]
            step = 1e-6
            slope = (loss(weights + step * change) - loss(weights - step * change)) / (2 * step)
            assert float(effect[i, j]) == pytest.approx(float(slope), rel=1e-4, abs=1e-7)
    assert float(effect[0, 0]) == pytest.approx(-float(grad[0] @ v[0]))


def test_blocks_sum_the_effects_whatever_the_rows_at_a_time(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    q, grad = (torch.randn(2, 4, 32, 8, generator=draw) for _ in range(2))
    k, v = (torch.randn(2, 2, 32, 8, generator=draw) for _ in range(2))
    whole = influence(q, k, v, grad, scale=0.3, block=8)
    monkeypatch.setattr("aerogel.search.attention_spans._ROWS", 8)
    torch.testing.assert_close(influence(q, k, v, grad, scale=0.3, block=8), whole)
    wide = [t.repeat_interleave(2, 1) for t in (k, v)]
    each = removal_effect(q, *wide, grad, 0.3).abs().mean(0)
    want = each.unflatten(2, (4, 8)).sum(-1).unflatten(1, (4, 8)).sum(2)
    torch.testing.assert_close(whole, want)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.floats(0.3, 0.9), st.integers(1, 3))
def test_the_program_is_brute_force(seed, density, limit):
    draw = np.random.default_rng(seed)
    costs = np.sort(draw.uniform(0.1, 1, (2, 4)), 1)
    program = SpanProgram(
        draw.uniform(0, 1, (1, 4, 4)), costs, np.array([0, 0, 1, 1]), density, 0.5, limit
    )
    best = np.inf
    for choice in itertools.product(range(4), repeat=4):
        few = all(len(set(choice[n : n + 2])) <= limit for n in (0, 2))
        mean = costs[:, choice].mean(1)
        if few and (mean <= density).all() and (mean >= 0.5 * density).all():
            best = min(best, program.value(0, np.array(choice)))
    found = program.solve(program.losses[0])
    if best == np.inf:
        assert found is None
    else:
        assert program.value(0, found) == pytest.approx(best)


def drawn(heads=3, layers=2):
    draw = torch.Generator().manual_seed(0)
    shape = (layers, heads)
    decay = torch.rand(*shape, 1, 1, generator=draw) * 2
    profile = {}
    for length in (64, 128):
        n = length // 16
        i, j = torch.arange(n)[:, None], torch.arange(n)
        profile[length] = (torch.exp(-decay * (i - j)) * (j <= i)).float()
    return profile


@pytest.mark.parametrize("density", [0.55, 0.7, 0.9])
def test_plans_keep_every_bound(density):
    search = SpanSearch(drawn(), (192,), density, alpha_step=16, block=16, sink=16)
    plans = search.run()
    assert plans
    for plan in plans:
        for length in (64, 128, 192):
            assert 0.9 * density - 1e-6 <= plan.density(length) <= density + 1e-6
        assert all(len(set(layer)) <= 2 for layer in plan.rules)
        assert {rule for layer in plan.rules for rule in layer} <= set(search.rules)


def test_a_larger_budget_never_costs_more():
    losses = []
    for density in (0.5, 0.6, 0.8, 1.0):
        search = SpanSearch(
            drawn(), density=density, lower=0.0, alpha_step=16, block=16, sink=16, intervals=1
        )
        program = SpanProgram(
            search.losses()[:1], search.costs(), np.repeat([0, 1], 3), density, 0.0, 2
        )
        losses.append(program.value(0, program.solve(program.losses[0])))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(0)


def test_a_rule_of_everything_loses_nothing_and_masks_are_the_cache():
    whole = rule_mask(ElasticSpan(0, 1), 128, 16, 16)
    assert whole[torch.ones(8, 8).tril().bool()].all()
    few = rule_mask(ElasticSpan(0, 0.5), 128, 16, 16)
    assert int((few & torch.ones(8, 8).tril().bool()).sum(1).max()) == 4
    assert few[:, 0].all()


def test_what_cannot_be_is_said():
    with pytest.raises(ValueError, match=r"smallest density is 0\.500"):
        SpanSearch(drawn(), density=0.1, alpha_step=16, block=16, sink=16).run()
    with pytest.raises(ValueError, match="expected them to be the length"):
        SpanSearch(drawn(), block=64)
    with pytest.raises(ValueError, match="multiple of block=16"):
        profile_influence(torch.nn.Linear(1, 1), {40: []}, 16)


def test_the_front_is_what_nothing_dominates():
    points = [(1, 5), (2, 2), (2, 2), (3, 3), (5, 1)]
    assert pareto_front(points) == [0, 1, 4]


def test_a_model_is_profiled_searched_and_left_as_it_was():
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    before = model.config._attn_implementation

    def batch(length):
        ids = torch.randint(0, 64, (2, length))
        weights = torch.zeros(2, length)
        weights[:, -20:-4] = 1
        return ids, weights

    profile = profile_influence(model, {n: [batch(n)] * 2 for n in (32, 64)}, 16)
    assert profile[64].shape == (2, 2, 4, 4)
    assert (profile[64].triu(1) == 0).all()
    assert (profile[64][:, :, 2:, 0] > 0).all()
    apart = profile_influence(model, {32: [batch(32)]}, 16, share_groups=False)
    assert apart[32].shape == (2, 4, 2, 2)
    assert model.config._attn_implementation == before
    assert all(p.grad is None for p in model.parameters())
    plans = SpanSearch(profile, (96,), 1.0, lower=0.5, alpha_step=16, block=16, sink=16).run()
    best, table = validate(model, plans, [batch(48)])
    assert best in plans
    assert len(table) == len(plans)
    dense = MoAPlan.uniform(ElasticSpan(0, 1), 2, 2, 16, 16)
    small = batch(48)
    with torch.no_grad():
        _, (loss,) = validate(model, [dense], [small])
        logits = model(input_ids=small[0]).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), small[0][:, 1:], reduction="none"
    )
    weights = small[1][:, 1:]
    assert loss == pytest.approx(float((losses * weights).sum() / weights.sum()), rel=1e-5)


def test_spans_are_calibrated_on_text_and_survive_their_file(tmp_path):
    draw = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    windows = torch.randint(2, 63, (4, 128), generator=draw)
    seen: list[tuple[int, int]] = []
    options = {"density": 0.4, "block": 8, "max_new": 16}
    found = calibrate(model, "moa", windows, on_progress=lambda *x: seen.append(x), **options)
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert all(p.grad is None for p in model.parameters())
    assert all(0.3 < found.plan.density(n) <= 0.4 for n in (64, 128, 256))
    save_selector(found, model, tmp_path / "spans.safetensors")
    loaded = load_selector(tmp_path / "spans.safetensors", model)
    assert loaded.options() == found.options()
    attach(model, loaded)
    cache = AerogelCache(model)
    model.generate(windows[:1, :64], past_key_values=cache, max_new_tokens=4, min_new_tokens=4)
    detach(model)
    sizes = found.plan.cache_sizes(64, 16).sum(1)
    assert [layer.keys.shape[1] for layer in cache.layers] == sizes.tolist()
    for count, length in ((1, 128), (4, 120)):
        with pytest.raises(ValueError, match="expected two or more, of a multiple"):
            calibrate(model, "moa", windows[:count, :length], block=8)
