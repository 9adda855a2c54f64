"""What `attend` promises, whichever backend runs it."""

from __future__ import annotations

from dataclasses import replace

import plans as make
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from aerogel.attention import (
    AttentionShape,
    Bank,
    BankPlan,
    BlockPlan,
    DensePlan,
    GroupPlan,
    HeadMixPlan,
    KeyListPlan,
    SpanPlan,
    attend,
    merge,
    past_summaries,
    plan_logsumexp,
    plan_pairs,
    plan_softmax,
    sddmm,
    spmm,
)
from aerogel.attention.lowering import lower_pass
from aerogel.attention.ops import attention_op
from aerogel.kernels import native_available
from aerogel.kernels.attention_reference import dropout_factors

SHAPES = [
    AttentionShape(1, 4, 4, 64, 64, causal=True),
    AttentionShape(3, 8, 2, 70, 130, causal=True),
    AttentionShape(2, 8, 2, 1, 90, causal=True),
    AttentionShape(2, 4, 2, 100, 75),
]


def oracle(q, k, v, mask, bias=None, softcap=None, sink=None):
    """float64, heads expanded, straight from the formula."""
    q, k, v = (t.double() for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if bias is not None:
        s = s + bias.repeat_interleave(q.shape[1] // bias.shape[1], 1)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    mask = mask.repeat_interleave(q.shape[1] // mask.shape[1], 1)
    s = s.masked_fill(~mask, -torch.inf)
    if sink is not None:
        s = torch.cat([s, sink.double().view(1, -1, 1, 1).expand(*s.shape[:3], 1)], -1)
    lse = s.logsumexp(-1)
    p = torch.exp(s - lse[..., None]).nan_to_num()
    return p[..., : k.shape[2]] @ v, lse


def close(a, b, tolerance=2e-5):
    finite = torch.isfinite(b)
    assert torch.equal(torch.isfinite(a), finite)
    torch.testing.assert_close(
        a.double()[finite], b.double()[finite], rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("backend", ["auto", "reference", "native"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_plan_gives_the_softmax_over_its_pairs(shape, backend):
    q, k, v = make.tensors(shape, 16, 24)
    for name, plan in make.masked_plans(shape, 5).items():
        out = attend(q, k, v, plan=plan, causal=shape.causal, return_lse=True, backend=backend)
        o, lse = oracle(q, k, v, plan.to_dense_mask(shape), plan.bias(shape))
        close(out.output, o)
        close(out.lse, lse), name


@pytest.mark.parametrize("backend", ["auto", "reference", "native"])
def test_padding_window_cap_and_sink_act_on_every_plan(backend):
    shape = AttentionShape(3, 4, 2, 70, 90, causal=True)
    q, k, v = make.tensors(shape)
    padding = torch.ones(3, 90, dtype=torch.bool)
    padding[0, :25], padding[2, 60:] = False, False
    sink = torch.randn(4)
    window = (shape.positions()[:, None] - torch.arange(90)) < 33
    for plan in make.masked_plans(shape, 6).values():
        out = attend(
            q, k, v, plan=plan, causal=True, key_padding=padding, window=33, softcap=2.0,
            sink_logit=sink, return_lse=True, backend=backend,
        )  # fmt: skip
        mask = plan.to_dense_mask(shape) & padding[:, None, None] & window
        o, lse = oracle(q, k, v, mask, plan.bias(shape), 2.0, sink)
        close(out.output, o)
        close(out.lse, lse)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dense_attention_is_torchs(shape):
    q, k, v = make.tensors(shape, 32)
    padding = torch.arange(shape.k_len) >= torch.arange(shape.batch)[:, None]
    for pads in (None, padding):
        mask = shape.causal_mask()[None, None]
        mask = mask if pads is None else mask & pads[:, None, None]
        expected = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        for backend in ("auto", "sdpa", "reference", "native"):
            out = attend(q, k, v, causal=shape.causal, key_padding=pads, backend=backend)
            filled = mask.any(-1).expand(shape.batch, shape.q_heads, -1)
            close(out[filled], expected[filled])
            assert (out[~filled] == 0).all()


def test_rows_without_keys_are_zero_with_finite_gradients():
    shape = AttentionShape(1, 2, 1, 64, 64, causal=True)
    mask = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    mask[..., 1:, 0] = True
    for backend in ("reference", "native", "gather"):
        q, k, v = (t.requires_grad_() for t in make.tensors(shape))
        plan = KeyListPlan.from_bitmask(mask)
        out = attend(q, k, v, plan=plan, causal=True, return_lse=True, backend=backend)
        assert (out.output[:, :, 0] == 0).all()
        assert (out.lse[:, :, 0] == -torch.inf).all()
        out.output.square().sum().backward()
        assert all(torch.isfinite(t.grad).all() for t in (q, k, v))


@pytest.mark.parametrize("backend", ["native", "auto"])
def test_gradients_are_those_of_the_oracle(backend):
    shape = AttentionShape(2, 4, 2, 70, 100, causal=True)
    for causal in (True, False):
        current = replace(shape, causal=causal)
        for name, plan in make.masked_plans(current, 7).items():
            inputs = [t.requires_grad_() for t in make.tensors(current, 16)]
            bias = getattr(plan, "tile_bias", None)
            if bias is not None:
                inputs.append(bias.requires_grad_())
            out = attend(
                *inputs[:3], plan=plan, causal=causal, softcap=3.0, return_lse=True, backend=backend
            )
            draw = torch.Generator().manual_seed(8)
            do = torch.randn(out.output.shape, generator=draw)
            filled = torch.isfinite(out.lse)
            dlse = torch.randn(out.lse.shape, generator=draw) * filled
            grads = torch.autograd.grad(
                [out.output, out.lse], inputs, [do, dlse], allow_unused=True
            )
            mask = plan.to_dense_mask(current)
            o, lse = oracle(*inputs[:3], mask, plan.bias(current), 3.0)
            total = (o * do).sum() + (lse.masked_fill(~filled, 0) * dlse).sum()
            expected = torch.autograd.grad(total, inputs, allow_unused=True)
            for got, want in zip(grads, expected, strict=True):
                assert torch.isfinite(got).all(), name
                keep = torch.isfinite(want)
                torch.testing.assert_close(got[keep], want[keep], rtol=2e-4, atol=2e-5)


def test_gradcheck_of_the_reference_in_float64():
    shape = AttentionShape(1, 2, 1, 5, 7, causal=True)
    q, k, v = (t.requires_grad_() for t in make.tensors(shape, 4, dtype=torch.float64))
    mask = make.coin(torch.Generator().manual_seed(0), 0.5, 1, 2, 5, 7)
    mask[..., 0, :] = False
    plan = KeyListPlan.from_bitmask(mask)
    sink = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def run(q, k, v, sink):
        return attend(
            q, k, v, plan=plan, causal=True, softcap=1.5, sink_logit=sink, backend="reference"
        )

    assert torch.autograd.gradcheck(run, (q, k, v, sink))


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4))
def test_merging_a_split_of_any_plan_gives_the_whole(seed, parts):
    shape = AttentionShape(2, 4, 2, 33, 80, causal=True)
    draw = torch.Generator().manual_seed(seed)
    q, k, v = make.tensors(shape, seed=seed)
    for plan in make.masked_plans(shape, seed).values():
        mask = plan.to_dense_mask(shape)
        owner = torch.randint(0, parts, mask.shape, generator=draw)
        pieces = []
        for part in range(parts):
            piece = KeyListPlan.from_bitmask(mask & (owner == part))
            out = attend(q, k, v, plan=piece, causal=True, return_lse=True)
            pieces.append((out.output, out.lse))
        o, lse = merge(pieces)
        whole = attend(q, k, v, plan=plan, causal=True, return_lse=True)
        close(o, whole.output)
        close(lse, whole.lse)


def test_merge_passes_gradients_through_empty_parts():
    o = [torch.randn(1, 1, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    lse = [torch.tensor([[[0.3, -torch.inf]]], dtype=torch.float64) for _ in range(2)]
    out, total = merge(list(zip(o, lse, strict=True)))
    assert (out[..., 1, :] == 0).all()
    assert total[0, 0, 1] == -torch.inf
    out.sum().backward()
    assert all(torch.isfinite(part.grad).all() for part in o)


@pytest.mark.parametrize("reduce", ["scatter", "mean", "lse"])
def test_groups_follow_their_rule(reduce):
    for shape in (AttentionShape(2, 4, 2, 40, 40, causal=True), AttentionShape(1, 4, 4, 21, 30)):
        draw = torch.Generator().manual_seed(3)
        for bp, hp in ((1, 1), (shape.batch, shape.kv_heads), (1, shape.q_heads)):
            plan = make.random_groups(shape, draw, bp, hp, reduce)
            q, k, v = make.tensors(shape)
            out = attend(q, k, v, plan=plan, causal=shape.causal, return_lse=True)
            o, lse = _groups(q, k, v, plan, shape)
            close(out.output, o)
            if reduce == "lse":
                close(out.lse, lse)


def _groups(q, k, v, plan, shape):
    """Groups one by one, in float64."""
    outs, lses = [], []
    n = plan.q_idx.shape[2]
    for g in range(n):
        mask = torch.zeros(*plan.dims, shape.q_len, shape.k_len, dtype=torch.bool)
        held = plan.group_mask(shape)[:, :, g]
        if plan.reduce == "scatter":
            held = held & plan.owned(shape)[:, :, g, :, None]
        for b in range(plan.dims[0]):
            for h in range(plan.dims[1]):
                for a, row in enumerate(plan.q_idx[b, h, g].tolist()):
                    for c, key in enumerate(plan.kv_idx[b, h, g].tolist()):
                        if row >= 0 and key >= 0 and held[b, h, a, c]:
                            mask[b, h, row, key] = True
        o, lse = oracle(q, k, v, mask)
        outs.append(o)
        lses.append(lse)
    if plan.reduce == "mean":
        filled = torch.stack([torch.isfinite(lse) for lse in lses])
        return torch.stack(outs).sum(0) / filled.sum(0).clamp(min=1)[..., None], None
    return merge(list(zip(outs, lses, strict=True)))


def test_owner_slots_say_who_writes_a_repeated_token():
    shape = AttentionShape(1, 1, 1, 3, 3)
    q_idx = torch.tensor([[[[0, 1], [1, 2]]]]).int()
    kv_idx = torch.tensor([[[[0, -1], [2, -1]]]]).int()
    q, k, v = make.tensors(shape)
    first = GroupPlan(q_idx, kv_idx, owner_slot=torch.tensor([[[0, 1, 3]]]).int())
    out = attend(q, k, v, plan=first)
    torch.testing.assert_close(out[0, 0], v[0, 0, [0, 0, 2]])
    out = attend(q, k, v, plan=GroupPlan(q_idx, kv_idx))
    torch.testing.assert_close(out[0, 0], v[0, 0, [0, 2, 2]])


def test_uncovered_queries_are_zero_or_an_error():
    shape = AttentionShape(1, 1, 1, 3, 3)
    idx = torch.tensor([[[[0, 2]]]]).int()
    q, k, v = make.tensors(shape)
    assert (attend(q, k, v, plan=GroupPlan(idx, idx))[0, 0, 1] == 0).all()
    with pytest.raises(ValueError, match="uncovered"):
        attend(q, k, v, plan=GroupPlan(idx, idx, uncovered="error"))


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("side", ["keys", "queries", "both"])
def test_token_plans_restrict_their_side(side, per_head):
    shape = AttentionShape(2, 4, 2, 30, 30, causal=True)
    plan = make.random_tokens(shape, torch.Generator().manual_seed(2), side, per_head)
    q, k, v = make.tensors(shape)
    padding = torch.arange(30) >= torch.tensor([[0], [7]])
    o, lse = oracle(q, k, v, plan.to_dense_mask(shape) & padding[:, None, None])
    out = attend(q, k, v, plan=plan, causal=True, key_padding=padding, return_lse=True)
    close(out.output, o)
    close(out.lse, lse)


def test_mixing_gathered_and_ranged_heads():
    shape = AttentionShape(1, 4, 2, 32, 32, causal=True)
    draw = torch.Generator().manual_seed(4)
    plan = HeadMixPlan.of(
        {
            (1, 2): make.random_groups(shape, draw, 1, 2, "scatter"),
            (0, 3): make.random_block(shape, draw, 1, 2),
        }
    )
    q, k, v = make.tensors(shape)
    out = attend(q, k, v, plan=plan, causal=True, return_lse=True)
    o, lse = oracle(q, k, v, plan.to_dense_mask(shape))
    close(out.output, o)
    close(out.lse, lse)


def test_banks_share_one_softmax():
    shape = AttentionShape(2, 4, 2, 50, 50, causal=True)
    q, k, v = make.tensors(shape)
    _, sk, sv = make.tensors(AttentionShape(2, 4, 2, 1, 5), seed=1)
    local = SpanPlan.uniform(0, 1, block=10, granularity="block")
    plan = BankPlan((Bank(local), Bank(past_summaries(shape, 10, 5), sk, sv, "none")))
    out = attend(q, k, v, plan=plan, causal=True, return_lse=True)
    p, j = torch.arange(50)[:, None], torch.arange(50)
    raw = (p // 10 == j // 10) & (j <= p)
    past = torch.arange(5) < p // 10
    mask = torch.cat([raw, past], 1)[None, None]
    o, lse = oracle(q, torch.cat([k, sk], 2), torch.cat([v, sv], 2), mask)
    close(out.output, o)
    close(out.lse, lse)


def test_pooled_probabilities_are_tile_maxima():
    shape = AttentionShape(2, 4, 2, 40, 70, causal=True)
    q, k, v = make.tensors(shape)
    padding = torch.arange(70) >= torch.tensor([[0], [20]])
    for plan in make.masked_plans(shape, 2).values():
        common = {"plan": plan, "causal": True, "key_padding": padding, "window": 50}
        out = attend(q, k, v, pool_blocks=16, **common)
        probs = attend(q, k, v, return_probs=True, backend="reference", **common).probs
        padded = torch.nn.functional.pad(probs, (0, 10, 0, 8))
        expected = padded.unflatten(2, (3, 16)).unflatten(-1, (5, 16)).amax((3, 5))
        torch.testing.assert_close(out.pooled, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out.output, attend(q, k, v, **common))


def test_primitives_compose_to_attention_and_pass_gradcheck():
    shape = AttentionShape(1, 4, 2, 10, 14, causal=True)
    q, k, v = (t.double().requires_grad_() for t in make.tensors(shape, 4))
    plan = make.random_block(shape, torch.Generator().manual_seed(0), 1, 2)
    pairs = plan_pairs(plan, shape)
    assert pairs.row.numel() == int(plan.row_counts(shape).sum()) * shape.batch * 2

    def run(q, k, v):
        values = sddmm(q, k, pairs) * 0.5
        return spmm(plan_softmax(values, pairs), v, pairs), plan_logsumexp(values, pairs)

    o, lse = oracle(q, k, v, plan.to_dense_mask(shape))
    out, total = run(q, k, v)
    close(out, o)
    close(total, lse)
    assert torch.autograd.gradcheck(lambda *x: run(*x)[0].sum((0, 1)), (q, k, v))


@pytest.mark.parametrize("normalizer", ["relu", "none"])
def test_weights_without_a_softmax(normalizer):
    shape = AttentionShape(1, 4, 2, 20, 20, causal=True)
    q, k, v = make.tensors(shape)
    plan = make.random_list(shape, torch.Generator().manual_seed(0), 1, 4)
    out = attend(q, k, v, plan=plan, causal=True, normalizer=normalizer)
    s = q @ k.repeat_interleave(2, 1).transpose(-1, -2) / 4
    s = s.relu() if normalizer == "relu" else s
    expected = (s * plan.to_dense_mask(shape)) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_agree_to_their_precision(dtype):
    shape = AttentionShape(1, 4, 2, 64, 64, causal=True)
    q, k, v = make.tensors(shape, 64, dtype=dtype)
    for plan in make.masked_plans(shape, 1).values():
        out = attend(q, k, v, plan=plan, causal=True)
        assert out.dtype == dtype
        close(out, oracle(q, k, v, plan.to_dense_mask(shape))[0], 2e-2)


def test_strided_inputs_are_read_in_place():
    shape = AttentionShape(2, 4, 4, 48, 48, causal=True)
    q, k, v = make.tensors(shape)
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    plan = make.random_block(shape, torch.Generator().manual_seed(0), 1, 1)
    assert torch.equal(
        attend(q, k, v, plan=plan, causal=True), attend(*turned, plan=plan, causal=True)
    )


def test_dropout_depends_on_the_pair_alone():
    whole = dropout_factors(0.3, 5, (2, 3, 40, 50))
    assert torch.equal(whole[:, :, :20, :30], dropout_factors(0.3, 5, (2, 3, 20, 30)))
    assert whole.unique().tolist() == [0.0, pytest.approx(1 / 0.7)]
    assert float((whole == 0).float().mean()) == pytest.approx(0.3, abs=0.02)
    shape = AttentionShape(1, 2, 2, 16, 16, causal=True)
    q, k, v = make.tensors(shape)
    outs = []
    for _ in range(2):
        torch.manual_seed(1)
        outs.append(attend(q, k, v, causal=True, dropout_p=0.5))
    assert torch.equal(*outs)
    assert not torch.equal(outs[0], attend(q, k, v, causal=True))


def test_native_dropout_is_the_references_and_so_are_its_gradients():
    shape = AttentionShape(2, 4, 2, 70, 70, causal=True)
    tensors = [t.requires_grad_() for t in make.tensors(shape)]
    plan = make.random_block(shape, torch.Generator().manual_seed(0), 1, 4)
    results = []
    for backend in ("reference", "native"):
        torch.manual_seed(1)
        o = attend(*tensors, plan=plan, causal=True, dropout_p=0.4, backend=backend)
        results.append((o, *torch.autograd.grad(o.square().sum(), tensors)))
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    q, k = torch.zeros(1, 2, 300, 16), torch.zeros(1, 1, 300, 16)
    dropped = attend(q, k, torch.ones_like(k), dropout_p=0.4)  # all weights alike: a row's share
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.01)
    rows = dropped[..., 0].flatten()
    assert float(rows.std()) == pytest.approx((0.4 / 0.6 / 300) ** 0.5, rel=0.15)


def test_batch_permutation_permutes_the_result_and_threads_change_nothing():
    shape = AttentionShape(3, 4, 2, 70, 70, causal=True)
    q, k, v = make.tensors(shape)
    plan = make.random_offsets(shape, torch.Generator().manual_seed(0), 1, 4)
    out = attend(q, k, v, plan=plan, causal=True)
    order = [2, 0, 1]
    assert torch.equal(attend(q[order], k[order], v[order], plan=plan, causal=True), out[order])


@pytest.mark.skipif(not native_available(), reason="needs the tile kernels")
def test_the_operator_is_well_formed():
    shape = AttentionShape(1, 2, 1, 20, 30, causal=True)
    q, k, v = make.tensors(shape)
    plan = make.random_block(shape, torch.Generator().manual_seed(0), 1, 1)
    s = lower_pass(plan.passes(shape)[0], shape)
    args = (q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), s.tile_ptr, s.kind,
            s.start, s.length, s.gather_idx, None, None, None, 1, 1, s.block_q,
            shape.q_offset, 0.25, True, None, False, 0.0, 0)  # fmt: skip
    torch.library.opcheck(attention_op, args, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": (1, 3, 8, 8), "v": (1, 3, 8, 8)}, "heads"),
        ({"q": (1, 2, 9, 8)}, "no more"),
        ({"v": (1, 2, 7, 8)}, "expected"),
        ({"q": (1, 2, 8, 300), "k": (1, 2, 8, 300)}, "at most 256"),
        ({"window": 0}, "window"),
        ({"softcap": -1.0}, "softcap"),
        ({"dropout_p": 1.0}, "dropout"),
        ({"key_padding": torch.ones(1, 7, dtype=torch.bool)}, "key_padding"),
        ({"sink_logit": torch.ones(3)}, "sink_logit"),
        ({"backend": "fast"}, "backend"),
        ({"normalizer": "sigmoid"}, "normalizer"),
        ({"plan": BlockPlan.from_mask(torch.ones(1, 1, 5, 5, dtype=torch.bool))}, "row_ptr"),
        ({"backend": "sdpa", "plan": SpanPlan.uniform(1, 1)}, "dense"),
        ({"backend": "gather", "plan": DensePlan()}, "gathered"),
        ({"return_probs": True}, "return_probs"),
    ],
)
def test_calls_that_cannot_be_answered_are_refused(change, words):
    given = {"q": (1, 2, 8, 8), "k": (1, 2, 8, 8), "v": (1, 2, 8, 8), "causal": True, **change}
    q, k, v = (torch.zeros(given.pop(name)) for name in ("q", "k", "v"))
    with pytest.raises(ValueError, match=words):
        attend(q, k, v, **given)


def test_mixed_types_are_refused():
    x = torch.zeros(1, 1, 4, 8)
    with pytest.raises(ValueError, match="k: torch"):
        attend(x, x.half(), x)
