"""Routing: who attends to whom, what the centroids learn, and that no value comes from later."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from aerogel.attention import AttentionContext, AttentionShape, attend
from aerogel.attention.cache import SelectorCacheLayer
from aerogel.attention.routing_layer import RoutingAttention
from aerogel.attention.routing_transformer import RoutingSelector
from aerogel.attention.spherical_kmeans import SphericalKMeans
from aerogel.models.routing_transformer import RoutingTransformerLM


def context(n: int = 32, dim: int = 16, heads: int = 2, batch: int = 2) -> AttentionContext:
    q = layer_norm(torch.randn(batch, heads, n, dim), (dim,))
    shape = AttentionShape(batch, heads, heads, n, n, causal=True)
    return AttentionContext(q, q, torch.randn(batch, heads, n, dim), shape, dim**-0.5)


def routed(selector: RoutingSelector, ctx: AttentionContext) -> torch.Tensor:
    plan = selector.plan_prefill(ctx)
    plan.validate(ctx.shape)
    out = attend(ctx.q, ctx.k, ctx.v, plan=plan, causal=ctx.shape.causal)
    assert isinstance(out, torch.Tensor)
    return out


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_one_cluster_of_all_tokens_is_dense_attention():
    ctx = context()
    out = routed(RoutingSelector(2, 1, 16, 32), ctx)
    want = scaled_dot_product_attention(ctx.q, ctx.k, ctx.v, is_causal=True)
    torch.testing.assert_close(out, want, rtol=2e-5, atol=2e-5)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 24))
def test_every_cluster_has_exactly_w_tokens_in_order_of_time(clusters, window):
    plan = RoutingSelector(2, clusters, 16, window).plan_prefill(context(24))
    for index in (plan.q_idx, plan.kv_idx):
        assert index.shape == (2, 2, clusters, window)
        assert (index >= 0).all()
        assert (index.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("mask_self", [False, True])
def test_a_token_gets_the_mean_over_its_clusters(mask_self):
    ctx = context(20)
    selector = RoutingSelector(2, 4, 16, 8, mask_self=mask_self)
    out, plan = routed(selector, ctx), selector.plan_prefill(ctx)
    for head in range(2):
        got: dict[int, list[torch.Tensor]] = {}
        for group in plan.q_idx[0, head].long():
            q, v = ctx.q[0, head, group], ctx.v[0, head, group]
            keep = torch.ones(8, 8, dtype=torch.bool).tril(-1 if mask_self else 0)
            keep[0, 0] = True  # the first of a cluster sees nothing else
            scores = (q @ q.T * 0.25).masked_fill(~keep, -torch.inf)
            for row, token in enumerate(group.tolist()):
                got.setdefault(token, []).append(scores[row].softmax(-1) @ v)
        for token in range(20):
            want = torch.stack(got[token]).mean(0) if token in got else torch.zeros(16)
            torch.testing.assert_close(out[0, head, token], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_ranks_in_a_cluster_add_learned_vectors_to_keys_and_values(causal):
    """As the authors' code: row a and column b of a cluster take entry b - a, within limits."""
    layer = RoutingAttention(
        32, 2, 0, 4, 8, causal=causal, share_qk=True, rel_pos="cluster", max_relative_position=3
    ).eval()
    x = torch.randn(1, 20, 32)
    q, v = (t(x).unflatten(-1, (2, 16)).transpose(1, 2) for t in (layer.query, layer.value))
    q = layer.selector.kmeans.normalise(q)
    near = layer.selector.kmeans.similarity(q)[0]
    want = torch.zeros(2, 20, 16)
    for head in range(2):
        total, count = torch.zeros(20, 16), torch.zeros(20, 1)
        for cluster in range(4):
            group = near[head, :, cluster].topk(8).indices.sort().values
            for a, token in enumerate(group):
                row = (torch.arange(8) - a).clamp(-3, 3) + 3
                logits = (q[0, head, group] + layer.ranks[0][row]) @ q[0, head, token] * 0.25
                if causal:
                    logits[a + 1 :] = -torch.inf
                total[token] += logits.softmax(-1) @ (v[0, head, group] + layer.ranks[1][row])
                count[token] += 1
        want[head] = total / count.clamp(min=1)
    want = layer.out(want.transpose(0, 1).flatten(1))
    torch.testing.assert_close(layer(x)[0], want, rtol=1e-4, atol=1e-5)
    layer.train()(x).square().sum().backward()
    assert all(bool(table.any()) for table in layer.ranks.grad)


