"""Random attention calls: shapes, streams of every kind of tile, rules and strides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from aerogel.kernels.attention_call import EDGE, GATHER, NO_WINDOW

HEADS = ((1, 1), (2, 2), (4, 2), (6, 2), (8, 1))  # query and key heads
LENGTHS = (1, 2, 5, 7, 8, 9, 31, 64, 65, 100)
DIMS = (1, 3, 8, 16, 20, 33, 64, 96)


@dataclass
class Case:
    """One call: tensors, stream, and keyword arguments."""

    q: Tensor
    k: Tensor
    v: Tensor
    stream: list[Tensor | None]
    options: dict[str, Any] = field(default_factory=dict)

    def arguments(self) -> tuple[Any, ...]:
        return (self.q, self.k, self.v, *self.stream)

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers in another dtype."""
        tensors = (t.to(dtype) for t in (self.q, self.k, self.v))
        return Case(*tensors, self.stream, self.options)


def random_stream(
    rows: int, k_len: int, density: float, bias: bool, g: torch.Generator
) -> list[Tensor | None]:
    """Tiles of every kind and length; no key twice in a row."""
    ptr, kinds, starts, lengths, gathers = [0], [], [], [], []
    for _ in range(rows):
        at = 0
        while at < k_len:
            length = min(int(torch.randint(1, 65, (), generator=g)), k_len - at)
            if float(torch.rand((), generator=g)) < density:
                kind = int(torch.randint(0, 8, (), generator=g))
                if kind & GATHER:
                    chosen = at + torch.arange(length)[torch.rand(length, generator=g) < 0.6]
                    starts.append(len(gathers))
                    gathers += chosen.tolist()
                    length_now = len(chosen)
                else:
                    starts.append(at)
                    length_now = length
                kinds.append(kind if kind & EDGE else kind & ~NO_WINDOW)
                lengths.append(length_now)
            at += length
        ptr.append(len(kinds))
    return [
        torch.tensor(ptr, dtype=torch.int64),
        torch.tensor(kinds, dtype=torch.uint8),
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(lengths, dtype=torch.int16),
        torch.tensor(gathers, dtype=torch.int32),
        torch.randn(len(kinds), generator=g) if bias else None,
    ]


def random_tensor(shape: tuple[int, ...], layout: str, g: torch.Generator) -> Tensor:
    """(B, H, L, D) with heads outside or inside of rows, or rows of something wider."""
    batch, heads, rows, dim = shape
    if layout == "inside":
        return torch.randn(batch, rows, heads, dim, generator=g).transpose(1, 2)
    if layout == "sliced":
        return torch.randn(batch, heads, rows, dim + 3, generator=g)[..., 1 : dim + 1]
    if layout == "columns":  # no unit stride
        return torch.randn(batch, heads, dim, rows, generator=g).mT
    return torch.randn(shape, generator=g)


def random_case(
    *,
    heads: tuple[int, int] = (4, 2),
    batch: int = 1,
    q_len: int = 65,
    k_len: int = 100,
    dim: int = 16,
    value_dim: int = 16,
    block_q: int = 16,
    plan_batch: bool = False,
    plan_heads: str = "q",
    density: float = 0.5,
    causal: bool = True,
    window: str = "none",
    bias: bool = False,
    padding: bool = False,
    softcap: float | None = None,
    sink: bool = False,
    layout: str = "plain",
    seed: int = 0,
) -> Case:
    g = torch.Generator().manual_seed(seed)
    q_heads, kv_heads = heads
    plan = (batch if plan_batch else 1, {"one": 1, "kv": kv_heads, "q": q_heads}[plan_heads])
    rows = plan[0] * plan[1] * -(-q_len // block_q)
    options: dict[str, Any] = {
        "Bp": plan[0],
        "Hp": plan[1],
        "block_q": block_q,
        "causal": causal,
        "softcap": softcap,
    }
    if window == "one":
        options["window"] = 9
    elif window == "heads":
        options["window"] = torch.randint(0, 40, (plan[1],), generator=g)
    elif window == "blocks":
        options |= {"window": torch.randint(0, 4, (plan[1],), generator=g), "window_block": 16}
    if padding:
        options["key_padding"] = torch.rand(batch, k_len, generator=g) < 0.8
    if sink:
        options["sink_logit"] = torch.randn(q_heads, generator=g)
    return Case(
        random_tensor((batch, q_heads, q_len, dim), layout, g),
        random_tensor((batch, kv_heads, k_len, dim), layout, g),
        random_tensor((batch, kv_heads, k_len, value_dim), layout, g),
        random_stream(rows, k_len, density, bias, g),
        options,
    )


def ragged_cases(rows: int, dim: int) -> Iterator[Case]:
    """Query tiles of so many rows, of which the last is short, in every layout of unit stride."""
    for layout in ("plain", "inside", "sliced"):
        yield random_case(
            q_len=2 * rows - 3,
            k_len=2 * rows,
            dim=dim,
            value_dim=113 - dim,
            block_q=rows,
            density=1.0,
            layout=layout,
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    return random_case(
        heads=draw(st.sampled_from(HEADS)),
        batch=draw(st.integers(1, 2)),
        q_len=draw(st.sampled_from(LENGTHS)),
        k_len=draw(st.sampled_from((0, 1, 17, 64, 150))),
        dim=draw(st.sampled_from(DIMS)),
        value_dim=draw(st.sampled_from(DIMS)),
        block_q=draw(st.sampled_from((1, 5, 16, 64))),
        plan_batch=draw(st.booleans()),
        plan_heads=draw(st.sampled_from(("one", "kv", "q"))),
        density=draw(st.sampled_from((0.0, 0.3, 1.0))),
        causal=draw(st.booleans()),
        window=draw(st.sampled_from(("none", "one", "heads", "blocks"))),
        bias=draw(st.booleans()),
        padding=draw(st.booleans()),
        softcap=draw(st.sampled_from((None, None, 2.0))),
        sink=draw(st.booleans()),
        layout=draw(st.sampled_from(("plain", "inside", "sliced", "columns"))),
        seed=draw(st.integers(0, 1000)),
    )
