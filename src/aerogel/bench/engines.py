"""The engines a network can run on here, each behind the same questions.

`available()` says why an engine cannot be used, or nothing; `prepare()` turns a network and an
example into a call without arguments that returns fresh outputs. Every engine gets float32, the
same number of threads, and the settings its own documentation recommends for latency.

Engines that run modules are here, those that run ONNX files in `onnx_engines`.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from aerogel.bench.inputs import Call, Inputs, NotApplicable
from aerogel.runtime.module_state import bake_parametrizations, plain_layers


class Workspace:
    """Where engines leave files for each other: one ONNX export serves all who read it."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="aerogel-bench-")
        self._exports: dict[tuple[int, int | None], tuple[nn.Module, Path]] = {}

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self._folder.name)

    def onnx(self, model: nn.Module, inputs: Inputs, opset: int | None = None) -> Path:
        """The model as an ONNX file, exported on first request.

        Args:
            model: In eval mode.
            inputs: Whose shapes the file will have.
            opset: An old version, from the exporter that still writes it; None for today's.
        """
        key = id(model), opset
        known = self._exports.get(key)
        if known is None:
            path = self.path / f"{len(self._exports)}.onnx"
            # The dynamo exporter begins at opset 18.
            options: dict[str, Any] = {"dynamo": opset is None, "verbose": False}
            if opset is not None:
                options["opset_version"] = opset
            with quiet(), torch.no_grad():
                torch.onnx.export(model, inputs.args, str(path), kwargs=inputs.kwargs or None,
                                  **options)  # fmt: skip
            known = self._exports[key] = model, path  # keeps the model, so its id, alive
        return known[1]


class Engine(Protocol):
    """Something that runs a network.

    Attributes:
        name: What tables call it.
    """

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
            A callable without arguments, returning the outputs in any nesting. It may have a
            method `facts()`: what the engine says about the network, as JSON values.
        """


class ModuleEngine:
    """Runs the module itself; another process builds its own from a `Source`.

    Attributes:
        name: What tables call it.
        aliases: What it is called on a command line besides.
    """

    name: str
    aliases: ClassVar[tuple[str, ...]] = ()

    @property
    def options(self) -> dict[str, Any]:
        """Arguments with which another process makes the same engine; JSON values."""
        return {}

    def available(self) -> str | None:
        """Always: it needs nothing but torch."""
        return None


class TorchEager(ModuleEngine):
    """PyTorch as one usually runs it."""

    name = "torch eager"
    aliases: ClassVar[tuple[str, ...]] = ("torch",)

    def prepare(self, model: nn.Module, inputs: Inputs, threads: int, workspace: Workspace) -> Call:
        """The module's own call."""
        return lambda: model(*inputs.args, **inputs.kwargs)


class TorchChannelsLast(ModuleEngine):
    """PyTorch with convolution weights and images in NHWC memory order."""

    name = "torch channels_last"
    aliases: ClassVar[tuple[str, ...]] = ("channels_last",)

    def prepare(self, model: nn.Module, inputs: Inputs, threads: int, workspace: Workspace) -> Call:
        """The module's call with image tensors kept in channels_last order."""
        if not any(isinstance(m, nn.Conv2d) for m in model.modules()):
            raise NotApplicable("the network has no 2-D convolution")
        turned: nn.Module = copy.deepcopy(model)
        turned.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        args, kwargs = pytree.tree_map(_channels_last, (inputs.args, inputs.kwargs))
        return lambda: turned(*args, **kwargs)


class TorchCompile(ModuleEngine):
    """torch.compile with the inductor backend and frozen weights."""

    name = "torch.compile"
    aliases: ClassVar[tuple[str, ...]] = ("compile",)

    def available(self) -> str | None:
        """Inductor compiles C++ when it runs."""
        names = [os.environ.get("CXX", ""), "c++", "g++", "clang++", "cl"]
        if any(n and shutil.which(n) for n in names):
            return None
        return "no C++ compiler is installed (for example: apt-get install g++)"

    def prepare(self, model: nn.Module, inputs: Inputs, threads: int, workspace: Workspace) -> Call:
        """Compile for these shapes; freezing is inductor's setting for inference on a CPU."""
        options: dict[str, Any] = {"freezing": True, "cpp.threads": threads}
        torch._dynamo.reset()
        compiled = torch.compile(model, dynamic=False, options=options)
        with quiet():
            compiled(*inputs.args, **inputs.kwargs)
        return lambda: compiled(*inputs.args, **inputs.kwargs)


class Aerogel(ModuleEngine):
    """aerogel.compile; without native kernels it falls back to PyTorch.

    Args:
        tolerance: Of `aerogel.compile`.
    """

    name = "aerogel"

    def __init__(self, tolerance: float = 1e-4) -> None:
        self.tolerance = tolerance

    @property
    def options(self) -> dict[str, Any]:
        """The tolerance."""
        return {"tolerance": self.tolerance}

    def prepare(self, model: nn.Module, inputs: Inputs, threads: int, workspace: Workspace) -> Call:
        """Compile for these shapes and threads."""
        return _Compiled(model, inputs, threads, self.tolerance)


class _Compiled:
    """A compiled network's call."""

    def __init__(self, model: nn.Module, inputs: Inputs, threads: int, tolerance: float) -> None:
        from aerogel import runtime

        self._inputs = inputs
        example: Any = inputs.kwargs if inputs.kwargs and not inputs.args else inputs.args
        self._compiled = runtime.compile(model, example, threads=threads, tolerance=tolerance)

    def __call__(self) -> Any:
        return self._compiled(*self._inputs.args, **self._inputs.kwargs)

    def facts(self) -> dict[str, Any]:
        """What `explain()` says: as values, and under "text" as it prints."""
        explanation = self._compiled.explain()
        return {**explanation.to_dict(), "text": str(explanation)}


MODULE_ENGINES = (TorchEager, TorchChannelsLast, TorchCompile, Aerogel)


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode with its parametrizations (masks) baked into the weights."""
    plain = plain_layers(bake_parametrizations(copy.deepcopy(model).eval()))
    return plain.requires_grad_(False)


def _channels_last(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and leaf.ndim == 4:
        return leaf.contiguous(memory_format=torch.channels_last)
    return leaf


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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
