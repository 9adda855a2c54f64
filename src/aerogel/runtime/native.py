"""From a segment of the graph to one native plan: which operators the executor knows, and how."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from aerogel import kernels
from aerogel.runtime import graph, ops
from aerogel.runtime.candidates import Candidate
from aerogel.runtime.layer import Layer, epilogue, is_layer, plain_arguments
from aerogel.runtime.segments import EITHER, SPATIAL, TOKENS, Segment

aten = torch.ops.aten

# Steps of a plan's profile that bring values in and out.
_TRANSFERS = ("input", "output")


class PlanModule(nn.Module):
    """A native plan as a module: tensors in, the segment's output or a tuple of outputs out."""

    def __init__(self, plan: Any, input_shapes: list[tuple[int, ...]], outputs: list[fx.Node]):
        super().__init__()
        self.plan = plan
        self._input_shapes = input_shapes
        self._output_shapes = [graph.shape(node) for node in outputs]

    def forward(self, *inputs: Tensor) -> Any:
        """Run the plan and give results the shapes that torch would give them."""
        given = [x.reshape(shape) for x, shape in zip(inputs, self._input_shapes, strict=True)]
        results = [
            y.view(shape)
            for y, shape in zip(self.plan.run(given), self._output_shapes, strict=True)
        ]
        return results[0] if len(results) == 1 else tuple(results)

    def profile(self, inputs: list[Tensor]) -> list[tuple[str, float]]:
        """Seconds of each step of one run."""
        given = [x.reshape(shape) for x, shape in zip(inputs, self._input_shapes, strict=True)]
        return list(self.plan.profile(given))


