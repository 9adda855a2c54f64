"""From a segment of the graph to one native plan, and the timing of a layer inside one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, fx, nn

from aerogel import kernels
from aerogel.runtime import graph
from aerogel.runtime.candidates import Candidate
from aerogel.runtime.emission import Emission, is_pooled
from aerogel.runtime.layer import Layer, is_layer, sequence_tile, token_tile
from aerogel.runtime.native_ops import NATIVE_OPS
from aerogel.runtime.native_token_ops import TOKEN_OPS, is_mask
from aerogel.runtime.segments import SEQUENCES, SPATIAL, TOKENS, Segment

Shape = tuple[int, ...]

_OPS = {**NATIVE_OPS, **TOKEN_OPS}


class PlanModule(nn.Module):
    """A native plan as a module: tensors in, the segment's output or a tuple of outputs out.

    Args:
        plan: Takes and returns tensors in its own shapes.
        inputs: Shape of each input as the plan wants it.
        outputs: Shape of each output as torch would give it.
    """

    def __init__(self, plan: kernels.Plan, inputs: list[Shape], outputs: list[Shape]) -> None:
        super().__init__()
        self.plan, self._inputs, self._outputs = plan, inputs, outputs
        as_is = plan.only_shapes is not None and (inputs, outputs) == tuple(
            [shape] for shape in plan.only_shapes
        )
        # `run` of one plain tensor for one (see there), where no shape is changed on the way.
        self.run_plain = plan.run_plain if as_is else None

    def forward(self, *inputs: Tensor) -> Any:
        """Run the plan."""
        results = self.run(*inputs)
        return results[0] if len(results) == 1 else results

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """All outputs, without the detours of a module's call."""
        given = list(map(_shaped, inputs, self._inputs))
        return tuple(map(_shaped, self.plan.run(given), self._outputs))


def _shaped(x: Tensor, shape: Shape) -> Tensor:
    return x if x.shape == shape else x.reshape(shape)


def family_of(node: fx.Node, chosen: Mapping[fx.Node, Candidate]) -> str | None:
    """The family of a node that can run natively, None for one that stays in torch.

    Args:
        node: Any node of the fused graph.
        chosen: The planned candidate of each layer that may enter a plan.
    """
    if node.op != "call_function" or node.target not in _OPS:
        return None
    if (is_layer(node) and node not in chosen) or not graph.is_float32(node):
        return None
    if 0 in graph.shape(node):  # plans compute something
        return None
    return _OPS[node.target].family(node)


def build_plan(
    segment: Segment, chosen: Mapping[fx.Node, Candidate], threads: int | None
) -> PlanModule:
    """Emit a segment into one plan.

    Args:
        segment: Nodes that `family_of` accepts.
        chosen: A candidate with `emit` for each of the segment's layers.
        threads: Of the parallel region; None follows torch's setting at every call.
    """
    images, sequences = _cut(segment)
    builder = kernels.PlanBuilder(batch=images, threads=threads)
    emission = Emission(builder, chosen, sequences)
    shapes = []
    for source in segment.inputs:
        if is_mask(source):
            emission.values[source], shape = _mask_input(builder, graph.shape(source))
        else:
            emission.values[source], shape = _input(builder, segment.family, graph.shape(source))
        shapes.append(shape)
    for node in segment.nodes:
        _emit(emission, node)
    for node in segment.outputs:
        _output(builder, emission.values[node])
    return PlanModule(builder.build(), shapes, [graph.shape(node) for node in segment.outputs])


def _emit(emission: Emission, node: fx.Node) -> None:
    """Append one node."""
    value = _OPS[node.target].emit(emission, node)
    if is_pooled(graph.shape(node)) and len(value.shape) == 3:
        value = emission.builder.flatten(value)
    emission.values[node] = value


def _cut(segment: Segment) -> tuple[int, int]:
    """Images of a segment's plan and sequences in each: images and whole sequences, or tiles."""
    shapes = [graph.shape(node) for node in segment.nodes]
    if segment.family == TOKENS:
        tokens = math.prod(shapes[0][:-1])
        return tokens // token_tile(tokens), 1
    if segment.family == SEQUENCES:
        batch, tokens = next(shape[:2] for shape in shapes if len(shape) == 3)
        sequences = sequence_tile(batch, tokens)
        return batch // sequences, sequences
    return shapes[0][0], 1