def test_the_order_of_centroids_changes_nothing():
    ctx, selector = context(), RoutingSelector(2, 4, 16)
    before = routed(selector, ctx)
    selector.kmeans.mu.copy_(selector.kmeans.mu[:, torch.tensor([2, 0, 3, 1])])
    torch.testing.assert_close(routed(selector, ctx), before)


def test_no_value_of_a_later_token_is_read():
    ctx, selector = context(), RoutingSelector(2, 4, 16)
    plan = selector.plan_prefill(ctx)
    other = ctx.v.clone()
    other[:, :, 20:] = 9
    outs = [attend(ctx.q, ctx.k, v, plan=plan, causal=True)[:, :, :20] for v in (ctx.v, other)]
    assert torch.equal(*outs)


def test_causal_selection_ignores_later_tokens_altogether():
    ctx = context()
    later = ctx.q.clone()
    later[:, :, 20:] = layer_norm(torch.randn(2, 2, 12, 16), (16,))
    changed = replace(ctx, q=later, k=later)
    strict = RoutingSelector(2, 4, 16, causal_selection=True)
    torch.testing.assert_close(routed(strict, ctx)[:, :, :20], routed(strict, changed)[:, :, :20])
    loose = RoutingSelector(2, 4, 16)
    assert not torch.equal(routed(loose, ctx)[:, :, :20], routed(loose, changed)[:, :, :20])


def test_padding_is_neither_chosen_nor_learned_from():
    ctx = context()
    real = torch.arange(32) < torch.tensor([[32], [17]])
    plan = RoutingSelector(2, 4, 16).plan_prefill(replace(ctx, key_padding=real))
    assert int(plan.q_idx[1].max()) < 17
    assert int(plan.kv_idx[1].max()) < 17
    means = SphericalKMeans(2, 4, 16, init="random").train()
    twin = SphericalKMeans(2, 4, 16)
    twin.load_state_dict(means.state_dict())
    noisy = ctx.q.clone()
    noisy[1, :, 17:] = 7
    means(ctx.q, True, real)
    twin(noisy, True, real)
    assert torch.equal(means.mu, twin.mu)


def test_an_update_is_the_moving_average_by_hand():
    means = SphericalKMeans(1, 2, 4, decay=0.9, init="random")
    means.mu.copy_(torch.tensor([[[1.0, 0, 0, 0], [0, 1, 0, 0]]]))
    means.ema_count.fill_(2)
    means.ema_sum.copy_(means.mu * 2)
    x = torch.tensor([[[[3.0, 1, 0, 0], [1.0, 0, 1, 0], [0.0, 2, 0, 1]]]])
    similarity, nearest, loss = means(x, True)
    assert nearest.tolist() == [[[0, 0, 1]]]
    torch.testing.assert_close(similarity[0, 0], x[0, 0, :, :2])
    count = torch.tensor([2 * 0.9 + 2 * 0.1, 2 * 0.9 + 1 * 0.1])
    smooth = (count + 1e-5) / (count.sum() + 2e-5) * count.sum()
    sums = torch.tensor([[1.8 + 0.4, 0.1, 0.1, 0], [0, 1.8 + 0.2, 0, 0.1]])
    torch.testing.assert_close(means.mu[0], sums / smooth[:, None])
    torch.testing.assert_close(loss, torch.tensor(1e-4 * (5 + 1 + 2) / 12))


