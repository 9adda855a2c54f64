"""What Scatterbrain promises: exact on the support, unbiased elsewhere, one normaliser."""

from __future__ import annotations

import plans as make
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import COMMON, tiny
from torch.nn.functional import scaled_dot_product_attention

from aerogel.attention import (
    AttentionShape,
    BlockSupport,
    LocalSupport,
    PositiveRandomFeatures,
    ScatterbrainAttention,
    SmyrfClusters,
    SparseSelfAttention,
    TopKSupport,
    linear_attention,
    make_selector,
    plan_pairs,
    scatterbrain_attention,
)
from aerogel.attention.tiled_pairs import ListedPairs

SHAPE = AttentionShape(2, 4, 2, 100, 100)


def drawn(shape=SHAPE, dim=16, dtype=torch.float64, seed=0):
    return make.tensors(shape, dim, seed=seed, dtype=dtype)


def fixed(dim=16, num=32, **options):
    draw = torch.Generator().manual_seed(3)
    return PositiveRandomFeatures(dim, num, generator=draw, **options)


def supports(heads=4, tiles=4):
    draw = torch.Generator().manual_seed(5)
    return {
        "local": LocalSupport(11),
        "topk": TopKSupport(9),
        "block": BlockSupport(make.coin(draw, 0.4, heads, tiles, tiles), 25),
        "lsh": SmyrfClusters(3, 16, seed=1),
        "lsh, one round": SmyrfClusters(1, 20, seed=1),
    }


