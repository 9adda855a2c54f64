"""Attention over codes against numbers, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import needs_native
from torch import Tensor

from aerogel.kernels.attention_codes import (
    CodedTokens,
    TokenCodes,
    coded_attention_reference,
    pack_tokens,
)

SHAPES = (
    (1, 1, 1, 64, 64),
    (2, 2, 1, 24, 40),
    (2, 3, 5, 96, 80),
    (1, 8, 3, 20, 8),
    (1, 16, 2, 4, 4),
)


def random_codes(
    batch: int, heads: int, tokens: int, dims: tuple[int, int], bits: int,
    scales: torch.dtype, draw: torch.Generator,
) -> tuple[TokenCodes, TokenCodes]:  # fmt: skip
    """Keys and values of random codes and ranges."""
    tiles = -(-tokens // 16)
    ranges = ((heads, 1, dims[0]), (1, tiles * 16, 1))
    found = []
    for dim, size in zip(dims, ranges, strict=True):
        codes = torch.randint(0, 1 << bits, (batch, heads, tiles * 16, dim), generator=draw)
        low = torch.randn(batch, *size, generator=draw).to(scales)
        step = (torch.rand(batch, *size, generator=draw) * 2 / (1 << bits)).to(scales)
        packed = pack_tokens(codes.to(torch.uint8), bits)
        found.append(TokenCodes(packed, bits, tokens, low, step))
    channel = (torch.rand(batch, heads, 1, dims[1], generator=draw) + 0.5).to(scales)
    keys, values = found
    return keys, TokenCodes(values.codes, bits, tokens, values.low, values.step, channel)


def assert_matches(store: CodedTokens, q: Tensor, tolerance: float, **options: object) -> None:
    o, lse = store.attend(q, **options)  # type: ignore[arg-type]
    wide = {name: value for name, value in options.items() if name != "threads"}
    if wide.get("prior") is not None:
        wide["prior"] = tuple(t.double() for t in wide["prior"])  # type: ignore[attr-defined]
    want, want_lse = coded_attention_reference(q.double(), store.segments, **wide)  # type: ignore[arg-type]
    assert o.dtype == q.dtype
    assert lse.dtype is torch.float32
    assert torch.equal(lse.isinf(), want_lse.isinf())
    finite = ~want_lse.isinf()
    torch.testing.assert_close(lse[finite].double(), want_lse[finite], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(o.double(), want, rtol=tolerance, atol=tolerance)


@needs_native
@pytest.mark.usefixtures("instruction_set")
@settings(max_examples=25, deadline=None)
@given(
    shape=st.sampled_from(SHAPES), seed=st.integers(0, 99), prior=st.booleans(),
    lengths=st.lists(st.sampled_from([1, 15, 16, 33, 130, 1100]), min_size=1, max_size=3),
    scales=st.sampled_from([torch.float16, torch.float32, torch.bfloat16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    softcap=st.sampled_from([None, 2.0]), threads=st.integers(1, 2),
)  # fmt: skip
def test_codes_attend_as_their_numbers_do(
    shape, seed, prior, lengths, scales, dtype, softcap, threads
) -> None:
    batch, group, rows, dim, value_dim = shape
    draw = torch.Generator().manual_seed(seed)
    store = CodedTokens()
    for place, tokens in enumerate(lengths):
        bits = (4, 2, 8)[(place + seed) % 3]
        counts = torch.randint(0, tokens + 1, (batch,), generator=draw)
        store.append(*random_codes(batch, 2, tokens, (dim, value_dim), bits, scales, draw), counts)
    q = torch.randn(batch, rows, 2 * group, dim, generator=draw).to(dtype).transpose(1, 2)
    seen = None
    if prior:
        lse = torch.randn(batch, 2 * group, rows, generator=draw)
        seen = (torch.randn(*lse.shape, value_dim, generator=draw).to(dtype), lse)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    options = {"scale": dim**-0.5, "softcap": softcap, "prior": seen, "threads": threads}
    assert_matches(store, q, tolerance, **options)


def test_a_code_and_its_range_are_the_number() -> None:
    """By hand: two tokens of four channels in two bits."""
    codes = torch.tensor([[0, 1, 2, 3], [3, 0, 0, 1]], dtype=torch.uint8)[None, None]
    packed = pack_tokens(codes, 2)
    assert packed.shape == (1, 1, 1, 1, 16)
    assert packed.flatten()[:3].tolist() == [0b11100100, 0b01000011, 0]
    low, step = torch.tensor([1.0, 0, 0, -2]), torch.tensor([0.5, 1, 2, 4])
    x = TokenCodes(packed, 2, 2, low.view(1, 1, 1, 4), step.view(1, 1, 1, 4))
    assert x.dequantised().tolist() == [[[[1, 1, 4, 10], [2.5, 0, 0, 2]]]]


@needs_native
def test_appended_tokens_join_and_threads_change_no_bit() -> None:
    draw = torch.Generator().manual_seed(0)
    parts = [random_codes(2, 2, n, (16, 16), 4, torch.float16, draw) for n in (2100, 100)]
    counts = [torch.tensor([2100, 7]), torch.tensor([100, 0])]
    q = torch.randn(2, 4, 1, 16, generator=draw)
    grown = CodedTokens()
    grown.append(*parts[0], counts[0])
    first = grown.attend(q, scale=0.25)
    grown.append(*parts[1], counts[1])
    at_once = CodedTokens()
    for part, count in zip(parts, counts, strict=True):
        at_once.append(*part, count)
    for threads in (1, 2, 3):
        got = grown.attend(q, scale=0.25, threads=threads)
        for ours, theirs in zip(got, at_once.attend(q, scale=0.25, threads=1), strict=True):
            assert torch.equal(ours, theirs)
    assert not torch.equal(first[0][0], got[0][0])
    assert torch.equal(first[0][1], got[0][1]), "the second element got no token"


def test_queries_keep_their_gradient_and_the_reference_mode_its_word(monkeypatch) -> None:
    draw = torch.Generator().manual_seed(0)
    store = CodedTokens()
    store.append(*random_codes(1, 1, 40, (8, 8), 4, torch.float32, draw), torch.tensor([40]))
    q = torch.randn(1, 2, 3, 8, generator=draw, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: store.attend(x, scale=0.3), q)
    with torch.no_grad():
        native = store.attend(q.float(), scale=0.3)
        monkeypatch.setenv("AEROGEL_KERNELS", "reference")
        for ours, theirs in zip(native, store.attend(q.float(), scale=0.3), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    draw = torch.Generator().manual_seed(0)
    four, two = (random_codes(1, 2, 20, (8, 8), bits, torch.float16, draw) for bits in (4, 2))
    store, count = CodedTokens(), torch.tensor([20])
    for call, words in (
        (lambda: store.attend(torch.zeros(1, 2, 1, 8), scale=1.0), "segments"),
        (lambda: store.append(four[0], two[1], count), "values: 20 tokens in 2 bits"),
        (lambda: pack_tokens(torch.zeros(1, 1, 1, 6, dtype=torch.uint8), 2), "head_dim=6"),
        (lambda: pack_tokens(torch.zeros(1, 1, 1, 6, dtype=torch.uint8), 3), "bits=3"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    store.append(*four, count)
    for shape in ((1, 3, 1, 8), (2, 2, 1, 8), (1, 2, 1, 4)):
        with pytest.raises(ValueError, match="q: shape"):
            store.attend(torch.zeros(shape), scale=1.0)