def test_centroids_may_be_parameters_that_a_second_loss_draws():
    means = SphericalKMeans(1, 2, 4, ema=False, init="random").train()
    x = means.normalise(torch.randn(1, 1, 6, 4)).requires_grad_()
    before = means.mu.detach().clone()
    _, nearest, loss = means(x, True)
    assert torch.equal(means.mu, before)
    loss.backward()
    own, rest = before[0, nearest[0, 0]], x.detach()[0, 0]
    gap = (rest - own) * 2 / 24
    torch.testing.assert_close(x.grad[0, 0], gap * 1e-4)
    want = torch.zeros(2, 4).index_add(0, nearest[0, 0], -gap)
    torch.testing.assert_close(means.mu.grad[0], want)


def test_l2_centroids_step_towards_the_mean_direction_and_empty_ones_stay():
    means = SphericalKMeans(1, 2, 2, decay=0.5, norm="l2", init="random")
    means.mu.copy_(torch.tensor([[[1.0, 0], [-1, 0]]]))
    means(torch.tensor([[[[0.6, 0.8]]]]), True)
    torch.testing.assert_close(means.mu[0], torch.tensor([[0.8, 0.4], [-1, 0]]))


def test_centroids_rest_in_eval_and_get_no_gradient():
    layer = RoutingAttention(32, 4, 2, 4, local_window=8)
    x = torch.randn(2, 32, 32)
    layer(x)
    before = layer.selector.kmeans.mu.clone()
    layer.eval()(x)
    assert torch.equal(layer.selector.kmeans.mu, before)
    assert layer.auxiliary is None
    out = layer.train()(x)
    assert not torch.equal(layer.selector.kmeans.mu, before)
    (out.sum() + layer.auxiliary).backward()
    assert not layer.selector.kmeans.mu.requires_grad
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("norm", ["layernorm", "l2"])
def test_queries_and_keys_are_compared_with_the_same_centroids_and_move_them_once(norm):
    layer = RoutingAttention(32, 2, 0, 4, share_qk=False, norm=norm, init="random", decay=0.5)
    means, seen = layer.selector.kmeans, []
    before, learn = means.mu.clone(), means._learn

    def recorded(x, nearest, real):
        seen.append((x.detach(), nearest, means.mu.clone()))
        learn(x, nearest, real)

    means._learn = recorded
    layer(torch.randn(2, 16, 32))
    ((x, nearest, mu),) = seen
    assert x.shape[2] == 32
    assert torch.equal(mu, before)
    assert torch.equal(nearest, torch.einsum("bhnd,hcd->bhnc", x, before).argmax(-1))
    count = torch.nn.functional.one_hot(nearest, 4).float().sum((0, 2))
    if norm == "layernorm":
        torch.testing.assert_close(means.ema_count, 0.5 * torch.ones(2, 4) + 0.5 * count)
    spread = ((x - before[torch.arange(2)[:, None], nearest]) ** 2).mean(-1)
    parts = [part.mean() for part in spread.split(16, 2)]
    torch.testing.assert_close(layer.auxiliary, means.commitment * sum(parts))


def test_lloyd_start_is_as_good_as_scikit_learn():
    cluster = pytest.importorskip("sklearn.cluster")
    means = SphericalKMeans(1, 6, 8)
    corners = means.normalise(torch.randn(6, 8)) * 1.0
    x = means.normalise(corners[torch.arange(300) % 6] + 0.5 * torch.randn(300, 8))
    means.decay = 0.999
    _, nearest, _ = means(x[None, None], True)
    own = means.similarity(x[None, None]).amax(-1).mean()
    oracle = cluster.KMeans(6, n_init=1, random_state=0).fit(x.numpy())
    centres = means.normalise(torch.from_numpy(oracle.cluster_centers_))
    best = (x @ centres.T).amax(-1).mean()
    assert float(own) >= 0.85 * float(best)
    assert nearest.shape == (1, 1, 300)


@pytest.mark.parametrize(
    "options",
    [
        {"share_qk": True},
        {"share_qk": False, "norm": "l2"},
        {"share_qk": True, "norm": "l2"},
        {"share_qk": False},
        {"rel_pos": "cluster", "max_relative_position": 2},
    ],
)
def test_decoding_is_prefill_with_causal_selection(options):
    model = RoutingTransformerLM(
        50, 32, 2, 40, 4, 2, 4, 6, local_window=8, causal_selection=True, **options
    ).eval()
    ids = torch.randint(50, (2, 24))
    with torch.no_grad():
        want = model(ids)
        cache = model.make_cache()
        steps = [model(ids[:, :9], cache=cache)]
        steps += [model(ids[:, i : i + 1], cache=cache) for i in range(9, 24)]
    torch.testing.assert_close(torch.cat(steps, 1), want, rtol=1e-4, atol=1e-4)


