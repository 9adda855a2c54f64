"""The layers of a plan over sequences: normalisation, attention, columns cut out and put together.

A value holds the tokens of one sequence as its columns, (features, tokens), or those of several
sequences of one length after each other: (features, sequences * tokens).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from aerogel.kernels._library import native
from aerogel.kernels.layers import Layer, Shape, address, planar


@dataclass(frozen=True)
class Constant(Layer):
    """A tensor of the plan itself, the same for every image."""

    kind: ClassVar[str] = "constant"
    data: Tensor
    batch: int

    def output_shape(self, *shapes: Shape) -> Shape:
        return tuple(self.data.shape)

    def reference(self, *inputs: Tensor) -> Tensor:
        return self.data.expand(self.batch, *self.data.shape)

    def emit(self, builder: Any, inputs: Sequence[int], name: str) -> int:
        return builder.constant(address(self.data), *planar(self.data.shape), self.data.dim() == 1)

    def flops(self, output: Shape) -> int:
        return 0


@dataclass(frozen=True)
class LayerNorm(Layer):
    """Every column to mean 0 and variance 1, then weight and bias per feature."""

    kind: ClassVar[str] = "layer_norm"
    weight: Tensor | None
    bias: Tensor | None
    epsilon: float

    def output_shape(self, *shapes: Shape) -> Shape:
        (shape,) = shapes
        for name, each in (("weight", self.weight), ("bias", self.bias)):
            if each is not None and tuple(each.shape) != shape[:1]:
                raise ValueError(f"{name}: shape {tuple(each.shape)}, expected {shape[:1]}")
        return shape

    def reference(self, *inputs: Tensor) -> Tensor:
        x = inputs[0].movedim(1, -1)
        y = torch.nn.functional.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.epsilon)
        return y.movedim(-1, 1)

    def emit(self, builder: Any, inputs: Sequence[int], name: str) -> int:
        weight, bias = address(self.weight), address(self.bias)
        return builder.layer_norm(inputs[0], weight, bias, self.epsilon, name)

    def flops(self, output: Shape) -> int:
        return 8 * math.prod(output)

    @property
    def weight_bytes(self) -> int:
        return 4 * sum(each.numel() for each in (self.weight, self.bias) if each is not None)


@dataclass(frozen=True)
class HeadRows:
    """Where heads lie in a value: `count` heads of `size` rows each, from row `first` on."""

    count: int
    size: int
    first: int = 0

    def check(self, name: str, shape: Shape) -> None:
        """ValueError unless a value of this shape has these rows."""
        end = self.first + self.count * self.size
        if len(shape) != 2 or min(self.count, self.size) < 1 or not 0 <= self.first < end:
            raise ValueError(f"{name}: shape {shape}, expected (features, tokens) with {self}")
        if end > shape[0]:
            raise ValueError(f"{name}: {shape[0]} features, expected {end} for {self}")

    def split(self, x: Tensor, sequences: int) -> Tensor:
        """(batch, features, columns) to (batch, sequences, count, tokens, size)."""
        rows = x[:, self.first : self.first + self.count * self.size]
        heads = rows.unflatten(1, (self.count, self.size)).unflatten(3, (sequences, -1))
        return heads.permute(0, 3, 1, 4, 2)


@dataclass(frozen=True)
class Attention(Layer):
    """v softmax(k^T q * scale + mask) for every sequence and head.

    Attributes:
        q: heads of the first input.
        k: of the second; `q.count` is a multiple of `k.count`, neighbouring heads share a key.
        v: of the third, as many as `k`.
        sequences: in the columns of every input.
        scale: of the scores.
        empty_is_zero: what a query gives that sees no key (its mask is all -inf): zeros, as
            `scaled_dot_product_attention` does, or NaN, as softmax does.
        mask: (sequences or 1, heads or 1, queries or 1) of the fourth input, which is
            (keys, the product of these); None without it.
    """

    kind: ClassVar[str] = "attention"
    q: HeadRows
    k: HeadRows
    v: HeadRows
    sequences: int
    scale: float
    empty_is_zero: bool
    mask: tuple[int, int, int] | None

    def output_shape(self, *shapes: Shape) -> Shape:
        q, k, v, *mask = shapes
        for name, heads, shape in (("q", self.q, q), ("k", self.k, k), ("v", self.v, v)):
            heads.check(name, shape)
            if shape[1] % self.sequences:
                raise ValueError(f"{name}: {shape[1]} columns, expected {self.sequences} sequences")
        if self.k.size != self.q.size or self.k.count != self.v.count:
            raise ValueError(f"k: {self.k}, expected the head size of {self.q}, heads of {self.v}")
        if self.q.count % self.k.count or k[1] != v[1]:
            raise ValueError(f"k: {k[1]} tokens in {self.k.count} heads do not fit q {q} and v {v}")
        self._check_mask(q[1] // self.sequences, k[1] // self.sequences, mask)
        return (self.q.count * self.v.size, q[1])

    def _check_mask(self, queries: int, keys: int, mask: list[Shape]) -> None:
        if (self.mask is None) != (not mask):
            raise ValueError("mask: expected its value and what its columns are, or neither")
        if self.mask is None:
            return
        full = (self.sequences, self.q.count, queries)
        if any(n not in (1, most) for n, most in zip(self.mask, full, strict=True)):
            raise ValueError(f"mask: columns {self.mask}, expected each of {full} or 1")
        if mask[0] != (keys, math.prod(self.mask)):
            raise ValueError(f"mask: shape {mask[0]}, expected {(keys, math.prod(self.mask))}")

    def reference(self, *inputs: Tensor) -> Tensor:
        q, k, v, *mask = inputs
        of_q, of_k = self.q.split(q, self.sequences), self.k.split(k, self.sequences)
        of_v = self.v.split(v, self.sequences)
        shared = self.q.count // self.k.count
        of_k, of_v = (each.repeat_interleave(shared, 2) for each in (of_k, of_v))
        scores = of_q @ of_k.transpose(-1, -2) * self.scale
        if mask and self.mask is not None:
            scores = scores + mask[0].transpose(1, 2).unflatten(1, self.mask)
        weights = scores.softmax(-1)
        if self.empty_is_zero:
            empty = (scores == -math.inf).all(-1, keepdim=True)
            weights = torch.where(empty, weights.new_zeros(()), weights)
        y = (weights @ of_v).permute(0, 2, 4, 1, 3)  # [batch, heads, size, sequences, queries]
        return y.reshape(y.shape[0], self.q.count * self.v.size, -1)

    def emit(self, builder: Any, inputs: Sequence[int], name: str) -> int:
        shape = native().AttentionShape()
        shape.heads, shape.groups = self.q.count, self.q.count // self.k.count
        shape.head_dim, shape.value_dim = self.q.size, self.v.size
        shape.q_row, shape.k_row, shape.v_row = self.q.first, self.k.first, self.v.first
        shape.sequences, shape.scale = self.sequences, self.scale
        shape.empty_is_zero = self.empty_is_zero
        per_sequence, per_head, per_query = (n > 1 for n in self.mask or (1, 1, 1))
        shape.mask_per_sequence, shape.mask_per_head = per_sequence, per_head
        shape.mask_per_query = per_query
        return builder.attention(list(inputs), shape, name)

    def attention_flops(self, queries: int, keys: int) -> int:
        """Two products per score."""
        per_score = 2 * (self.q.size + self.v.size)
        return self.sequences * self.q.count * queries * keys * per_score

    def flops(self, output: Shape) -> int:
        tokens = output[1] // self.sequences
        return self.attention_flops(tokens, tokens)


@dataclass(frozen=True)
class Columns(Layer):
    """Columns start, start + step, ...: `count` of them, or as a vector where `count` is None."""

    kind: ClassVar[str] = "columns"
    start: int
    step: int
    count: int | None

    def output_shape(self, *shapes: Shape) -> Shape:
        (shape,) = shapes
        last = self.start + ((self.count or 1) - 1) * self.step
        if len(shape) != 2 or min(self.start, self.step - 1) < 0 or not 0 <= last < shape[1]:
            raise ValueError(
                f"start={self.start}, step={self.step}, count={self.count}: expected columns of a "
                f"(features, tokens) value, got shape {shape}"
            )
        return shape[:1] if self.count is None else (shape[0], self.count)

    def reference(self, *inputs: Tensor) -> Tensor:
        x = inputs[0]
        if self.count is None:
            return x[..., self.start]
        return x[..., self.start :: self.step][..., : self.count]

    def emit(self, builder: Any, inputs: Sequence[int], name: str) -> int:
        y = builder.columns(inputs[0], self.start, self.step, self.count or 1, name)
        return y

    def flops(self, output: Shape) -> int:
        return 0


@dataclass(frozen=True)
class Concat(Layer):
    """The columns of all inputs side by side."""

    kind: ClassVar[str] = "concat"

    def output_shape(self, *shapes: Shape) -> Shape:
        if not shapes or any(len(s) > 2 or s[0] != shapes[0][0] for s in shapes):
            raise ValueError(f"parts: shapes {shapes}, expected (features, tokens) or (features,)")
        return (shapes[0][0], sum(math.prod(s[1:]) for s in shapes))

    def reference(self, *inputs: Tensor) -> Tensor:
        return torch.cat([x.flatten(2) if x.dim() > 2 else x.unsqueeze(-1) for x in inputs], -1)

    def emit(self, builder: Any, inputs: Sequence[int], name: str) -> int:
        return builder.concat(list(inputs), name)

    def flops(self, output: Shape) -> int:
        return 0
