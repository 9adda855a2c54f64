"""Attention over streams of tiles against a dense mask, on every instruction set."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attention_cases import Case, cases, ragged_cases, random_case
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import needs_native

from aerogel import kernels
from aerogel.kernels.attention import attention_forward
from aerogel.kernels.attention_call import EDGE, GATHER
from aerogel.kernels.attention_reference import attention_forward_reference

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def assert_forward_right(case: Case, threads: int = 1) -> None:
    """Outputs within a tolerance of the values' size, lse within 1e-5 of its own."""
    o, lse = attention_forward(*case.arguments(), **case.options, threads=threads)
    wide = case.to(torch.float64)
    expected, expected_lse = attention_forward_reference(*wide.arguments(), **case.options)
    assert o.shape == expected.shape
    assert o.dtype == case.q.dtype
    assert lse.dtype is torch.float32
    assert torch.equal(lse.isinf(), expected_lse.isinf())
    finite = ~expected_lse.isinf()
    torch.testing.assert_close(lse[finite].double(), expected_lse[finite], rtol=1e-5, atol=1e-5)
    assert not o[~finite].any()
    size = float(case.v.double().abs().max()) if case.v.numel() else 1.0
    atol = TOLERANCES[case.q.dtype] * size
    torch.testing.assert_close(o.double(), expected, rtol=TOLERANCES[case.q.dtype], atol=atol)


@needs_native
@pytest.mark.usefixtures("instruction_set")
@settings(max_examples=80, deadline=None)
@given(case=cases(), dtype=st.sampled_from(list(TOLERANCES)), threads=st.integers(1, 3))
def test_forward_matches_a_dense_mask(case: Case, dtype: torch.dtype, threads: int) -> None:
    assert_forward_right(case.to(dtype), threads)


@needs_native
@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("rows", [9, 15, 16, 17, 29, 61, 64, 83])
@pytest.mark.parametrize("dim", [1, 3, 4, 7, 15, 17, 24, 31, 64, 72, 80, 112])
def test_blocks_of_any_height_and_width_are_turned(rows: int, dim: int) -> None:
    """What is left beside whole squares of registers, of queries and of channels."""
    for case in ragged_cases(rows, dim):
        assert_forward_right(case)


@needs_native
@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("q_len", [1, 4, 40])
@pytest.mark.parametrize("plan_heads", ["one", "q"])
def test_threads_change_no_bit_of_long_lists(q_len: int, plan_heads: str) -> None:
    case = random_case(q_len=q_len, k_len=5000, plan_heads=plan_heads, dim=64, batch=2)
    assert_forward_right(case)
    one = attention_forward(*case.arguments(), **case.options, threads=1)
    for threads in (2, 3):
        many = attention_forward(*case.arguments(), **case.options, threads=threads)
        assert all(map(torch.equal, one, many))


