"""The engines a network can run on here, each behind the same two questions.

`available()` says why an engine cannot be used, or nothing; `prepare()` turns a network and an
example into a call without arguments that returns fresh outputs. Every engine gets float32, the
same number of threads, and the settings its own documentation recommends for latency.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from aerogel.runtime.module_state import bake_parametrizations

Example = Tensor | Sequence[Any] | Mapping[str, Any]
Call = Callable[[], Any]


@dataclass(frozen=True)
class Inputs:
    """Example inputs as a call's arguments."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, example: Example) -> Inputs:
        """Take a tensor, a sequence of arguments, or a mapping of keyword arguments."""
        if isinstance(example, Tensor):
            return cls((example,))
        if isinstance(example, Mapping):
            return cls(kwargs=dict(example))
        if isinstance(example, Sequence) and not isinstance(example, str):
            return cls(tuple(example))
        raise TypeError(
            "example_inputs must be a tensor, a sequence of arguments or a mapping of keyword "
            f"arguments, got {type(example).__name__}"
        )

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, in order."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs))
                if isinstance(leaf, Tensor)]  # fmt: skip

    @property
    def batch(self) -> int | None:
        """Size of the first tensor's first dimension."""
        return next((int(t.shape[0]) for t in self.tensors if t.ndim), None)


class Workspace:
    """Where engines leave files for each other: one ONNX export serves all who read it."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="aerogel-bench-")
        self._exports: dict[int, tuple[nn.Module, Path]] = {}

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def onnx(self, model: nn.Module, inputs: Inputs) -> Path:
        """The model as an ONNX file, exported on first request."""
        known = self._exports.get(id(model))
        if known is None:
            path = Path(self._folder.name) / f"{len(self._exports)}.onnx"
            with _quiet(), torch.no_grad():
                torch.onnx.export(model, inputs.args, str(path), kwargs=inputs.kwargs or None,
                                  dynamo=True, verbose=False)  # fmt: skip
            known = self._exports[id(model)] = model, path  # keeps the model, so its id, alive
        return known[1]


class Engine(Protocol):
    """Something that runs a network."""

    name: str

    def available(self) -> str | None:
        """None, or the reason this engine cannot be used here."""

    def prepare(self, model: nn.Module, inputs: Inputs, threads: int, workspace: Workspace) -> Call:
        """A call that runs the network once on the inputs.

        Args:
            model: In eval mode, without parametrizations.
            inputs: What it is called with.
            threads: How many the engine may use.
            workspace: For files.

        Returns:
            A callable without arguments, returning the outputs in any nesting.
        """


class TorchEager:
    """PyTorch as one usually runs it."""

    name = "torch eager"

    def available(self) -> str | None:
        """Always."""
        return None

    def prepare(self, model: nn.Module, inputs: Inputs, threads: int, workspace: Workspace) -> Call:
        """The module's own call."""
        return lambda: model(*inputs.args, **inputs.kwargs)


class TorchChannelsLast:
    """PyTorch with convolution weights and images in NHWC memory order."""

    name = "torch channels_last"

    def available(self) -> str | None:
        """Always."""
        return None

    def prepare(self, model: nn.Module, inputs: Inputs, threads: int, workspace: Workspace) -> Call:
        """The module's call with image tensors kept in channels_last order."""
        if not any(isinstance(m, nn.Conv2d) for m in model.modules()):
            raise NotApplicable("the network has no 2-D convolution")
        turned: nn.Module = copy.deepcopy(model)
        turned.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        args, kwargs = pytree.tree_map(_channels_last, (inputs.args, inputs.kwargs))
        return lambda: turned(*args, **kwargs)


class TorchCompile:
    """torch.compile with the inductor backend and frozen weights."""

    name = "torch.compile"

    def available(self) -> str | None:
        """Inductor compiles C++ when it runs."""
        names = [os.environ.get("CXX", ""), "c++", "g++", "clang++", "cl"]
        return None if any(n and shutil.which(n) for n in names) else "no C++ compiler is installed"

    def prepare(self, model: nn.Module, inputs: Inputs, threads: int, workspace: Workspace) -> Call:
        """Compile for these shapes; freezing is inductor's setting for inference on a CPU."""
        options: dict[str, Any] = {"freezing": True, "cpp.threads": threads}
        compiled = torch.compile(model, dynamic=False, options=options)
        with _quiet():
            compiled(*inputs.args, **inputs.kwargs)
        return lambda: compiled(*inputs.args, **inputs.kwargs)


