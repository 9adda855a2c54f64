"""Tracing a network on an example, gathering its channel graph.

`torch.fx` records the operations; each is executed at once on the example's tensors, so that code
which looks at shapes (input checks, window sizes) runs as it is. Only branches on tensor *values*
cannot be traced.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.nn.utils import parametrize

from aerogel.sparsity.channels.graph import ChannelGraph, Op
from aerogel.sparsity.channels.rules import apply_rule, has_tensor


class NotTraceable(ValueError):
    """The model runs on the example, but its operations cannot be recorded."""


def trace_channels(model: nn.Module, example: Any) -> ChannelGraph:
    """Walk the network on an example and gather its channel graph.

    Raises:
        NotTraceable: the model runs, but not under `torch.fx`; says where.
        ValueError: parametrized, or the example does not run.
    """
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            raise ValueError(f"{name or 'model'} is parametrized; finalize the masks first")
    with _untouched(model):
        tracer = _ChannelTracer(model, _arguments(model, example))
        try:
            recorded = tracer.trace(model)
        except Exception as error:  # the model's own code runs here
            runs = isinstance(error, fx.proxy.TraceError) or _runs(model, tracer.given)
            kind = NotTraceable if runs else ValueError
            what = "cannot be traced by torch.fx" if runs else "does not run on the example"
            raise kind(f"{type(model).__name__} {what}: {error} ({_where(error)})") from error
    for node in recorded.nodes:
        if node.op == "output":
            Op(tracer.channels, node, None).pinned()
    return tracer.channels


class _ChannelTracer(fx.Tracer):
    """Executes while it records, and applies the channel rules node by node."""

    proxy_buffer_attributes = True

    def __init__(self, model: nn.Module, given: Mapping[str, Any]) -> None:
        super().__init__()
        self.channels = ChannelGraph(model)
        self.given = given
        self.model = model
        self._plain = False

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any
    ) -> Any:
        """A proxy for tensors (and tuples of them), the value itself for anything else."""
        if kind == "placeholder":
            result = self._input(str(target), args)
        else:
            result = self._execute(kind, target, args, kwargs)
        if not has_tensor(result):
            return result
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        self._follow(proxy.node, result)
        return proxy

    def create_node(self, kind: str, target: Any, *rest: Any, **more: Any) -> fx.Node:
        """Constants become nodes without a proxy; they too have a value."""
        node = super().create_node(kind, target, *rest, **more)
        if kind == "get_attr":
            with self._as_it_is():
                value = _attribute(self.model, str(target))
            self._follow(node, value)
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _ValueProxy(node, self)

    def iter(self, obj: Any) -> Iterator[Any]:
        return (obj[i] for i in range(len(obj.node.meta["value"])))

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._plain:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self._plain:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def _follow(self, node: fx.Node, result: Any) -> None:
        if "channels" in node.meta:
            return
        node.meta["value"], node.meta["shapes"] = result, _shapes(result)
        with self._as_it_is():
            value = apply_rule(Op(self.channels, node, result, self.model))
        node.meta["channels"] = value
        for part in value if isinstance(value, list) else [value]:
            for channels in (part or {}).values():
                self.channels.note(channels)

    def _input(self, name: str, default: Any) -> Any:
        if name in self.given:
            return self.given[name]
        if name.startswith("**"):
            return {}
        return default[0] if default else ()

    def _execute(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = map_aggregate(args, _value_of), map_aggregate(kwargs, _value_of)
        with self._as_it_is():
            if kind == "get_attr":
                return _attribute(self.model, target)
            if kind == "call_module":
                return self.model.get_submodule(target).forward(*args, **kwargs)
            if kind == "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            return target(*args, **kwargs)

    @contextmanager
    def _as_it_is(self) -> Iterator[None]:
        """Reads and calls of modules are not recorded (fx patches both while it traces)."""
        before, self._plain = self._plain, True
        try:
            yield
        finally:
            self._plain = before


class _ValueProxy(fx.Proxy):
    """A proxy that knows its tensor: shapes and types are answered with plain values."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.node.meta["value"], name)
        if callable(value) or has_tensor(value):
            return super().__getattr__(name)
        return value

    def __len__(self) -> int:
        return len(self.node.meta["value"])


def _runs(model: nn.Module, given: Mapping[str, Any]) -> bool:
    try:
        model(**given)
    except Exception:  # whatever the model's own code raises
        return False
    return True


def _value_of(arg: Any) -> Any:
    return arg.node.meta["value"] if isinstance(arg, fx.Proxy) else arg


def _attribute(model: nn.Module, target: str) -> Any:
    owner, _, name = target.rpartition(".")
    return getattr(model.get_submodule(owner), name)


def _shapes(result: Any) -> Any:
    if isinstance(result, Tensor):
        return tuple(result.shape)
    if isinstance(result, (tuple, list)):
        return [_shapes(part) for part in result]
    return None


def _where(error: BaseException) -> str:
    """The innermost line outside torch and this tracer that an exception passed through."""
    frames = traceback.extract_tb(error.__traceback__)
    homes = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    own = [frame for frame in frames if not frame.filename.startswith(homes)] or list(frames)
    return f"{own[-1].filename}:{own[-1].lineno}"


def _arguments(model: nn.Module, example: Any) -> Mapping[str, Any]:
    if isinstance(example, Mapping):
        return example
    values: Sequence[Any] = example if isinstance(example, (tuple, list)) else (example,)
    names = list(inspect.signature(model.forward).parameters)
    return dict(zip(names, values, strict=False))


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; constants that tracing hangs on the model are taken off."""
    modes = [(module, module.training) for module in model.modules()]
    attributes = set(vars(model))
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for name in set(vars(model)) - attributes:
            delattr(model, name)
        for module, mode in modes:
            module.training = mode