@needs_native
@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("count", [15, 31, 33, 64, 130, 255, 256, 517, 1023, 1024, 1088, 2201])
@pytest.mark.parametrize("kind", [GATHER, EDGE | GATHER, EDGE])
def test_stretches_of_a_decoded_list_take_turns(count: int, kind: int) -> None:
    """Lists of any length under one rule; keys keep their tile, their place and their padding."""
    g = torch.Generator().manual_seed(count)
    case = random_case(
        q_len=3, k_len=count + 70, batch=2, bias=True, softcap=3.0, block_q=3, seed=1
    )
    keys = torch.randperm(count + 70, generator=g)[:count].sort().values.int()
    start = torch.arange(0, count, 48, dtype=torch.int32)
    length = (count - start).clamp(max=48).to(torch.int16)
    ptr = torch.arange(5) * len(start)
    tiles = [x.repeat(4) for x in (torch.full_like(start, kind).to(torch.uint8), start, length)]
    case.stream = [ptr, *tiles, keys, torch.randn(4 * len(start), generator=g)]
    case.options["window"] = count - 5
    case.options["key_padding"] = torch.rand(2, count + 70, generator=g) < 0.9
    for dtype in TOLERANCES:
        assert_forward_right(case.to(dtype))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_lists_of_many_queries_are_cut_without_a_trace(dtype: torch.dtype) -> None:
    q = torch.randn(1, 12, 2, 40).to(dtype)
    k, v = torch.randn(2, 1, 1, 5000, 40).to(dtype)
    stream = kernels.lower_ranges(
        torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([5000]), Bp=1, Hp=1, block_q=2,
        q_len=2, k_len=5000, causal=True,
    )  # fmt: skip
    options = {"Bp": 1, "Hp": 1, "block_q": 2, "causal": True, "sink_logit": torch.randn(12)}
    one, many = (attention_forward(q, k, v, *stream[:5], **options, threads=n) for n in (1, 3))
    assert all(map(torch.equal, one, many))
    wide = attention_forward_reference(*(x.double() for x in (q, k, v)), *stream[:5], **options)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(one[0].double(), wide[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(one[1].double(), wide[1], rtol=1e-5, atol=1e-5)


@needs_native
@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("q_len", [1, 64])
def test_all_keys_are_dense_attention(q_len: int) -> None:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, q_len, 64, generator=g)
    k, v = torch.randn(2, 2, 2, 200, 64, generator=g)
    starts = torch.arange(0, 200, 64, dtype=torch.int32)
    kind = torch.zeros(4, dtype=torch.uint8)
    length = (200 - starts).clamp(max=64).to(torch.int16)
    stream = (torch.tensor([0, 4]), kind, starts, length, torch.empty(0, dtype=torch.int32))
    o, _ = attention_forward(q, k, v, *stream, Bp=1, Hp=1, block_q=64)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(o, expected, rtol=2e-5, atol=2e-6)


@needs_native
@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("q_len", [2, 33])
@pytest.mark.parametrize("size", [1e-30, 1e3, 1e15])
def test_extreme_logits_stay_finite(q_len: int, size: float) -> None:
    case = random_case(q_len=q_len, heads=(2, 1))
    case.q, case.k = case.q * size, case.k * size
    o, lse = attention_forward(*case.arguments(), **case.options)
    expected, expected_lse = attention_forward_reference(*case.arguments(), **case.options)
    assert torch.equal(lse.isinf(), expected_lse.isinf())
    if size < 1e10:
        finite = ~lse.isinf()
        torch.testing.assert_close(lse[finite], expected_lse[finite], rtol=1e-5, atol=1e-5)
    assert o.isfinite().all() or not expected.isfinite().all()


@needs_native
@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("q_len", [3, 40])
@pytest.mark.parametrize(("where", "bad"), [("q", torch.nan), ("k", torch.nan), ("v", torch.inf)])
def test_nan_and_infinity_reach_who_reads_them_only(q_len: int, where: str, bad: float) -> None:
    case = random_case(q_len=q_len, k_len=130, heads=(2, 2), causal=False, block_q=8)
    clean, _ = attention_forward(*case.arguments(), **case.options)
    every = torch.eye(130).expand(1, 2, 130, 130)
    weights, _ = attention_forward_reference(case.q, case.k, every, *case.stream, **case.options)
    row, key = (weights[0, 1] > 0).nonzero()[-1].tolist()
    getattr(case, where)[0, 1, row if where == "q" else key, 2] = bad
    o, lse = attention_forward(*case.arguments(), **case.options)
    reads = torch.arange(q_len) == row if where == "q" else weights[0, 1, :, key] > 0
    touched = torch.zeros(o.shape, dtype=torch.bool)
    touched[0, 1, reads] = True
    if where == "v":
        touched[..., :2] = touched[..., 3:] = False
    else:
        assert torch.equal(lse.isnan(), touched[..., 0])
    assert torch.equal(o[~touched], clean[~touched])
    assert (o[touched].isnan() if where != "v" else o[touched] == torch.inf).all()


@needs_native
@pytest.mark.parametrize("q_len", [2, 40])
def test_padded_keys_are_never_read(q_len: int) -> None:
    case = random_case(q_len=q_len, padding=True, batch=2)
    before = attention_forward(*case.arguments(), **case.options)
    absent = ~case.options["key_padding"][:, None].expand(case.k.shape[:3])
    case.k[absent], case.v[absent] = torch.nan, torch.nan
    after = attention_forward(*case.arguments(), **case.options)
    assert all(map(torch.equal, before, after))


@needs_native
def test_the_result_has_its_heads_where_q_has_them() -> None:
    case = random_case(layout="inside")
    o, _ = attention_forward(*case.arguments(), **case.options)
    assert o.transpose(1, 2).is_contiguous()


@needs_native
def test_reference_mode_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case()
    monkeypatch.setenv("AEROGEL_KERNELS", "reference")
    o, lse = attention_forward(*case.arguments(), **case.options)
    expected = attention_forward_reference(*case.arguments(), **case.options)
    assert torch.equal(o, expected[0])
    assert torch.equal(lse, expected[1])


def test_double_takes_the_reference_and_has_no_queries_at_all() -> None:
    case = random_case(q_len=7).to(torch.float64)
    o, lse = attention_forward(*case.arguments(), **case.options)
    assert (o.dtype, lse.dtype) == (torch.float64, torch.float64)
    empty = random_case(batch=1)
    empty.q = empty.q[:, :, :0]
    empty.stream = [empty.stream[0][:1], *(x[:0] for x in empty.stream[1:5]), None]
    o, lse = attention_forward(*empty.arguments(), **empty.options)
    assert o.shape == (1, 4, 0, 16)
    assert lse.shape == (1, 4, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Hp": 3}, "Hp=3: expected 1, 2 or 4"),
        ({"Bp": 2}, "Bp=2"),
        ({"block_q": 0}, "block_q=0"),
        ({"threads": 0}, "threads=0"),
        ({"window": 0}, "window=0"),
        ({"window_block": 0}, "window_block=0"),
        ({"softcap": -1.0}, "softcap=-1.0"),
        ({"key_padding": torch.ones(1, 3, dtype=torch.bool)}, r"key_padding: shape \(1, 3\)"),
        ({"sink_logit": torch.zeros(3)}, r"sink_logit: shape \(3,\)"),
        ({"k": torch.zeros(1, 2, 100, 8)}, r"k: shape \(1, 2, 100, 8\), expected B and D"),
        ({"v": torch.zeros(1, 2, 100, 300)}, "v: 300 dimensions a head, expected 1 to 256"),
        ({"k": torch.zeros(1, 3, 100, 16), "v": torch.zeros(1, 3, 100, 16)}, "multiple of k's 3"),
        ({"v": torch.zeros(1, 2, 100, 16).half()}, "v: torch.float16"),
        ({"kind": torch.zeros(1)}, "kind: torch.float32"),
        ({"tile_ptr": torch.tensor([0, 1])}, "tile_ptr: 2 entries, expected 21"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    case = random_case()
    names = ("q", "k", "v", "tile_ptr", "kind", "start", "length", "gather_idx", "tile_bias")
    arguments = dict(zip(names, case.arguments(), strict=True)) | case.options | change
    with pytest.raises(ValueError, match=message):
        attention_forward(**arguments)


@needs_native
@pytest.mark.parametrize(
    ("index", "value", "message"),
    [(2, 95, "tile 0: start=95"), (3, 65, "length=65"), (4, 100, r"gather_idx\[0\]=100")],
)
def test_tiles_outside_of_the_keys_are_refused(index: int, value: int, message: str) -> None:
    case = random_case(q_len=16, plan_heads="one")
    empty = torch.tensor([0], dtype=torch.int32)
    case.stream = [
        torch.tensor([0, 1]),
        torch.tensor([0 if index < 4 else 2], dtype=torch.uint8),
        empty.clone(),
        torch.tensor([16 if index < 4 else 1], dtype=torch.int16),
        empty.clone(),
        None,
    ]
    case.stream[index][0] = value
    with pytest.raises(ValueError, match=message):
        attention_forward(*case.arguments(), **case.options)


@needs_native
@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("by_block", [False, True])
@pytest.mark.parametrize("q_len", [1, 130])
def test_lowered_spans_are_what_they_mean(q_len: int, by_block: bool) -> None:
    """Sink and window of each head, against torch with a mask."""
    g = torch.Generator().manual_seed(1)
    k_len, block, zeros = 300, 16, torch.zeros(2, dtype=torch.int64)
    sink, window = torch.tensor([3, 0]), torch.tensor([5, 2])
    dense = torch.tensor([False, False])
    q = torch.randn(1, 4, q_len, 32, generator=g)
    k, v = torch.randn(2, 1, 2, k_len, 32, generator=g)
    sizes = {"block_q": 64, "causal": True}
    stream = kernels.lower_spans(
        sink,
        window,
        zeros,
        zeros,
        dense,
        block=block,
        by_block=by_block,
        q_len=q_len,
        k_len=k_len,
        **sizes,
    )
    unit = block if by_block else 1
    o, _ = attention_forward(
        q, k, v, *stream[:5], Bp=1, Hp=2, window=window, window_block=unit, **sizes
    )
    at, key = torch.arange(k_len - q_len, k_len)[:, None], torch.arange(k_len)
    near = at // unit - key // unit < window[:, None, None]
    mask = ((key // unit < sink[:, None, None]) | near) & (key <= at)
    expected = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask.repeat_interleave(2, 0)[None], enable_gqa=True
    )
    torch.testing.assert_close(o, expected, rtol=2e-5, atol=2e-6)


@needs_native
@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("q_len", [1, 130])
def test_ranges_and_single_keys_share_one_softmax(q_len: int) -> None:
    """Slashes that start anywhere, and single keys before and between them."""
    g = torch.Generator().manual_seed(1)
    k_len, tiles = 300, -(-q_len // 64)
    start = torch.tensor([20, 110, 150, 240]).repeat(tiles)
    token = torch.tensor([0, 7, 25, 100, 199, 290]).repeat(tiles)
    q, k, v = (torch.randn(1, 2, n, 32, generator=g) for n in (q_len, k_len, k_len))
    sizes = {"Bp": 1, "Hp": 1, "block_q": 64, "causal": True}
    stream = kernels.lower_ranges(
        torch.arange(tiles + 1) * 4,
        start,
        48,
        token_ptr=torch.arange(tiles + 1) * 6,
        token=token,
        q_len=q_len,
        k_len=k_len,
        **sizes,
    )
    o, lse = attention_forward(q, k, v, *stream[:5], **sizes)
    key = torch.arange(k_len)
    chosen = ((key >= start[:4, None]) & (key < start[:4, None] + 48)).any(0)
    chosen[token[:6]] = True
    mask = chosen & (key <= torch.arange(k_len - q_len, k_len)[:, None])
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(o, expected, rtol=2e-5, atol=2e-6)
    assert lse.isfinite().all()