class OnnxRuntime:
    """ONNX Runtime's CPU provider, all graph optimisations on."""

    name = "onnxruntime"

    def available(self) -> str | None:
        """Needs the runtime and PyTorch's exporter."""
        return _missing("onnxruntime", "onnx", "onnxscript")

    def prepare(self, model: nn.Module, inputs: Inputs, threads: int, workspace: Workspace) -> Call:
        """A session on the exported network.

        Threads do not spin: between its calls other engines need the same cores.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            str(workspace.onnx(model, inputs)), options, providers=["CPUExecutionProvider"]
        )
        feed = _feed([entry.name for entry in session.get_inputs()], inputs)
        return lambda: session.run(None, feed)


class OpenVino:
    """OpenVINO's CPU plugin, set up for latency."""

    name = "openvino"

    def available(self) -> str | None:
        """Needs the runtime and PyTorch's exporter."""
        return _missing("openvino", "onnx", "onnxscript")

    def prepare(self, model: nn.Module, inputs: Inputs, threads: int, workspace: Workspace) -> Call:
        """An inference request on the exported network, inputs shared without a copy.

        The precision is pinned: on newer processors the plugin would silently use bfloat16.
        """
        import openvino

        core = openvino.Core()
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }
        network = core.read_model(str(workspace.onnx(model, inputs)))
        request = core.compile_model(network, "CPU", settings).create_infer_request()
        feed = _feed([entry.any_name for entry in network.inputs], inputs)

        def run() -> list[Any]:
            outputs = request.infer(feed, share_inputs=True, share_outputs=True)
            return list(outputs.values())

        return run


class Aerogel:
    """aerogel.compile."""

    name = "aerogel"

    def available(self) -> str | None:
        """Always: without native kernels it falls back to PyTorch."""
        return None

    def prepare(self, model: nn.Module, inputs: Inputs, threads: int, workspace: Workspace) -> Call:
        """Compile for these shapes and threads."""
        from aerogel import runtime

        example: Any = inputs.kwargs if inputs.kwargs and not inputs.args else inputs.args
        compiled = runtime.compile(model, example, threads=threads)
        return lambda: compiled(*inputs.args, **inputs.kwargs)


class NotApplicable(Exception):
    """An engine has nothing of its own to offer for this network; the message says why."""


DENSE_ENGINES: tuple[Engine, ...] = (
    TorchEager(), TorchChannelsLast(), TorchCompile(), OnnxRuntime(), OpenVino(),
)  # fmt: skip
ENGINES: tuple[Engine, ...] = (*DENSE_ENGINES, Aerogel())


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode with its parametrizations (masks) baked into the weights."""
    return bake_parametrizations(copy.deepcopy(model).eval()).requires_grad_(False)


def output_tensors(outputs: Any) -> list[Tensor]:
    """All tensors of any engine's outputs, in order."""
    if hasattr(outputs, "to_tuple"):  # transformers' ModelOutput, in every version
        outputs = outputs.to_tuple()
    leaves = pytree.tree_leaves(outputs)
    return [torch.as_tensor(leaf) for leaf in leaves if hasattr(leaf, "shape")]


def _channels_last(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and leaf.ndim == 4:
        return leaf.contiguous(memory_format=torch.channels_last)
    return leaf


def _missing(*packages: str) -> str | None:
    lacking = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"{', '.join(lacking)} not installed (pip install 'aerogel[bench]')" if lacking else None


def _feed(names: list[str], inputs: Inputs) -> dict[str, Any]:
    """The exported network's inputs by name; by order where the exporter has renamed them."""
    tensors = inputs.tensors
    by_name = {name: value for name, value in inputs.kwargs.items() if isinstance(value, Tensor)}
    if set(names) <= set(by_name):
        return {name: by_name[name].numpy() for name in names}
    if len(names) != len(tensors):
        raise NotApplicable(f"the exported network takes {len(names)} inputs, not {len(tensors)}")
    return {name: value.contiguous().numpy() for name, value in zip(names, tensors, strict=True)}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters and compilers talk a lot about things that are no news to the user."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
