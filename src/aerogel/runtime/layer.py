"""One convolution or linear layer of the captured graph, as the tuner and the candidates see it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from aerogel import kernels
from aerogel.runtime import graph, ops
from aerogel.runtime.detect import Zeros, detect_zeros

# How many arguments each fused op takes before its (activation, residual).
_PLAIN_ARGUMENTS: dict[Any, int] = {ops.conv2d: 7, ops.linear: 3}


# Tokens that go through a whole plan together, so that what lies between layers stays in L2.
_MAX_TILE, _MIN_TILE = 128, 32


def token_tile(tokens: int) -> int:
    """The largest divisor of a number of tokens that makes a good tile; else all of them."""
    for tile in range(min(tokens, _MAX_TILE), _MIN_TILE - 1, -1):
        if tokens % tile == 0:
            return tile
    return tokens


def sequence_tile(batch: int, tokens: int) -> int:
    """How many sequences of so many tokens go through a plan together; a divisor of the batch."""
    most = min(max(1, _MAX_TILE // tokens), batch)
    return next(count for count in range(most, 0, -1) if batch % count == 0)


def is_layer(node: Any) -> bool:
    """Whether the node is one of the fused layer ops."""
    return isinstance(node, fx.Node) and node.target in _PLAIN_ARGUMENTS


def plain_arguments(node: fx.Node) -> tuple[Any, ...]:
    """The layer's arguments without its epilogue."""
    return node.args[: _PLAIN_ARGUMENTS[node.target]]


def epilogue(node: fx.Node) -> tuple[str, fx.Node | None]:
    """The layer's (activation, residual)."""
    given: list[Any] = list(node.args[_PLAIN_ARGUMENTS[node.target] :])
    kind = given[0] if given else "none"
    residual = given[1] if len(given) > 1 else None
    return kind, residual


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer with its weight and the shapes it meets on the example.

    Attributes:
        name: Path of the module, as `named_modules` spells it.
        op: "conv2d" or "linear"; the registry of candidates is keyed by it.
        weight: (out, in) or (out, in / groups, kh, kw).
        bias: (out,) or None.
        activation: A name of `ops.IN_PLACE`.
        has_residual: Whether a tensor of the output's shape is added before the activation.
        input_shape: Of the example, e.g. (batch, in, height, width) or (batch, tokens, in).
        output_shape: Likewise.
        in_sequences: Whether its tokens also meet each other, in an attention of the same graph.
    """

    name: str
    op: str
    weight: Tensor
    bias: Tensor | None
    activation: str
    has_residual: bool
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    in_sequences: bool = False

    @cached_property
    def zeros(self) -> Zeros:
        """The pattern of the weight's zeros."""
        return detect_zeros(self.weight)

    @cached_property
    def matrix(self) -> Tensor:
        """The weight as (out, inputs of one output)."""
        return self.weight.detach().flatten(1).contiguous()

    @property
    def is_pointwise(self) -> bool:
        """Whether the layer is one matrix product over its pixels or tokens."""
        if self.op == "linear":
            return True
        return (
            tuple(self.weight.shape[2:]) == (1, 1)
            and self.stride == (1, 1)
            and self.padding == (0, 0)
            and self.groups == 1
        )

    @property
    def layout(self) -> str:
        """ "channels" where features are planes, "tokens" where a token's features lie together."""
        return "channels" if self.op == "conv2d" else "tokens"

    @property
    def has_tokens(self) -> bool:
        """Whether a linear layer is applied to tokens, not to one vector per image."""
        return self.op == "linear" and len(self.output_shape) > 2

    @property
    def images(self) -> int:
        """Size of the batch."""
        return self.output_shape[0]

    @property
    def columns(self) -> int:
        """Pixels of one image, or tokens of the whole batch."""
        sizes = self.output_shape[2:] if self.op == "conv2d" else self.output_shape[:-1]
        return math.prod(sizes)

    @property
    def planned_columns(self) -> int:
        """Columns that a plan works on at a time."""
        if self.in_sequences:
            batch, tokens = self.output_shape[:2]
            return tokens * sequence_tile(batch, tokens)
        return token_tile(self.columns) if self.has_tokens else self.columns

    def images_together(self, threads: int | None) -> int:
        """Images that a plan may see as one, side by side."""
        if self.op != "conv2d" or kernels.native_in_use() is None:
            return 1
        keeps_size = self.input_shape[2:] == self.output_shape[2:] and self.stride == (1, 1)
        picked = tuple(self.weight.shape[2:]) == (1, 1) and self.padding == (0, 0)
        if not keeps_size and not picked:
            return 1
        return kernels.images_together(self.columns, self.images, threads)

    @property
    def macs(self) -> int:
        """Multiply-adds of the dense layer on the example."""
        return self.weight[0].numel() * math.prod(self.output_shape)

    def signature(self) -> list[Any]:
        """What its speed depends on, for the tuning cache; sparsity to the nearest percent."""
        return [
            self.op,
            list(self.weight.shape),
            list(self.input_shape),
            [*self.stride, *self.padding, *self.dilation, self.groups],
            self.bias is not None,
            self.activation,
            self.has_residual,
            self.planned_columns * self.images_together(1),
            round(self.zeros.sparsity, 2),
            self.zeros.pattern,
            self.zeros.block,
        ]

    def example(self) -> tuple[Tensor, Tensor | None]:
        """Random activations (input, residual) of the example's shapes, the same every time."""
        generator = torch.Generator().manual_seed(0)
        shapes = self.input_shape, self.output_shape
        x, residual = (
            torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
            for shape in shapes
        )
        return x, residual if self.has_residual else None


def read_layer(gm: fx.GraphModule, node: fx.Node) -> Layer | None:
    """Describe a fused layer node; None where weights are not float32 constants, or nothing is
    computed: of an empty batch or sequence.
    """
    plain = plain_arguments(node)
    weight, bias = graph.constant(gm, plain[1]), graph.constant(gm, plain[2])
    if weight is None or (plain[2] is not None and bias is None):
        return None
    if weight.dtype != torch.float32 or not (graph.is_float32(plain[0]) and graph.is_float32(node)):
        return None
    if 0 in graph.shape(plain[0]) or 0 in graph.shape(node):
        return None
    activation, residual = epilogue(node)
    geometry = {}
    if node.target is ops.conv2d:
        geometry = dict(zip(("stride", "padding", "dilation", "groups"), plain[3:], strict=True))
    return Layer(
        name=node.meta.get("layer", node.name),
        op="conv2d" if node.target is ops.conv2d else "linear",
        weight=weight,
        bias=bias,
        activation=activation,
        has_residual=residual is not None,
        input_shape=graph.shape(plain[0]),
        output_shape=graph.shape(node),
        in_sequences=_in_sequences(gm, node),
        **geometry,
    )


def _in_sequences(gm: fx.GraphModule, node: fx.Node) -> bool:
    shape = graph.shape(node)
    if node.target is not ops.linear or len(shape) != 3:
        return False
    return any(graph.shape(each)[:2] == shape[:2] for each in graph.calls(gm, ops.attention))