def test_memory_keeps_every_causal_row_from_being_empty():
    layer = RoutingAttention(32, 2, 0, 4, causal=True, share_qk=False)
    assert layer.memory is not None
    out = layer(torch.randn(1, 32, 32))
    assert out.isfinite().all()


def test_cross_attention_clusters_queries_and_context_together():
    layer = RoutingAttention(32, 2, 0, 4, causal=False, context_window=5)
    out = layer(torch.randn(2, 16, 32), context=torch.randn(2, 22, 32))
    assert out.shape == (2, 16, 32)
    assert out.isfinite().all()


def test_hash_routing_sorts_by_signs_and_never_learns():
    selector = RoutingSelector(1, 8, 16, 4, routing="hash").train()
    before = selector.kmeans.mu.clone()
    selector.kmeans(torch.randn(1, 1, 32, 16), True)
    assert torch.equal(selector.kmeans.mu, before)
    torch.testing.assert_close(before.flip(1), -before)


def test_state_survives_saving():
    layer = RoutingAttention(32, 4, 2, 4, local_window=8)
    x = torch.randn(1, 16, 32)
    layer(x)
    twin = RoutingAttention(32, 4, 2, 4, local_window=8)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin.eval()(x), layer.eval()(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RoutingSelector(2, 5, 16).plan_prefill(context()), "32 tokens, num_clusters=5"),
        (lambda: RoutingSelector(2, 4, 16, 33).plan_prefill(context()), "window=33"),
        (lambda: RoutingSelector(2, 4, 16, 0), "window must be at least 1, got 0"),
        (lambda: RoutingSelector(2, 6, 16, routing="hash"), "num_clusters=6"),
        (lambda: RoutingAttention(32, 2, 3, 4), "num_local_heads=3"),
        (lambda: RoutingAttention(32, 2, 0, 4, rel_pos="sines"), "rel_pos='sines'"),
        (lambda: RoutingAttention(32, 2, 0, 4, rel_pos="cluster", share_qk=False), "in time"),
        (lambda: RoutingAttention(32, 2, 0, 4, rel_pos="cluster", num_mem_kv=1), "num_mem_kv=1"),
        (
            lambda: RoutingAttention(32, 2, 0, 4, rel_pos="cluster", max_relative_position=0),
            "max_relative_position must be at least 1, got 0",
        ),
        (
            lambda: RoutingAttention(32, 2, 0, 4, causal=False, rel_pos="cluster")(
                torch.ones(1, 8, 32), torch.ones(1, 8, 32)
            ),
            "rel_pos='cluster'",
        ),
        (lambda: RoutingAttention(30, 4, 2, 4), "d_model=30"),
        (
            lambda: RoutingAttention(32, 2, 0, 4)(torch.ones(1, 8, 32), torch.ones(1, 8, 32)),
            "causal",
        ),
        (
            lambda: RoutingAttention(32, 2, 0, 4, causal=False, share_qk=True)(
                torch.ones(1, 8, 32), torch.ones(1, 8, 32)
            ),
            "share_qk",
        ),
        (lambda: SphericalKMeans(1, 2, 4).eval()(torch.ones(1, 1, 3, 4), True), "update=True"),
        (
            lambda: RoutingTransformerLM(9, 32, 1, 8)(torch.zeros(1, 9, dtype=torch.long)),
            "9 tokens",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_broken_centroids_are_an_error():
    means = SphericalKMeans(1, 2, 4)
    means.mu[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="finite centroids"):
        means(torch.ones(1, 1, 3, 4))


def test_a_cache_takes_no_gradients():
    layer = RoutingAttention(32, 2, 0, 4, fit=True)
    with pytest.raises(ValueError, match="no_grad"):
        layer(torch.randn(1, 8, 32), cache=SelectorCacheLayer())
