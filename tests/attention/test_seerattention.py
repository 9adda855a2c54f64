"""What SeerAttention promises: pooled targets, gates that choose blocks, keys compressed once."""

from __future__ import annotations

import plans as make
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import prompts, tiny
from torch.nn.functional import max_pool2d

from aerogel.attention import (
    AttentionContext,
    AttentionShape,
    DensePlan,
    SeerAttentionSelector,
    attach,
    detach,
    select,
)
from aerogel.attention.block_plan import BlockPlan
from aerogel.attention.block_target import (
    BlockRule,
    OracleSelector,
    block_target,
    divergence,
    row_target,
)
from aerogel.attention.seer_gate import SeerDecodeGate, SeerGate, pool_blocks

pytest.importorskip("transformers")

from aerogel.attention.block_cache import BlockCacheLayer
from aerogel.attention.cache import AerogelCache
from aerogel.finetune import distill_gates, gate_loss, load_gates, make_gates, save_gates

WINDOWS = torch.randint(2, 63, (3, 70), generator=torch.Generator().manual_seed(0))


def context(shape, padding=None, dim=16, seed=0):
    q, k, v = make.tensors(shape, dim, seed=seed)
    return AttentionContext(
        q, k, v, shape, dim**-0.5, key_padding=padding, q_pre=q * 2, k_pre=k[:, :, -shape.q_len :]
    )


def gate(heads=(4, 2), dim=16, **options):
    torch.manual_seed(0)
    return SeerGate(*heads, dim, **{"gate_dim": 8, "block_size": 16, **options})


def selector(gates=None, **options):
    return SeerAttentionSelector({0: gates or gate()}, **options)


