"""From an ONNX file to a module that trains, is pruned, exported and compiled like any other.

Why a converter of our own: of networks as today's exporters write them (PyTorch's, old and new,
and Paddle's) the packages at hand convert a few and `torch.export` follows none of those, because
they compute shapes with tensors.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import fx

from aerogel.runtime.exchange import (
    elementwise,
    indexing,
    layers,
    quantized,
    reductions,
    shapes,
    windows,
)
from aerogel.runtime.exchange.builder import Builder
from aerogel.runtime.exchange.fuse_attention import fuse_attention
from aerogel.runtime.exchange.fusions import REWRITES
from aerogel.runtime.exchange.names import identifier
from aerogel.runtime.exchange.onnx_file import (
    STANDARD,
    OnnxError,
    OnnxGraph,
    OnnxInput,
    RawNode,
    read_onnx,
)
from aerogel.runtime.exchange.operators import (
    OPERATORS,
    Constant,
    OnnxNode,
    UnsupportedError,
    Value,
)

# Importing them fills the table of operators.
_FAMILIES = (elementwise, indexing, layers, quantized, reductions, shapes, windows)


def from_onnx(path: str | os.PathLike[str]) -> fx.GraphModule:
    """Load an ONNX file as a PyTorch module.

    Convolutions, matrix products with constant matrices, normalisations and embeddings become
    layers (`nn.Conv2d`, `nn.Linear`, ...) whose parameters carry the file's names as far as those
    can be names; the rest becomes calls of functions. What the file computes from constants is
    computed once. Decomposed GELU, SiLU, hard swish and layer normalisation are put together
    again. Files of opset 7 and later are read. Nothing from the file is executed, and external
    data is read from the file's own folder only.

    Args:
        path: The .onnx file.

    Returns:
        A module in eval mode that takes the file's inputs in order (or by name, as far as the
        names are Python names) and returns its output, or a tuple of them.
        ``module.meta["onnx_inputs"]`` and ``["onnx_outputs"]`` say what the file declares.

    Raises:
        OnnxError: Not an ONNX file, damaged, or with a node that is not supported; the message
            names node, operator and opset. A `ValueError`.
        OSError: The file cannot be read.
    """
    try:
        return _built(read_onnx(Path(path), set(OPERATORS)))
    except (OnnxError, OSError):
        raise
    except Exception as error:
        # Damage can be anywhere in a file and shows as any exception: names that are no text, ...
        raise OnnxError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _built(source: OnnxGraph) -> fx.GraphModule:
    _refuse_unsupported(source)
    builder = Builder()
    values: dict[str, Value] = {
        name: Constant(tensor, name) for name, tensor in source.tensors.items()
    }
    for declared in source.inputs:
        values[declared.name] = builder.placeholder(declared.name)
    for node in source.nodes:
        _convert(node, source, values, builder)
    outputs = [_look_up(values, each.name, f"{source.path}: output") for each in source.outputs]
    module = builder.finish(outputs, class_name=identifier(source.name or "OnnxNetwork"))
    _fuse(module)
    module.meta["onnx_inputs"], module.meta["onnx_outputs"] = source.inputs, source.outputs
    return module.eval()


def _refuse_unsupported(source: OnnxGraph) -> None:
    for node in source.nodes:
        if node.domain not in STANDARD or node.op not in OPERATORS:
            raise OnnxError(f"{source.path}: {node} of opset {source.opset} is not supported")


def _look_up(values: dict[str, Value], name: str, reader: str) -> Value:
    if name not in values:
        raise OnnxError(f"{reader} {name!r} is computed by no earlier node")
    return values[name]


def _convert(node: RawNode, source: OnnxGraph, values: dict[str, Value], builder: Builder) -> None:
    place = f"{source.path}: {node} of opset {source.opset}"
    inputs = [_look_up(values, name, f"{place}: input") if name else None for name in node.inputs]
    seen = OnnxNode(
        node.op,
        node.name,
        source.opset,
        inputs,
        node.outputs,
        node.attributes,
        node.metadata,
        builder,
    )
    try:
        result = OPERATORS[node.op](seen)
        found = _results(result, node, builder)
    except UnsupportedError as error:
        raise OnnxError(f"{place} is not supported: {error}") from None
    except OnnxError:
        raise
    except Exception as error:
        # A damaged file can make any call of torch fail, with any exception.
        raise OnnxError(f"{place} cannot be converted: {error}") from error
    for name, value in zip(node.outputs, found, strict=False):
        if name:
            values[name] = value


def _results(result: Any, node: RawNode, builder: Builder) -> list[Any]:
    """One value an output. A call that yields several is a single node of the graph."""
    if isinstance(result, tuple | list):
        found = list(result)
    elif len(node.outputs) > 1 and isinstance(result, fx.Node):
        found = [builder.item(result, i, name or node.op) for i, name in enumerate(node.outputs)]
    elif isinstance(result, fx.Node) and node.op in ("Split", "TopK"):
        found = [builder.item(result, 0, node.outputs[0])]
    else:
        found = [result]
    needed = [i for i, name in enumerate(node.outputs) if name]
    if any(i >= len(found) or found[i] is None for i in needed):
        raise UnsupportedError("it has more outputs than the operator knows")
    return found


__all__ = ["OnnxInput", "from_onnx"]


def _fuse(gm: fx.GraphModule) -> None:
    """Run every rewrite on an imported module, in place."""
    for rewrite in (*REWRITES, fuse_attention):
        rewrite(gm)
        gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    _forget_unused(gm)


def _forget_unused(gm: fx.GraphModule) -> None:
    """Drop layers and tensors that no call reads any more."""
    gm.delete_all_unused_submodules()
    read = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    called = {str(node.target) for node in gm.graph.nodes if node.op == "call_module"}
    for name, _ in [*gm.named_parameters(), *gm.named_buffers()]:
        owner, _, leaf = name.rpartition(".")
        if name not in read and owner not in called:
            delattr(gm.get_submodule(owner), leaf)
