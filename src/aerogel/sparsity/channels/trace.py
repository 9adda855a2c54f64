"""Walking a traced network on an example, gathering its channel graph."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from aerogel.sparsity.channels.graph import ChannelGraph
from aerogel.sparsity.channels.rules import apply_rule


def trace_channels(model: nn.Module, example: Any) -> ChannelGraph:
    """Walk the network on an example and gather its channel graph.

    Raises:
        ValueError: parametrized, not traceable by `torch.fx`, or the example does not run.
    """
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            raise ValueError(f"{name or 'model'} is parametrized; finalize the masks first")
    with _evaluating(model):
        traced, args = _traced(model, example)
        graph = ChannelGraph(model)
        walk = _Walk(traced, graph)
        try:
            walk.run(*args)
        except Exception as error:
            raise ValueError(f"example does not run through the model: {error}") from error
    return graph


class _Walk(fx.Interpreter):
    """Runs the traced network and the channel rules side by side."""

    def __init__(self, traced: fx.GraphModule, graph: ChannelGraph) -> None:
        super().__init__(traced)
        self.channel_graph = graph
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        n.meta["shapes"] = _shapes(result)
        value = apply_rule(self, n, result)
        n.meta["channels"] = value
        for part in value if isinstance(value, list) else [value]:
            for channels in (part or {}).values():
                self.channel_graph.note(channels)
        return result


def _shapes(result: Any) -> Any:
    if isinstance(result, Tensor):
        return tuple(result.shape)
    if isinstance(result, (tuple, list)):
        return [_shapes(part) for part in result]
    return None


def _traced(model: nn.Module, example: Any) -> tuple[fx.GraphModule, list[Any]]:
    given = _arguments(model, example)
    parameters = inspect.signature(model.forward).parameters
    # Arguments that the example leaves out keep their defaults, so that tracing can branch on them.
    left = {
        name: p.default
        for name, p in parameters.items()
        if name not in given and p.default is not inspect.Parameter.empty
    }
    try:
        traced = fx.GraphModule(model, fx.Tracer().trace(model, concrete_args=left or None))
    except Exception as error:  # tracing runs the model's own code on proxies
        raise ValueError(
            f"{type(model).__name__} cannot be traced by torch.fx: {error} ({_where(error)})"
        ) from error
    args = []
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            base = str(node.target).rpartition("_")[0]
            args.append(given.get(str(node.target), left.get(str(node.target), left.get(base))))
    return traced, args


def _where(error: BaseException) -> str:
    """The innermost line outside torch that an exception passed through."""
    frames = traceback.extract_tb(error.__traceback__)
    home = str(Path(torch.__file__).parent)
    own = [frame for frame in frames if not frame.filename.startswith(home)] or list(frames)
    return f"{own[-1].filename}:{own[-1].lineno}"


def _arguments(model: nn.Module, example: Any) -> Mapping[str, Any]:
    if isinstance(example, Mapping):
        return example
    values: Sequence[Any] = example if isinstance(example, (tuple, list)) else (example,)
    names = list(inspect.signature(model.forward).parameters)
    return dict(zip(names, values, strict=False))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