def weights(ctx):
    k = ctx.k.repeat_interleave(ctx.shape.q_heads // ctx.shape.kv_heads, 1)
    mask = ctx.shape.causal_mask()
    if ctx.key_padding is not None:
        mask = mask & ctx.key_padding[:, None, None]
    logits = (ctx.q @ k.transpose(-1, -2) * ctx.scale).masked_fill(~mask, -torch.inf)
    return torch.softmax(logits, -1).nan_to_num()


@settings(max_examples=20, deadline=None)
@given(st.integers(17, 90), st.sampled_from([(4, 4), (8, 2)]), st.sampled_from([None, 16, 32]))
def test_the_target_is_the_pooled_map_with_rows_normalised(length, heads, pad):
    shape = AttentionShape(2, *heads, length, length, causal=True)
    padding = None
    if pad is not None:
        padding = torch.arange(length) >= torch.tensor([[0], [min(pad, length - 1)]])
    ctx = context(shape, padding)
    n = -(-length // 16)
    p = torch.nn.functional.pad(weights(ctx), (0, n * 16 - length, 0, n * 16 - length))
    want = max_pool2d(p, 16)
    want = want / want.sum(-1, keepdim=True).clamp(min=1e-9)
    got = block_target(ctx, 16)
    real = want.sum(-1) > 0.5
    torch.testing.assert_close(got[real], want[real], rtol=1e-4, atol=1e-5)


def test_the_row_target_is_the_groups_largest_weight():
    shape = AttentionShape(2, 4, 2, 150, 150, causal=True)
    ctx = context(shape)
    p = torch.nn.functional.pad(weights(ctx), (0, 10)).unflatten(-1, (-1, 16)).amax(-1)
    want = p.unflatten(1, (2, 2)).amax(2)[:, :, 75:]
    want = want / want.sum(-1, keepdim=True)
    torch.testing.assert_close(row_target(ctx, 16, 75), want, rtol=1e-4, atol=1e-5)


def test_pooling_is_over_real_tokens_in_the_order_max_min_avg():
    x = torch.randn(2, 3, 40, 5)
    real = torch.arange(40) >= torch.tensor([[0], [20]])
    got = pool_blocks(x, 16, ("avg", "max", "min"), real)
    assert got.shape == (2, 3, 3, 15)
    part = x[1, :, 20:32]
    want = torch.cat([part.amax(1), part.amin(1), part.mean(1)], -1)
    torch.testing.assert_close(got[1, :, 1], want)
    assert (got[1, :, 0] == 0).all()
    torch.testing.assert_close(got[0, :, 2, 10:], x[0, :, 32:].mean(1))


@pytest.mark.parametrize("options", [{}, {"gate_dim": 16}, {"q_pool": ("max", "avg")}])
def test_scores_of_a_block_do_not_depend_on_later_blocks(options):
    one = gate(**options)
    assert (one.q_weight is None) == (options == {"gate_dim": 16})
    q, k, _ = make.tensors(AttentionShape(2, 4, 2, 80, 80))
    whole = one(q, k)
    torch.testing.assert_close(one(q[:, :, :48], k[:, :, :48]), whole[:, :, :3, :3])
    assert (whole.triu(1)[whole.triu(1) != 0] == -torch.inf).all()


def test_heads_of_a_group_share_keys_but_not_scores():
    one = gate((4, 2))
    q, k, _ = make.tensors(AttentionShape(1, 4, 2, 48, 48))
    pooled = pool_blocks(k, 16, ("max", "min", "avg")) @ one.k_weight
    assert pooled.shape[1] == 2
    scores = one(q, k)
    assert not torch.allclose(scores[:, 0, -1], scores[:, 1, -1])


@settings(max_examples=30, deadline=None)
@given(st.integers(8, 60), st.floats(0.05, 1.0))
def test_the_kept_area_is_the_ratio(n, ratio):
    scores = torch.rand(1, 1, n, n).masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
    rule = BlockRule("ratio", ratio=ratio, last_block_dense=False, force_diagonal=False)
    kept = rule.choose(scores)
    area = float(kept.sum()) / (n * (n + 1) / 2)
    assert abs(area - ratio) <= 3 / n
    assert not (kept & (scores == -torch.inf)).any()


def test_thresholds_last_rows_and_diagonals():
    scores = torch.full((1, 1, 6, 6), 0.0)
    scores[..., 0] = 20.0
    scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    kept = BlockRule(threshold=0.01).choose(scores)[0, 0]
    assert kept[-2:].sum() == 11
    assert kept.diagonal().all()
    assert kept[:4].sum() == 7
    bare = BlockRule(threshold=0.01, last_block_dense=False, force_diagonal=False)
    assert torch.equal(bare.choose(scores)[0, 0].sum(-1), torch.ones(6, dtype=torch.int64))


@pytest.mark.parametrize("options", [{"threshold": 0.0}, {"method": "ratio", "ratio": 1.0}])
def test_everything_kept_is_dense(options):
    shape = AttentionShape(2, 4, 2, 70, 70, causal=True)
    plan = select(selector(**options), context(shape))
    assert plan.density(shape) == 1


def test_short_prompts_and_steps_are_dense_with_a_note():
    short = AttentionShape(1, 4, 2, 9, 9, causal=True)
    with pytest.warns(UserWarning, match="9 tokens"):
        assert isinstance(select(selector(), context(short)), DensePlan)
    step = AttentionShape(1, 4, 2, 1, 90, causal=True)
    assert isinstance(select(selector(), context(step)), DensePlan)


def test_a_left_padded_batch_chooses_as_each_sequence_alone():
    shape = AttentionShape(2, 4, 2, 80, 80, causal=True)
    padding = torch.arange(80) >= torch.tensor([[0], [32]])
    ctx = context(shape, padding)
    rule = {"method": "threshold", "threshold": 0.21, "last_block_dense": False}
    together = select(selector(**rule), ctx).to_dense_mask(shape)[1, :, 32:, 32:]
    alone = AttentionShape(1, 4, 2, 48, 48, causal=True)
    q, k, v = (t[1:, :, 32:] for t in (ctx.q, ctx.k, ctx.v))
    single = AttentionContext(q, k, v, alone, 0.25, q_pre=q * 2, k_pre=k)
    assert torch.equal(together, select(selector(**rule), single).to_dense_mask(alone)[0])


def test_the_loss_is_zero_only_at_the_target():
    scores = torch.randn(2, 3, 4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), -torch.inf)
    target = torch.softmax(scores, -1)
    assert abs(float(divergence(scores, target))) < 1e-7
    assert float(divergence(scores * 2, target)) > 1e-3
    assert float(divergence(torch.full_like(scores, -torch.inf), torch.zeros_like(target))) == 0


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_distilling_changes_gates_alone_and_lowers_the_loss(mode):
    model = tiny("Llama")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    gates = make_gates(model, mode=mode, block_size=16, gate_dim=8)
    losses = distill_gates(model, gates, WINDOWS, steps=60, batch_size=2, lr=1e-2)
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in gates.parameters())


