"""Layers of random weights for plans, and how a plan is built from them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from aerogel.kernels import BlockRowWeight, Plan, PlanBuilder, SpmmVariant, Value

Build = Callable[[PlanBuilder], None]


def depthwise(b: PlanBuilder, x: Value, kernel: int, stride: int, padding: int) -> Value:
    weight = torch.randn(x.shape[0], 1, kernel, kernel) / kernel
    return b.conv2d(
        x, weight, torch.randn(x.shape[0]), stride, padding, groups=x.shape[0], activation="relu6"
    )


def pointwise(
    b: PlanBuilder, x: Value, rows: int, variant: SpmmVariant, residual: Value | None = None
) -> Value:
    weight = torch.randn(rows, x.shape[0]) * (torch.rand(rows, x.shape[0]) < 0.4)
    return b.sparse_conv1x1(
        x, BlockRowWeight.pack(weight, block=1), torch.randn(rows), activation="none",
        residual=residual, variant=variant,
    )  # fmt: skip


def sparse_conv(
    b: PlanBuilder,
    x: Value,
    rows: int,
    variant: SpmmVariant,
    residual: Value | None = None,
    kernel: int = 3,
    padding: int = 1,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
) -> Value:
    columns = x.shape[0] // groups * kernel * kernel
    weight = torch.randn(rows, columns) * (torch.rand(rows, columns) < 0.4) / kernel
    return b.sparse_conv2d(
        x, BlockRowWeight.pack(weight, block=1), kernel, torch.randn(rows), stride, padding,
        dilation, groups, "relu", residual, variant,
    )  # fmt: skip


def built(build: Build, threads: int, batch: int = 1) -> Plan:
    """With the same weights every time; made for, and to be run by, so many threads of torch."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    b = PlanBuilder(batch)
    build(b)
    return b.build()
