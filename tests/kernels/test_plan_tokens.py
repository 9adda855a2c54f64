"""Attention, layer norm and the columns of plans over sequences, against torch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aerogel import kernels
from aerogel.kernels import HeadRows, Plan, PlanBuilder

needs_native = pytest.mark.skipif(not kernels.native_available(), reason="native kernels not built")
ISAS = kernels.available_isas() if kernels.native_available() else ["reference"]
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of the machine."""
    if kernels.native_available():
        before = kernels.isa()
        kernels.set_isa(request.param)
        yield request.param
        kernels.set_isa(before)
    else:
        yield request.param


def run_clean(plan: Plan, inputs: list[Tensor]) -> list[Tensor]:
    """Two runs with memory full of NaN in between: nothing may survive from one to the next."""
    plan.run(inputs)
    if kernels.native_available():
        plan._native_plan().fill_idle_arenas(NAN)
    return plan.run(inputs)


def assert_like_reference(plan: Plan, inputs: list[Tensor]) -> list[Tensor]:
    outputs = run_clean(plan, inputs)
    for ours, theirs in zip(outputs, plan._run_reference(inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    return outputs


@st.composite
def attentions(draw: st.DrawFn) -> tuple[PlanBuilder, list[Tensor]]:
    """Any sizes, heads in parts of larger values, shared keys, and any kind of mask."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, sequences = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    shared, groups = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    size, value_size = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    queries = draw(st.integers(1, 70))
    keys = draw(st.sampled_from((queries, draw(st.integers(1, 70)), draw(st.integers(250, 530)))))
    heads = shared * groups
    of_q = HeadRows(heads, size, draw(st.integers(0, 3)))
    of_k = HeadRows(shared, size, draw(st.integers(0, 3)))
    of_v = HeadRows(shared, value_size, draw(st.integers(0, 3)))
    builder = PlanBuilder(batch)
    values, inputs = [], []
    for rows, tokens in ((of_q, queries), (of_k, keys), (of_v, keys)):
        features = rows.first + rows.count * rows.size + draw(st.integers(0, 2))
        shape = (sequences * tokens, features)
        values.append(builder.input(shape, layout="tokens"))
        inputs.append(torch.randn(batch, *shape, generator=generator))
    mask, columns = None, (1, 1, 1)
    if draw(st.booleans()):
        full = (sequences, heads, queries)
        columns = tuple(n if draw(st.booleans()) else 1 for n in full)  # type: ignore[assignment]
        added = torch.randn(batch, math.prod(columns), keys, generator=generator)
        inputs.append(added.masked_fill(added > draw(st.floats(-3, 3)), -INF))
        mask = builder.input(tuple(inputs[-1].shape[1:]), layout="tokens")
    y = builder.attention(
        *values, of_q, mask=mask, mask_columns=columns, scale=draw(st.sampled_from((None, 2.0))),
        sequences=sequences, empty_is_zero=draw(st.booleans()), k_heads=of_k, v_heads=of_v,
    )  # fmt: skip
    builder.output(y, layout="tokens")
    return builder, inputs


@needs_native
@settings(max_examples=120, deadline=None, derandomize=True)
@given(case=attentions(), isa=st.sampled_from(ISAS))
def test_attention_equals_its_reference_for_any_number_of_threads(
    case: tuple[PlanBuilder, list[Tensor]], isa: str
) -> None:
    before = kernels.isa()
    kernels.set_isa(isa)
    try:
        plan = case[0].build()
        first: Tensor | None = None
        for threads in (1, 2, 3):
            plan.threads = threads
            (y,) = run_clean(plan, case[1])
            first = y if first is None else first
            assert torch.equal(y.nan_to_num(nan=0.5), first.nan_to_num(nan=0.5))
        (expected,) = plan._run_reference(case[1])
        torch.testing.assert_close(y, expected, rtol=2e-5, atol=2e-5, equal_nan=True)
    finally:
        kernels.set_isa(before)


def attention_plan(tokens: int, features: int, heads: int, mask_rows: int = 0, **how) -> Plan:
    builder = PlanBuilder()
    q, k, v = (builder.input((tokens, features), layout="tokens") for _ in range(3))
    mask = builder.input((mask_rows, tokens), layout="tokens") if mask_rows else None
    y = builder.attention(q, k, v, heads, mask=mask, mask_columns=(1, 1, max(mask_rows, 1)), **how)
    builder.output(y, layout="tokens")
    return builder.build()


@needs_native
def test_attention_is_that_of_torch(isa: str) -> None:
    q, k, v = torch.randn(3, 1, 197, 96)
    (ours,) = attention_plan(197, 96, 3).run([q, k, v])
    heads = [x.unflatten(-1, (3, 32)).transpose(1, 2) for x in (q, k, v)]
    theirs = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@needs_native
def test_later_blocks_of_keys_may_hold_the_largest_scores(isa: str) -> None:
    tokens = 3 * 256 + 5
    q = torch.ones(1, tokens, 8)
    k = torch.linspace(0, 20, tokens).view(1, tokens, 1).expand(1, tokens, 8).contiguous()
    assert_like_reference(attention_plan(tokens, 8, 1), [q, k, torch.randn(1, tokens, 8)])


@needs_native
@pytest.mark.parametrize("empty_is_zero", [True, False])
def test_a_query_that_sees_nothing_gives_zeros_or_nan(isa: str, empty_is_zero: bool) -> None:
    tokens = 300
    mask = torch.zeros(1, tokens, tokens)
    mask[0, 7] = mask[0, 299] = -INF  # and 8 sees only the last key
    mask[0, 8, :-1] = -INF
    q, k, v = torch.randn(3, 1, tokens, 16)
    plan = attention_plan(tokens, 16, 2, tokens, empty_is_zero=empty_is_zero)
    (y,) = run_clean(plan, [q, k, v, mask])
    empty = y[0, [7, 299]]
    assert bool((empty == 0).all() if empty_is_zero else empty.isnan().all())
    torch.testing.assert_close(y[0, 8], v[0, -1], rtol=1e-5, atol=1e-5)
    assert bool(y[0, [i for i in range(tokens) if i not in (7, 299)]].isfinite().all())


@needs_native
def test_the_lowest_float_masks_as_transformers_means_it(isa: str) -> None:
    lowest = torch.finfo(torch.float32).min
    mask = torch.zeros(1, 20, 20)
    mask[..., 12:] = lowest
    mask[0, 3] = lowest  # nothing but the lowest: all keys alike
    q, k, v = torch.randn(3, 1, 20, 8)
    (y,) = assert_like_reference(attention_plan(20, 8, 1, 20), [q, k, v, mask])
    torch.testing.assert_close(y[0, 3], v[0].mean(0), rtol=1e-5, atol=1e-5)


@needs_native
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_not_finite_reaches_the_queries_that_meet_it(isa: str, bad: float) -> None:
    q, k, v = torch.randn(3, 1, 40, 8)
    q[0, 5, 0] = bad
    plan = attention_plan(40, 8, 1)
    (y,), (expected,) = run_clean(plan, [q, k, v]), plan._run_reference([q, k, v])
    assert torch.equal(y.isnan(), expected.isnan())
    others = [i for i in range(40) if i != 5]
    torch.testing.assert_close(y[0, others], expected[0, others], rtol=1e-5, atol=1e-5)
    q, v[0, 9, 3] = torch.randn(1, 40, 8), bad
    (y,) = run_clean(plan, [q, k, v])
    assert bool((~y[0, :, 3].isfinite()).all())
    assert bool(y[0, :, [c for c in range(8) if c != 3]].isfinite().all())


@needs_native
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    features=st.integers(1, 70), tokens=st.integers(1, 90), batch=st.integers(1, 3),
    weighted=st.booleans(), vector=st.booleans(), threads=st.integers(1, 3),
    isa=st.sampled_from(ISAS), seed=st.integers(0, 1000),
)  # fmt: skip
def test_layer_norm_is_that_of_torch(
    features: int, tokens: int, batch: int, weighted: bool, vector: bool, threads: int, isa: str,
    seed: int,
) -> None:  # fmt: skip
    before = kernels.isa()
    kernels.set_isa(isa)
    try:
        generator = torch.Generator().manual_seed(seed)
        shape = (features,) if vector else (tokens, features)
        x = torch.randn(batch, *shape, generator=generator)
        weight, bias = torch.randn(2, features, generator=generator)
        builder = PlanBuilder(batch, threads)
        value = builder.input(shape, layout="channels" if vector else "tokens")
        given = (weight, bias) if weighted else (None, None)
        y = builder.layer_norm(value, *given, eps=1e-3)
        builder.output(y, layout="channels" if vector else "tokens")
        (ours,) = run_clean(builder.build(), [x])
        theirs = F.layer_norm(x, (features,), *given, eps=1e-3)
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    finally:
        kernels.set_isa(before)


@needs_native
def test_layer_norm_survives_a_large_mean_and_keeps_nan_in_its_column(isa: str) -> None:
    x = torch.randn(1, 50, 768) + 1e3
    x[0, 7, 3] = NAN
    builder = PlanBuilder()
    value = builder.input((50, 768), layout="tokens")
    builder.output(builder.layer_norm(value), layout="tokens")
    (y,) = run_clean(builder.build(), [x])
    expected = F.layer_norm(x.double(), (768,)).float()
    assert bool(y[0, 7].isnan().all())
    others = [i for i in range(50) if i != 7]
    torch.testing.assert_close(y[0, others], expected[0, others], rtol=1e-3, atol=1e-3)


@needs_native
@pytest.mark.parametrize("threads", [1, 2])
def test_tokens_are_joined_shifted_and_taken_out(isa: str, threads: int) -> None:
    token, positions = torch.randn(12), torch.randn(12, 20)
    builder = PlanBuilder(3, threads)
    x = builder.input((19, 12), layout="tokens")
    y = builder.concat([builder.constant(token), x])
    y = builder.add(y, builder.constant(positions))
    builder.output(y, layout="tokens")
    builder.output(builder.columns(y, 0))
    builder.output(builder.columns(y, 2, 6, 3), layout="tokens")
    builder.output(builder.constant(token))
    given = torch.randn(3, 19, 12)
    whole, first, some, constant = assert_like_reference(builder.build(), [given])
    expected = torch.cat([token.expand(3, 1, 12), given], 1) + positions.t()
    assert torch.equal(whole, expected)
    assert torch.equal(first, expected[:, 0])
    assert torch.equal(some, expected[:, 2:20:6])
    assert torch.equal(constant, token.expand(3, 12))


@needs_native
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("threads", [1, 2])
def test_an_encoder_block_with_short_sequences(batch: int, threads: int) -> None:
    """Ends that treat columns alike see a whole batch: attention must not."""
    builder = PlanBuilder(batch, threads)
    x = builder.input((14, 12), layout="tokens")
    q, k, v = (builder.linear(x, torch.randn(12, 12) / 4) for _ in range(3))
    y = builder.layer_norm(builder.add(builder.attention(q, k, v, 3, sequences=2), x))
    y = builder.linear(y, torch.randn(12, 12) / 4, activation="gelu", residual=y)
    builder.output(builder.layer_norm(y), layout="tokens")
    builder.output(builder.linear(builder.columns(y, 0, 7, 2), torch.randn(5, 12)), layout="tokens")
    builder.output(builder.mul(builder.columns(y, 3), builder.constant(torch.randn(12))))
    assert_like_reference(builder.build(), [torch.randn(batch, 14, 12)])


X = PlanBuilder()
TOKENS = X.input((12, 20))
BAD = {
    "num_heads=5": lambda: X.attention(TOKENS, TOKENS, TOKENS, 5),
    "q: 12 features, expected 13": lambda: X.attention(TOKENS, TOKENS, TOKENS, HeadRows(3, 4, 1)),
    "expected 3 sequences": lambda: X.attention(TOKENS, TOKENS, TOKENS, 2, sequences=3),
    "k: ": lambda: X.attention(TOKENS, TOKENS, TOKENS, 2, k_heads=HeadRows(2, 5)),
    r"mask: shape \(12, 20\)": lambda: X.attention(TOKENS, TOKENS, TOKENS, 2, mask=TOKENS),
    r"expected each of \(1, 2, 20\)": lambda: X.attention(
        TOKENS, TOKENS, TOKENS, 2, mask=TOKENS, mask_columns=(1, 1, 4)
    ),
    r"weight: shape \(5,\)": lambda: X.layer_norm(TOKENS, torch.ones(5)),
    "start=20": lambda: X.columns(TOKENS, 20),
    "step=7": lambda: X.columns(TOKENS, 0, 7, 4),
    "parts: ": lambda: X.concat([TOKENS, X.constant(torch.ones(5))]),
    "data: shape": lambda: X.constant(torch.ones(1, 2, 3, 4)),
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit_is_refused_with_its_name(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BAD[message]()


def test_reference_mode_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(3, 1, 20, 8)
    monkeypatch.setenv("AEROGEL_KERNELS", "reference")
    (y,) = attention_plan(20, 8, 2).run([q, k, v])
    heads = [x.unflatten(-1, (2, 4)).transpose(1, 2) for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