@pytest.mark.parametrize("detached", [True, False])
def test_joint_loss_reaches_the_model_only_if_asked(detached):
    model = tiny("Llama")
    gates = make_gates(model, block_size=16, gate_dim=8)
    with gate_loss(model, gates, detach_inputs=detached) as total:
        model(WINDOWS[:1], use_cache=False)
        total().backward()
    assert all(p.grad is not None for p in gates.parameters())
    touched = model.model.layers[1].self_attn.q_proj.weight.grad
    assert (touched is None) == detached


def test_gates_survive_their_file_and_refuse_other_models(tmp_path):
    model = tiny("Llama")
    gates = make_gates(model, block_size=16, gate_dim=8, method="ratio", ratio=0.5)
    save_gates(gates, model, tmp_path / "g.safetensors")
    loaded = load_gates(tmp_path / "g.safetensors", model)
    assert loaded.options() == gates.options()
    for name, value in gates.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    with pytest.raises(ValueError, match="another model"):
        load_gates(tmp_path / "g.safetensors", tiny("Llama", num_hidden_layers=3))


@pytest.mark.parametrize("mode", ["prefill", "decode"])
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_generation_with_everything_kept_gives_the_models_own_tokens(family, mode):
    model = tiny(family)
    ids, mask = prompts()
    options = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    want = model.generate(ids, attention_mask=mask, **options)
    beams = model.generate(ids, attention_mask=mask, num_beams=2, **options)
    attach(model, make_gates(model, mode=mode, block_size=16, gate_dim=8, threshold=0.0))
    cache = AerogelCache(model)
    got = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    again = model.generate(
        ids, attention_mask=mask, num_beams=2, past_key_values=AerogelCache(model), **options
    )
    detach(model)
    assert torch.equal(got, want)
    assert torch.equal(again, beams)


def test_keys_compressed_token_by_token_are_those_of_a_prompt():
    torch.manual_seed(0)
    one = SeerDecodeGate(4, 2, 16, gate_dim=8, block_size=16)
    _, k, v = make.tensors(AttentionShape(2, 4, 2, 70, 70))
    layer = BlockCacheLayer(16)
    real = torch.arange(70) >= torch.tensor([[0], [20]])
    for cut in [slice(0, 21), *(slice(i, i + 1) for i in range(21, 70))]:
        layer.update(k[:, :, cut], v[:, :, cut])
        layer.append_keys(one, k[:, :, cut], real[:, : cut.stop])
    torch.testing.assert_close(layer.compressed, one.compress(k[:, :, :64], real=real[:, :64]))
    layer.crop(-10)
    assert layer.compressed.shape[2] == 3
    layer.update(k[:, :, 60:], v[:, :, 60:])
    layer.append_keys(one, k[:, :, 60:], real)
    torch.testing.assert_close(layer.compressed, one.compress(k[:, :, :64], real=real[:, :64]))
    layer.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(layer.compressed[0], layer.compressed[1])
    with pytest.raises(ValueError, match="compressed"):
        layer.crop(-51)


def test_a_budget_keeps_the_best_blocks_and_the_current_one():
    torch.manual_seed(0)
    one = SeerDecodeGate(8, 2, 16, gate_dim=8, block_size=16)
    budget = SeerAttentionSelector({0: one}, method="token_budget", budget=48, mode="decode")
    shape = AttentionShape(2, 8, 2, 1, 100, causal=True)
    ctx = context(shape)
    ctx.k_pre = ctx.k
    plan = select(budget, ctx)
    assert plan.dims == (2, 2)
    kept = plan.to_dense_mask(shape)[:, :, 0]
    assert kept[..., 96:].all()
    assert (kept.sum(-1) == 36).all()
    ctx.k_pre = ctx.k[:, :, -1:]
    with pytest.raises(ValueError, match="AerogelCache"):
        select(budget, ctx)