@dataclass
class Emission:
    """A plan under construction: the builder, the values so far, the kernel chosen per layer."""

    builder: Any
    family: str
    chosen: Mapping[fx.Node, Candidate]
    values: dict[fx.Node, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NativeOp:
    """How one operator enters a plan.

    Attributes:
        family: (node) -> the segment family it needs, or None if this call cannot be native.
        emit: (emission, node) -> the plan's value.
    """

    family: Callable[[fx.Node], str | None]
    emit: Callable[[Emission, fx.Node], Any]


def build_plan(segment: Segment, chosen: Mapping[fx.Node, Candidate], threads: int) -> PlanModule:
    """Emit a segment into one plan.

    Args:
        segment: Nodes that `family_of` accepts.
        chosen: A candidate with `emit` for each of the segment's layers.
        threads: Of the parallel region.
    """
    inputs, outputs = segment.inputs, segment.outputs
    batch = 1 if segment.family == TOKENS else graph.shape(segment.nodes[0])[0]
    builder = kernels.PlanBuilder(batch=batch, threads=threads)
    emission = Emission(builder, segment.family, chosen)
    shapes = []
    for source in inputs:
        value, shape = _declare_input(builder, segment.family, graph.shape(source))
        emission.values[source] = value
        shapes.append(shape)
    for node in segment.nodes:
        emission.values[node] = NATIVE_OPS[node.target].emit(emission, node)
    for node in outputs:
        _declare_output(builder, segment.family, emission.values[node])
    return PlanModule(builder.build(), shapes, outputs)


class LayerProbe:
    """A plan of a single layer, to time its kernel under a plan's conditions.

    Args:
        layer: The layer.
        candidate: Its kernel, with `emit`.
        threads: Of the parallel region.
    """

    def __init__(self, layer: Layer, candidate: Candidate, threads: int) -> None:
        if candidate.emit is None:
            raise ValueError(f"{candidate.name} cannot run inside a plan")
        family = TOKENS if layer.op == "linear" else SPATIAL
        batch = 1 if family == TOKENS else layer.input_shape[0]
        builder = kernels.PlanBuilder(batch=batch, threads=threads)
        x, self._input_shape = _declare_input(builder, family, layer.input_shape)
        residual = self._residual_shape = None
        if layer.has_residual:
            residual, self._residual_shape = _declare_input(builder, family, layer.output_shape)
        _declare_output(builder, family, candidate.emit(builder, x, residual))
        self._plan = builder.build()

    def kernel_seconds(self, x: Tensor, residual: Tensor | None) -> Callable[[], float]:
        """A callable that runs the plan once and returns what the layer's own steps took."""
        given = [x.reshape(self._input_shape)]
        if residual is not None and self._residual_shape is not None:
            given.append(residual.reshape(self._residual_shape))

        def run() -> float:
            steps = self._plan.profile(given)
            return sum(seconds for name, seconds in steps if name not in _TRANSFERS)

        return run


def _declare_output(builder: Any, family: str, value: Any) -> None:
    if family == TOKENS:
        builder.output(value, layout="tokens")
    else:
        builder.output(value)


def _declare_input(
    builder: Any, family: str, shape: tuple[int, ...]
) -> tuple[Any, tuple[int, ...]]:
    if family == TOKENS:
        tokens = (math.prod(shape[:-1]), shape[-1])
        return builder.input(tokens, layout="tokens"), (1, *tokens)
    per_image = shape[1:]
    if per_image[1:] == (1, 1):  # pooled planes travel as features
        per_image = per_image[:1]
    return builder.input(per_image), (shape[0], *per_image)


def family_of(node: fx.Node, chosen: Mapping[fx.Node, Candidate]) -> str | None:
    """The family of a node that can run natively, None for one that stays in torch."""
    if node.op != "call_function" or node.target not in NATIVE_OPS:
        return None
    if is_layer(node) and (node not in chosen or chosen[node].emit is None):
        return None
    if not graph.is_float32(node):
        return None
    return NATIVE_OPS[node.target].family(node)


def _emit_layer(emission: Emission, node: fx.Node) -> Any:
    candidate = emission.chosen[node]
    assert candidate.emit is not None
    _, residual = epilogue(node)
    x = emission.values[plain_arguments(node)[0]]
    added = None if residual is None else emission.values[residual]
    return candidate.emit(emission.builder, x, added)


def _linear_family(node: fx.Node) -> str | None:
    return EITHER if len(graph.shape(node)) == 2 else TOKENS


def _elementwise_family(node: fx.Node) -> str | None:
    rank = len(graph.shape(node))
    return EITHER if rank == 2 else SPATIAL if rank == 4 else TOKENS if rank == 3 else None


def _same_shapes(node: fx.Node) -> str | None:
    operands = node.args[:2]
    if not all(isinstance(each, fx.Node) and each.op != "get_attr" for each in operands):
        return None
    if any(graph.shape(each) != graph.shape(node) for each in operands):  # type: ignore[arg-type]
        return None
    plain = graph.arguments(node).get("alpha", 1) == 1
    all_float = all(graph.is_float32(each) for each in operands)  # type: ignore[arg-type]
    return _elementwise_family(node) if plain and all_float else None


def _emit_pair(method: str) -> Callable[[Emission, fx.Node], Any]:
    def emit(emission: Emission, node: fx.Node) -> Any:
        left, right = (emission.values[each] for each in node.args[:2])  # type: ignore[index]
        return getattr(emission.builder, method)(left, right)

    return emit


def _emit_activation(emission: Emission, node: fx.Node) -> Any:
    x, kind = node.args
    return emission.builder.activation(emission.values[x], kind)  # type: ignore[index]


def _global_pool_family(node: fx.Node) -> str | None:
    rank_four = len(graph.shape(node.args[0])) == 4  # type: ignore[arg-type]
    args = graph.arguments(node)
    if node.target is aten.mean.dim:
        axes = sorted(axis % 4 for axis in args["dim"] or ()) if rank_four else []
        return SPATIAL if axes == [2, 3] and args["dtype"] is None else None
    return SPATIAL if rank_four and list(args["output_size"]) in ([1], [1, 1]) else None


def _emit_global_pool(emission: Emission, node: fx.Node) -> Any:
    return emission.builder.global_avg_pool(emission.values[node.args[0]])  # type: ignore[index]


def _flatten_family(node: fx.Node) -> str | None:
    """(batch, C, H, W) -> (batch, C * H * W), however it is spelled."""
    before, after = graph.shape(node.args[0]), graph.shape(node)  # type: ignore[arg-type]
    flat = (before[0], math.prod(before[1:]))
    return SPATIAL if len(before) == 4 and after == flat else None


def _emit_flatten(emission: Emission, node: fx.Node) -> Any:
    source: Any = node.args[0]
    x = emission.values[source]
    pooled = graph.shape(source)[2:] == (1, 1)
    return x if pooled else emission.builder.flatten(x)


NATIVE_OPS: dict[Any, NativeOp] = {
    ops.conv2d: NativeOp(lambda node: SPATIAL, _emit_layer),
    ops.linear: NativeOp(_linear_family, _emit_layer),
    ops.activation: NativeOp(_elementwise_family, _emit_activation),
    aten.add.Tensor: NativeOp(_same_shapes, _emit_pair("add")),
    aten.mul.Tensor: NativeOp(_same_shapes, _emit_pair("mul")),
    aten.adaptive_avg_pool2d.default: NativeOp(_global_pool_family, _emit_global_pool),
    aten.mean.dim: NativeOp(_global_pool_family, _emit_global_pool),
    aten.flatten.using_ints: NativeOp(_flatten_family, _emit_flatten),
    aten.view.default: NativeOp(_flatten_family, _emit_flatten),
    aten.reshape.default: NativeOp(_flatten_family, _emit_flatten),
}