def naive(q, k, v, features, mask, causal=False, padding=None):
    """The matrix itself, in float64, without any trick of scale: (output, weights)."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    exact = torch.exp(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5)
    (a, ca), (b, cb) = features.queries(q), features.keys(k)
    low = (a * ca.exp()) @ (b * cb.exp()).transpose(-1, -2)
    weights = torch.where(mask, exact, low)
    if causal:
        weights = weights.tril()
    if padding is not None:
        weights = weights * padding[:, None, None]
    weights = weights / weights.sum(-1, keepdim=True)
    return weights @ v, weights


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", supports())
def test_entries_are_exact_on_the_support_and_estimates_elsewhere(name, causal, padded):
    shape = AttentionShape(2, 4, 2, 100, 100, causal=causal)
    q, k, _ = drawn(shape)
    v = torch.eye(100, dtype=torch.float64).expand(2, 2, 100, 100)  # the output is the matrix
    padding = torch.arange(100) < torch.tensor([[100], [80]]) if padded else None
    support = supports()[name]
    mask = support.plan(q, k, shape, padding).to_dense_mask(shape)
    got = scatterbrain_attention(
        q, k, v, fixed(), support, causal=causal, key_padding=padding
    )  # fmt: skip
    want, _ = naive(q, k, v, fixed(), mask, causal, padding)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(got.sum(-1), torch.ones_like(got[..., 0]))
    single = scatterbrain_attention(
        q.float(), k.float(), v.float(), fixed(), support, causal=causal, key_padding=padding
    )
    torch.testing.assert_close(single.double(), want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", supports())
def test_tiles_hold_the_pairs_of_the_plan_and_each_once(name):
    for causal in (False, True):
        shape = AttentionShape(2, 4, 2, 100, 100, causal=causal)
        q, k, v = drawn(shape)
        support = supports()[name]
        plan = support.plan(q, k, shape)
        plan.validate(shape)
        listed = ListedPairs(plan_pairs(plan, shape))
        tiled = support.pairs(q, k, shape)
        ours, theirs = tiled.dot(q, k), listed.dot(q, k)
        counts = listed.total(torch.ones_like(theirs))
        assert torch.equal(tiled.total(torch.ones_like(ours)), counts)
        torch.testing.assert_close(tiled.logsumexp(ours), listed.logsumexp(theirs))
        torch.testing.assert_close(tiled.weighted(ours, v), listed.weighted(theirs, v))


@pytest.mark.parametrize("heads", [2, 4])
def test_keys_may_be_chosen_by_some_channels(heads):
    q, k, _ = drawn()
    draw = torch.Generator().manual_seed(0)
    channels = torch.rand(heads, 16, generator=draw).argsort(-1)[:, :5]
    mask = TopKSupport(9, channels).plan(q, k, SHAPE).to_dense_mask(SHAPE)
    for h in range(4):
        own = channels[h * heads // 4]
        scores = q[:, h][..., own] @ k[:, h // 2][..., own].transpose(-1, -2)
        want = torch.zeros(2, 100, 100, dtype=torch.bool)
        want.scatter_(-1, scores.topk(9).indices, True)
        assert torch.equal(mask[:, h], want)
    with pytest.raises(ValueError, match="channels: 3 heads"):
        TopKSupport(9, channels[:1].expand(3, -1)).plan(q, k, SHAPE)


@pytest.mark.parametrize("causal", [False, True])
def test_a_support_of_everything_is_exact_attention(causal):
    q, k, v = drawn(dtype=torch.float32)
    want = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    for support in (LocalSupport(400), TopKSupport(100), SmyrfClusters(1, 100)):
        for features in (fixed(), None):
            got = scatterbrain_attention(q, k, v, features, support, causal=causal)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_no_support_is_performer_and_no_features_sparse_attention():
    q, k, v = drawn()
    got = scatterbrain_attention(q, k, v, fixed(), None)
    none = torch.zeros(100, 100, dtype=torch.bool)
    torch.testing.assert_close(got, naive(q, k, v, fixed(), none)[0])
    support = LocalSupport(9)
    mask = support.plan(q, k, SHAPE).to_dense_mask(SHAPE)
    got = scatterbrain_attention(q, k, v, None, support)
    want = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(got, want)


def test_features_are_unbiased():
    dim, draws = 8, 400
    q, k = (
        torch.randn(5, dim, generator=torch.Generator().manual_seed(s)).double() for s in (0, 1)
    )
    draw = torch.Generator().manual_seed(2)
    found = []
    for _ in range(draws):
        features = PositiveRandomFeatures(dim, 16, generator=draw)
        (a, ca), (b, cb) = features.queries(q), features.keys(k)
        found.append((a * ca.exp()) @ (b * cb.exp()).T)
    sample = torch.stack(found)
    error = sample.std(0) / draws**0.5
    truth = torch.exp(q @ k.T * dim**-0.5)
    assert ((sample.mean(0) - truth).abs() <= 4 * error).all()
    assert ((sample.mean(0) - truth).abs() <= 3 * error).float().mean() > 0.9


def test_rows_of_the_projection_are_orthogonal_in_groups():
    w = PositiveRandomFeatures(8, 40, norm="sqrt_d").projection
    for begin in (0, 8):
        part = w[begin : begin + 8]
        torch.testing.assert_close(part @ part.T, 8 * torch.eye(8), atol=1e-4, rtol=0)
    assert PositiveRandomFeatures(64).num_features == 266
    assert PositiveRandomFeatures(8, 6, orthogonal=False).projection.shape == (3, 8)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.1, 100), st.integers(1, 60), st.booleans())
def test_nothing_overflows(size, window, causal):
    shape = AttentionShape(1, 2, 2, 70, 70, causal=causal)
    q, k, v = (
        t * s for t, s in zip(drawn(shape, dtype=torch.float32), (size, size, 1), strict=True)
    )
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    out = scatterbrain_attention(q, k, v, fixed(), LocalSupport(window), causal=causal)
    assert torch.isfinite(out).all()
    out.sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in (q, k, v))


@pytest.mark.parametrize("name", ["local", "topk", "lsh"])
def test_gradients_are_those_of_the_matrix(name):
    support = supports()[name]
    q, k, v = (t.requires_grad_() for t in drawn())
    mask = support.plan(q, k, SHAPE).to_dense_mask(SHAPE)
    do = torch.randn(2, 4, 100, 16, dtype=torch.float64)
    got = torch.autograd.grad(scatterbrain_attention(q, k, v, fixed(), support), (q, k, v), do)
    want = torch.autograd.grad(naive(q, k, v, fixed(), mask)[0], (q, k, v), do)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_causal_rows_are_those_of_each_prefix():
    shape = AttentionShape(1, 2, 2, 150, 150, causal=True)
    q, k, v = drawn(shape)
    whole = scatterbrain_attention(q, k, v, fixed(), LocalSupport(20), causal=True)
    for length in (1, 64, 129, 150):
        part = [t[:, :, :length] for t in (q, k, v)]
        row = scatterbrain_attention(*part, fixed(), LocalSupport(20))[:, :, -1]
        torch.testing.assert_close(whole[:, :, length - 1], row)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 300), st.integers(1, 3), st.sampled_from([0, 1, 63, 64, 65, 130, 400]))
def test_causal_sums_are_those_of_a_loop(length, group, lag):
    draw = torch.Generator().manual_seed(length)
    q = torch.rand(2, 2 * group, length, 6, generator=draw).double()
    k, v = (torch.rand(2, 2, length, n, generator=draw).double() for n in (6, 5))
    wide_k, wide_v = (t.repeat_interleave(group, 1) for t in (k, v))
    matrix = (q @ wide_k.transpose(-1, -2)).tril(-lag)
    for tracked in (False, True):  # with gradients and without, sums are made in two ways
        numerator, denominator = linear_attention(
            q.clone().requires_grad_(tracked), k, v, causal=True, lag=lag
        )
        assert numerator.requires_grad == tracked
        torch.testing.assert_close(numerator, matrix @ wide_v)
        torch.testing.assert_close(denominator, matrix.sum(-1))


@pytest.mark.parametrize("eps", [0.0, 1e-4, 0.3])
def test_features_are_those_of_the_formula(eps):
    x = torch.randn(2, 3, 7, 16, dtype=torch.float64)
    features = PositiveRandomFeatures(16, 24, eps=eps).double()
    projected = x @ features.projection.T * 16**-0.25
    both = torch.cat([projected, -projected], -1)
    want = torch.exp(both - x.square().sum(-1, keepdim=True) / 8) / 24**0.5
    for phi, log_scale in (features.queries(x), features.keys(x)):
        # eps / sqrt(m) in units of the largest feature, as in the authors' code.
        shifted = want * torch.exp(-log_scale) + eps / 24**0.5
        torch.testing.assert_close(phi, shifted)
        assert float(phi.max()) == pytest.approx(1.0 + eps / 24**0.5)


def test_features_of_padding_are_zero_whatever_it_holds():
    x = torch.randn(2, 3, 7, 16)
    real = torch.arange(7) < torch.tensor([[7], [4]])
    features = PositiveRandomFeatures(16, 8, eps=1e-3)
    want, want_scale = features.keys(x[1:, :, :4])
    for junk in (0.0, torch.inf, torch.nan):
        x[1, :, 4:] = junk
        phi, scale = features.keys(x, real[:, None])
        assert bool((phi[1, :, 4:] == 0).all())
        torch.testing.assert_close(phi[1:, :, :4], want)
        torch.testing.assert_close(scale[1:], want_scale)


def test_a_dropped_pair_is_zero_in_the_matrix():
    q, k, _ = drawn()
    v = torch.eye(100, dtype=torch.float64).expand(2, 2, 100, 100)
    mask = LocalSupport(11).plan(q, k, SHAPE).to_dense_mask(SHAPE).expand(2, 4, -1, -1)
    whole = scatterbrain_attention(q, k, v, fixed(), LocalSupport(11))
    dropped = scatterbrain_attention(q, k, v, fixed(), LocalSupport(11), dropout_p=0.5)
    torch.testing.assert_close(dropped[~mask], whole[~mask])
    gone = dropped.abs() < 1e-12
    torch.testing.assert_close(dropped[mask & ~gone], 2 * whole[mask & ~gone])
    assert 0.4 < gone[mask].double().mean() < 0.6


def test_layers_train_keep_their_features_and_take_padding():
    for support in ("lsh", "local", "topk", None):
        torch.manual_seed(0)
        layer = ScatterbrainAttention(32, 2, 16, support, window=8, count=8, cluster_size=10)
        x = torch.randn(2, 40, 32, requires_grad=True)
        padding = torch.arange(40) < torch.tensor([[40], [30]])
        layer(x, padding).square().sum().backward()
        assert torch.isfinite(x.grad).all()
        assert all(p.grad is not None for p in layer.parameters())
        other = ScatterbrainAttention(32, 2, 16, support)
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other.features.projection, layer.features.projection)
    x2 = x.detach().clone()
    x2[1, 30:] = 9
    torch.testing.assert_close(layer(x2, padding)[1, :30], layer(x, padding)[1, :30])
    half = ScatterbrainAttention(32, 2, 16, "local").bfloat16()
    assert half(torch.randn(1, 40, 32).bfloat16()).dtype == torch.bfloat16


def test_an_encoder_runs_by_name():
    config = transformers.BertConfig(
        **{**COMMON, "num_key_value_heads": None}, attn_implementation="sdpa"
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    ids = torch.randint(2, 60, (2, 40))
    mask = (torch.arange(40) < torch.tensor([[40], [25]])).long()
    want = model(ids, attention_mask=mask).last_hidden_state
    model.set_attn_implementation("aerogel:scatterbrain")  # its window reads all 40 tokens
    got = model(ids, attention_mask=mask).last_hidden_state
    real = mask.bool()
    assert (got[real] - want[real]).abs().max() < 0.1
    own = SparseSelfAttention(32, 2, selector=make_selector("scatterbrain"), causal=False)
    assert own(torch.randn(1, 40, 32)).shape == (1, 40, 32)


def test_what_does_not_fit_is_refused():
    q, k, v = drawn(dtype=torch.float32)
    for call, words in (
        (lambda: PositiveRandomFeatures(16, 7), "num_features=7"),
        (lambda: PositiveRandomFeatures(16, 8, norm="l1"), "norm"),
        (lambda: PositiveRandomFeatures(16, 8, eps=-1), "eps"),
        (lambda: LocalSupport(0), "window must be at least 1, got 0"),
        (lambda: TopKSupport(0), "count must be at least 1, got 0"),
        (lambda: SmyrfClusters(0), "n_hashes must be at least 1, got 0"),
        (lambda: SmyrfClusters(1, 10, 20).pairs(q, k, SHAPE), "cluster_size_k=20"),
        (lambda: SmyrfClusters(1, 10).pairs(q * torch.nan, k, SHAPE), "finite"),
        (lambda: BlockSupport(torch.ones(2, 2), 50), "mask"),
        (lambda: BlockSupport(torch.ones(3, 3) > 0, 50).pairs(q, k, SHAPE), "blocks"),
        (lambda: linear_attention(q, k[:, :, 1:], v[:, :, 1:], True), "100 queries and 99 keys"),
        (lambda: linear_attention(q, k, v, False, 3), "lag=3"),
        (lambda: scatterbrain_attention(q, k, v, None, None), "at least one"),
        (lambda: scatterbrain_attention(q[:, :, 1:], k, v, fixed(), None, causal=True), "causal"),
        (lambda: scatterbrain_attention(q, k, v, fixed(8), None), "16 dimensions"),
        (lambda: scatterbrain_attention(q, k, v, fixed(), None, scale=1.0), "scale"),
        (
            lambda: scatterbrain_attention(
                q, k, v, fixed(), None, key_padding=torch.zeros(2, 100) > 0
            ),
            "key_padding",
        ),
        (lambda: ScatterbrainAttention(32, 2, 0, None), "num_features=0"),
        (lambda: ScatterbrainAttention(33, 2), "d_model=33"),
        (lambda: ScatterbrainAttention(32, 2, support="block"), "block_mask"),
        (lambda: ScatterbrainAttention(32, 2, support="all"), "support='all'"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    model = tiny("Llama")
    model.set_attn_implementation("aerogel:scatterbrain")
    with pytest.raises(ValueError, match="cannot decode"):
        model.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=3, min_new_tokens=3)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("support", [LocalSupport(17), LocalSupport(64), TopKSupport(9)])
def test_native_passes_give_what_the_pairs_give(causal, support, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, 150, 16, generator=draw, requires_grad=True) for heads in (4, 2, 2)
    )
    features = PositiveRandomFeatures(16, 32, generator=draw)
    padding = torch.arange(150) < torch.tensor([[150], [90]])
    results = []
    for mode in ("native", "reference"):
        monkeypatch.setenv("AEROGEL_KERNELS", mode)
        o = scatterbrain_attention(q, k, v, features, support, causal=causal, key_padding=padding)
        results.append((o, *torch.autograd.grad(o[:, :, :90].square().sum(), (q, k, v))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