def test_the_oracle_keeps_more_than_a_gate():
    shape = AttentionShape(1, 4, 2, 160, 160, causal=True)
    ctx = context(shape)
    rule = BlockRule("ratio", ratio=0.4, last_block_dense=False)
    masks = [
        select(s, ctx).to_dense_mask(shape)
        for s in (
            OracleSelector(16, rule),
            selector(method="ratio", ratio=0.4, last_block_dense=False),
        )
    ]
    map_ = weights(ctx)
    assert float((map_ * masks[0]).sum()) > float((map_ * masks[1]).sum())


@pytest.mark.parametrize(
    ("make_bad", "message"),
    [
        (lambda: gate(block_size=48), "block_size=48"),
        (lambda: gate(k_pool=()), "k_pool"),
        (lambda: gate(q_pool=("mean",)), "q_pool"),
        (lambda: gate((4, 3)), "num_kv_heads=3"),
        (lambda: selector(method="ratio", ratio=1.5), "ratio=1.5"),
        (lambda: selector(method="ratio"), "ratio=None"),
        (lambda: selector(threshold=1.0), "threshold=1.0"),
        (lambda: selector(threshold=-0.1), "threshold=-0.1"),
        (lambda: selector(mode="decode"), "SeerDecodeGate"),
        (
            lambda: SeerAttentionSelector(
                {0: SeerDecodeGate(4, 2, 16, block_size=16)},
                method="token_budget",
                budget=40,
                mode="decode",
            ),
            "budget=40",
        ),
    ],
)
def test_bad_options_are_named(make_bad, message):
    with pytest.raises(ValueError, match=message):
        make_bad()


def test_bad_calls_are_named():
    shape = AttentionShape(1, 8, 2, 70, 70, causal=True)
    with pytest.raises(ValueError, match="gate: for"):
        select(selector(), context(shape))
    ctx = context(AttentionShape(1, 4, 2, 70, 70, causal=True))
    ctx.q_pre = None
    with pytest.raises(ValueError, match="q_pre"):
        select(selector(), ctx)
    with pytest.raises(ValueError, match="windows"):
        distill_gates(tiny("Llama"), selector(), WINDOWS[:, :10])
    with pytest.raises(ValueError, match="layers="):
        make_gates(tiny("Llama"), layers=[7])


@pytest.mark.parametrize("method", ["ratio", "threshold"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_a_rule_lists_the_blocks_that_it_chooses(method, last, diagonal, padded):
    scores = torch.randn(2, 3, 9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    rows = None
    if padded:
        rows = torch.arange(9) < torch.tensor([[9], [6]])
        scores = scores.masked_fill(~rows[:, None, None], -torch.inf)
    rule = BlockRule(method, 0.1, 0.4, last, diagonal)
    want = BlockPlan.from_mask(rule.choose(scores, rows), 16, 16)
    for kind in (torch.float32, torch.float64):
        plan = rule.plan(scores.to(kind), rows, 16)
        assert torch.equal(plan.row_ptr, want.row_ptr)
        assert torch.equal(plan.col, want.col)
        plan.validate(AttentionShape(2, 3, 3, 144, 144, causal=True))


def test_scores_follow_rotary_frequencies_that_change_in_place():
    gate = SeerGate(2, 2, 16, gate_dim=8, block_size=16)
    q, k = torch.randn(2, 1, 2, 64, 16)
    with torch.inference_mode():
        before = gate(q, k)
    gate(q, k).masked_fill(before.isinf(), 0).sum().backward()
    other = SeerGate(2, 2, 16, gate_dim=8, block_size=16, rope_theta=100.0)
    gate.inv_freq.copy_(other.inv_freq)
    other.load_state_dict(gate.state_dict())
    assert torch.equal(gate(q, k), other(q, k))
    assert not torch.equal(gate(q, k), before)
    torch.testing.assert_close(gate(q[:, :, :32], k[:, :, :32]), gate(q, k)[:, :, :2, :2])
