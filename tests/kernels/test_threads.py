"""Every kernel on several threads, and calls from several threads at once, give the bits of one.

`make test-threads` runs this file under ThreadSanitizer, which sees races that do not happen
to change a bit.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from attention_cases import random_case
from torch import Tensor

from aerogel import kernels
from aerogel.kernels import (
    BlockRowWeight,
    PlanBuilder,
    attention_backward,
    attention_forward,
    gemv,
    sddmm,
    sparse_conv2d,
    spmm,
)

pytestmark = pytest.mark.skipif(not kernels.native_available(), reason="native kernels not built")

Call = Callable[[int], Tensor]  # threads -> result


def sparse(*shape: int, density: float = 0.3) -> Tensor:
    return torch.where(torch.rand(*shape) < density, torch.randn(*shape), torch.zeros(()))


def product(layout: str, block: int) -> Call:
    weight = BlockRowWeight.pack(sparse(70, 45), block)
    x = torch.randn(2, 45, 67) if layout == "channels" else torch.randn(2, 67, 45)
    bias = torch.randn(70)
    return lambda threads: spmm(x, weight, bias, layout=layout, activation="relu", threads=threads)


def convolution(stride: int) -> Call:
    weight = BlockRowWeight.pack(sparse(34, 9 * 11), 4)
    x = torch.randn(2, 11, 17, 19)
    return lambda threads: sparse_conv2d(
        x, weight, kernel_size=3, stride=stride, padding=1, threads=threads
    )


def few_vectors(tokens: int, dtype: torch.dtype) -> Call:
    weight = BlockRowWeight.pack(sparse(700, 900, density=0.1), 1, dtype=dtype)
    x = torch.randn(tokens, 900)
    return lambda threads: gemv(x, weight, threads=threads)


def weight_gradient(layout: str, block: int) -> Call:
    weight = BlockRowWeight.pack(sparse(130, 161, density=0.1), block)
    shapes = ((2, 130, 70), (2, 161, 70))
    grad, x = (torch.randn(s if layout == "channels" else (s[0], s[2], s[1])) for s in shapes)
    return lambda threads: sddmm(grad, x, weight, layout=layout, threads=threads)


def attention(q_len: int, k_len: int, heads: tuple[int, int]) -> Call:
    case = random_case(q_len=q_len, k_len=k_len, heads=heads, window="one", batch=2)
    return lambda threads: torch.cat(
        [t.flatten() for t in attention_forward(*case.arguments(), **case.options, threads=threads)]
    )


def attention_gradients(heads: tuple[int, int], plan_heads: str) -> Call:
    case = random_case(heads=heads, k_len=200, bias=True, plan_heads=plan_heads)
    o, lse = attention_forward(*case.arguments(), **case.options)
    do = torch.randn_like(o)

    def call(threads: int) -> Tensor:
        gradients = attention_backward(
            *case.arguments(), o, lse, do, **case.options, threads=threads
        )
        return torch.cat([t.flatten() for t in gradients if t is not None])

    return call


def image_plan(batch: int) -> Call:
    """What MobileNets and ResNets are made of; batch 3 on two threads has two images and a rest."""
    b = PlanBuilder(batch, 1)
    x = b.input((3, 20, 20))
    y = b.conv2d(x, torch.randn(16, 3, 3, 3) / 5, None, 2, 1, activation="relu")
    y = b.conv2d(y, torch.randn(16, 1, 3, 3) / 3, None, 1, 1, groups=16)
    z = b.sparse_conv1x1(y, BlockRowWeight.pack(sparse(16, 16)), torch.randn(16), "relu")
    z = b.sparse_conv2d(
        z, BlockRowWeight.pack(sparse(16, 144)), 3, None, 1, 1, activation="relu", residual=y
    )
    z = b.max_pool2d(b.add(z, y), 2, 2)
    b.output(b.linear(b.global_avg_pool(z), torch.randn(10, 16)))
    return planned(b, torch.randn(batch, 3, 20, 20))


def token_plan(batch: int) -> Call:
    b = PlanBuilder(batch, 1)
    x = b.input((14, 12), layout="tokens")
    q, k, v = (b.linear(x, torch.randn(12, 12) / 4) for _ in range(3))
    y = b.layer_norm(b.add(b.attention(q, k, v, 3), x))
    y = b.sparse_conv1x1(y, BlockRowWeight.pack(sparse(12, 12)), torch.randn(12), "gelu")
    b.output(b.layer_norm(y), layout="tokens")
    return planned(b, torch.randn(batch, 14, 12))


def planned(builder: PlanBuilder, x: Tensor) -> Call:
    plan = builder.build()

    def call(threads: int) -> Tensor:
        plan.threads = threads
        return plan.run([x])[0]

    return call


CALLS: dict[str, Callable[[], Call]] = {
    "spmm, channels": lambda: product("channels", 1),
    "spmm, channels, blocks": lambda: product("channels", 4),
    "spmm, tokens": lambda: product("tokens", 1),
    "spmm, tokens, blocks": lambda: product("tokens", 4),
    "sparse conv": lambda: convolution(1),
    "sparse conv, strided": lambda: convolution(2),
    "gemv": lambda: few_vectors(1, torch.float32),
    "gemv, int8": lambda: few_vectors(5, torch.int8),
    "gemv, bfloat16": lambda: few_vectors(2, torch.bfloat16),
    "sddmm, channels": lambda: weight_gradient("channels", 1),
    "sddmm, tokens": lambda: weight_gradient("tokens", 4),
    "attention": lambda: attention(90, 130, (4, 2)),
    "attention, decoding": lambda: attention(2, 5000, (4, 2)),
    "attention, gradients": lambda: attention_gradients((4, 2), "one"),
    "attention, gradients of one head": lambda: attention_gradients((2, 1), "q"),
    "images one by one": lambda: image_plan(1),
    "images together": lambda: image_plan(3),
    "tokens": lambda: token_plan(1),
    "tokens together": lambda: token_plan(5),
}


@pytest.mark.parametrize("make", CALLS.values(), ids=CALLS.keys())
@torch.no_grad()
def test_threads_give_the_bits_of_one(make: Callable[[], Call]) -> None:
    torch.manual_seed(0)
    call = make()
    expected = call(1)
    for threads in (2, 3, 2):
        assert torch.equal(call(threads), expected), f"{threads} threads"


@pytest.mark.parametrize("make", CALLS.values(), ids=CALLS.keys())
@torch.no_grad()
def test_calls_from_several_threads_give_the_bits_of_one(make: Callable[[], Call]) -> None:
    torch.manual_seed(0)
    call = make()
    expected = call(1)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(call, [2] * 12))
    assert all(torch.equal(got, expected) for got in results)
