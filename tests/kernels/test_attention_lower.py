"""Lowering keeps every (query, key) that was chosen, and adds none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import needs_native
from torch import Tensor

from aerogel.kernels.attention_call import AttentionCall
from aerogel.kernels.attention_lower import TileStream, lower_ranges, lower_spans
from aerogel.kernels.attention_reference import _by_position, _tile_of


def pairs(stream: TileStream, shape: dict[str, Any], window_block: int = 1) -> Tensor:
    """(Bp, Hp, q_len, k_len) bool: what attention over the stream reads."""
    batch, heads = shape["Bp"], shape["Hp"]
    q = torch.zeros(batch, heads, shape["q_len"], 1)
    k = torch.zeros(batch, heads, shape["k_len"], 1)
    call = AttentionCall.of(
        q,
        k,
        k,
        (*stream[:5], None),
        plan=(batch, heads, shape["block_q"]),
        rules=(
            shape["q_offset"],
            None,
            shape["causal"],
            shape["window"],
            window_block,
            None,
            None,
            None,
        ),
    )
    tile_of = _tile_of(call)
    if not stream.kind.numel():
        return tile_of >= 0
    return (tile_of >= 0) & _by_position(call, stream.kind.long()[tile_of.clamp(min=0)])


def position_mask(shape: dict[str, Any]) -> Tensor:
    """(Hp, q_len, k_len) bool: what causal rule and window leave."""
    at = shape["q_offset"] + torch.arange(shape["q_len"])[:, None]
    key = torch.arange(shape["k_len"])
    allowed = (key <= at) | torch.tensor(not shape["causal"])
    allowed = allowed.expand(shape["Hp"], -1, -1).clone()
    window = shape["window"]
    if window is not None:
        width = torch.as_tensor(window).expand(shape["Hp"])[:, None, None]
        allowed &= (at - key < width) | (width <= 0)
    return allowed


def no_longer_than(stream: TileStream) -> None:
    assert stream.length.numel() == 0 or int(stream.length.min()) >= 1
    assert stream.length.numel() == 0 or int(stream.length.max()) <= 64


def same(a: TileStream, b: TileStream) -> bool:
    return all(x is y or torch.equal(x, y) for x, y in zip(a, b, strict=True))


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    q_len = draw(st.sampled_from((1, 7, 64, 100, 200)))
    k_len = q_len + draw(st.sampled_from((0, 1, 50)))
    heads = draw(st.integers(1, 3))
    return {
        "Bp": draw(st.integers(1, 2)),
        "Hp": heads,
        "block_q": draw(st.sampled_from((1, 16, 64))) if q_len < 100 else 64,
        "q_len": q_len,
        "k_len": k_len,
        "q_offset": draw(st.sampled_from((0, k_len - q_len))),
        "causal": draw(st.booleans()),
        "window": draw(
            st.sampled_from(
                (None, 1, 30, torch.tensor([0, 5, 70])[:heads], torch.tensor([9] * heads))
            )
        ),
    }


def rows_of(shape: dict[str, Any]) -> int:
    return shape["Bp"] * shape["Hp"] * -(-shape["q_len"] // shape["block_q"])


@needs_native
@settings(max_examples=100, deadline=None)
@given(
    shape=shapes(),
    unit=st.sampled_from((1, 16, 48)),
    fixed=st.booleans(),
    separate=st.booleans(),
    tokens=st.booleans(),
    seed=st.integers(0, 100),
)
def test_ranges_keep_what_was_chosen(
    shape: dict[str, Any], unit: int, fixed: bool, separate: bool, tokens: bool, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    rows, k_len = rows_of(shape), shape["k_len"]
    chosen = torch.rand(rows, -(-k_len // unit), generator=g) < 0.3
    start = chosen.nonzero()[:, 1]
    longest = unit if separate else 2 * unit + 3
    length: Tensor | int = longest
    if not fixed:
        length = torch.randint(1, longest + 1, (start.numel(),), generator=g)
    named = torch.rand(rows, k_len, generator=g) < (0.1 if tokens else 0.0)
    wanted = named.clone()
    lengths = torch.as_tensor(length).expand(start.numel())
    for row, s, n in zip(
        chosen.nonzero()[:, 0].tolist(), start.tolist(), lengths.tolist(), strict=True
    ):
        wanted[row, s * unit : s * unit + n] = True
    ptr = torch.nn.functional.pad(chosen.sum(1).cumsum(0), (1, 0))
    token_ptr = torch.nn.functional.pad(named.sum(1).cumsum(0), (1, 0))
    arguments = {
        **shape,
        "unit": unit,
        "separate": separate,
        "token_ptr": token_ptr if tokens else None,
        "token": named.nonzero()[:, 1] if tokens else None,
    }
    stream = lower_ranges(ptr, start, length, **arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AEROGEL_KERNELS", "reference")
        assert same(stream, lower_ranges(ptr, start, length, **arguments))
    by_tile = wanted.view(shape["Bp"], shape["Hp"], -1, k_len)
    by_query = by_tile.repeat_interleave(shape["block_q"], 2)[:, :, : shape["q_len"]]
    assert torch.equal(pairs(stream, shape), by_query & position_mask(shape))
    no_longer_than(stream)
    if separate:
        assert stream.source is not None
        assert ((stream.source >= 0) == ((stream.kind & 2) == 0)).all()
    if shape["window"] is None and not shape["causal"]:
        assert not (stream.kind & 1).any()


@needs_native
@settings(max_examples=100, deadline=None)
@given(
    shape=shapes(),
    block=st.sampled_from((16, 48, 64)),
    by_block=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_spans_keep_what_they_mean(
    shape: dict[str, Any], block: int, by_block: bool, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    heads = shape["Hp"]

    def draw(top: int) -> Tensor:
        return torch.randint(0, top, (heads,), generator=g)

    sink, window = draw(3 if by_block else 40), draw(4 if by_block else 90)
    stride, phase, dense = draw(4), draw(5), draw(4) == 0
    shape |= {"Bp": 1, "window": window}
    sizes = {n: shape[n] for n in ("block_q", "q_len", "k_len", "q_offset", "causal")}
    spans = (sink, window, stride, phase, dense)
    stream = lower_spans(*spans, block=block, by_block=by_block, **sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AEROGEL_KERNELS", "reference")
        assert same(stream, lower_spans(*spans, block=block, by_block=by_block, **sizes))
    unit = block if by_block else 1
    at = shape["q_offset"] + torch.arange(shape["q_len"])[:, None]
    key = torch.arange(shape["k_len"])
    sink, window, stride, phase, dense = (x[:, None, None] for x in spans)
    wanted = dense | (key // unit < sink) | (at // unit - key // unit < window) & (window > 0)
    wanted = wanted | (stride > 0) & ((key // block + phase) % stride.clamp(min=1) == 0)
    shape["window"] = None
    wanted = wanted & position_mask(shape)
    shape["window"] = spans[1]
    assert torch.equal(pairs(stream, shape, unit)[0], wanted)
    no_longer_than(stream)


SIZES = {"Bp": 1, "Hp": 1, "block_q": 64, "q_len": 64, "k_len": 128}


@pytest.mark.parametrize(
    ("ptr", "start", "change", "message"),
    [
        ([0, 2], [1, 0], {}, "ascending starts"),
        ([0, 1], [-1], {}, "ascending starts"),
        ([0, 3], [0, 1], {}, "range_ptr: expected to rise from 0 to 2"),
        ([0, 1, 2], [0, 1], {}, "range_ptr: 3 entries, expected 2"),
        ([0, 2], [0, 1], {"length": torch.tensor([1])}, "length: 1 entries, expected 2"),
        ([0, 2], [0, 1], {"length": 70, "separate": True}, "overlaps"),
        ([0, 2], [0, 1], {"unit": 0}, "unit=0"),
        ([0, 2], [0, 1], {"block_q": 600}, "block_q=600"),
        ([0, 2], [0, 1], {"window": 0}, "window=0"),
        ([0, 2], [0, 1], {"token": torch.tensor([1])}, "token: expected with token_ptr"),
        (
            [0, 2],
            [0, 1],
            {"token": torch.tensor([127, 126]), "token_ptr": torch.tensor([0, 2])},
            "expected ascending ones",
        ),
    ],
)
@pytest.mark.parametrize("mode", ["native", "reference"])
def test_bad_ranges_are_named(
    ptr: list[int],
    start: list[int],
    change: dict[str, Any],
    message: str,
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AEROGEL_KERNELS", mode)
    arguments: dict[str, Any] = {"length": 32, "unit": 32, **SIZES, **change}
    length = arguments.pop("length")
    with pytest.raises(ValueError, match=message):
        lower_ranges(torch.tensor(ptr), torch.tensor(start), length, **arguments)