def _input(builder: kernels.PlanBuilder, family: str, shape: Shape) -> tuple[Any, Shape]:
    """Declare an input of torch's shape; returns the value and the shape that the plan takes."""
    if len(shape) == 4 and family == SPATIAL:
        image = shape[1:2] if is_pooled(shape) else shape[1:]
        return builder.input(image), (shape[0], *image)
    rows = math.prod(shape[:-1]) // builder.batch
    if len(shape) == 2 and rows == 1 and family != TOKENS:
        return builder.input(shape[1:]), shape
    return builder.input((rows, shape[-1]), layout="tokens"), (builder.batch, rows, shape[-1])


def _mask_input(builder: kernels.PlanBuilder, shape: Shape) -> tuple[Any, Shape]:
    """A mask (batch, heads, queries, keys) enters as a row per key."""
    rows = math.prod(shape[:-1]) // builder.batch
    return builder.input((rows, shape[-1]), layout="tokens"), (builder.batch, rows, shape[-1])


def _output(builder: kernels.PlanBuilder, value: Any) -> None:
    builder.output(value, layout="tokens" if len(value.shape) == 2 else "channels")


# No module path: the steps around a layer that is timed.
_AROUND = "(around)"


class LayerProbe:
    """A plan of a single layer, to time its kernel under a plan's conditions.

    Args:
        layer: The layer.
        candidate: Its kernel, with `emit`.
        threads: Of the parallel region; None follows torch's setting at every call.
    """

    def __init__(self, layer: Layer, candidate: Candidate, threads: int | None) -> None:
        assert candidate.emit is not None
        family = TOKENS if layer.has_tokens else SPATIAL
        images = layer.columns // layer.planned_columns if layer.has_tokens else layer.images
        builder = kernels.PlanBuilder(batch=images, threads=threads)
        value, shape = _input(builder, family, layer.input_shape)
        residual, self._shapes = None, [shape]
        if layer.has_residual:
            residual, shape = _input(builder, family, layer.output_shape)
            self._shapes.append(shape)
        # Where several threads work on one image, each makes rows by itself if those of the layers
        # around are its own, too. Nothing but such rows is in memory: where one thread writes what
        # another has read, as in the place of a whole input, every row comes from the other's cache
        # first, which favours variants that write a row but once.
        around = family == SPATIAL and images == 1 and (threads or torch.get_num_threads()) > 1
        if around and kernels.native_in_use() is not None:
            value, residual = _by_rows(builder, value), residual and _by_rows(builder, residual)
            _output(builder, _read_rows(builder, candidate.emit(builder, value, residual)))
        else:
            _output(builder, candidate.emit(builder, value, residual))
        self._plan = builder.build()

    def kernel_seconds(self, x: Tensor, residual: Tensor | None) -> Callable[[], float]:
        """A callable that runs the plan and returns what the layer's own step took."""
        operands = [x] if residual is None else [x, residual]
        given = [_shaped(each, shape) for each, shape in zip(operands, self._shapes, strict=True)]
        kernel = {info.name for info in self._plan.describe()} - {_AROUND}

        def run() -> float:
            if kernels.native_in_use() is None:
                begin = perf_counter()
                self._plan.run(given)
                return perf_counter() - begin
            steps = self._plan.profile(given, repeats=1)
            return sum(seconds for name, seconds in steps if name in kernel)

        return run


def _by_rows(builder: kernels.PlanBuilder, x: kernels.Value) -> kernels.Value:
    """The caller's planes, each row copied by the thread that uses it; vectors as they are."""
    return x if len(x.shape) != 3 else builder.max_pool2d(x, 1, name=_AROUND)


def _read_rows(builder: kernels.PlanBuilder, x: kernels.Value) -> kernels.Value:
    """A vector made of planes whose rows their own threads have read; vectors as they are."""
    if len(x.shape) != 3:
        return x
    scale = torch.ones(x.shape[0], 1, 1, 1)
    read = builder.conv2d(x, scale, groups=x.shape[0], name=_AROUND)
    return builder.global_avg_pool(read, name=_AROUND)
