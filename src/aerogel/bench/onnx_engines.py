"""Engines that run ONNX files: what each needs here; `worker` opens their sessions.

DeepSparse needs an interpreter of its own, so it runs in worker processes only.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from typing import Any, ClassVar

from torch import nn

from aerogel.bench.engines import Workspace
from aerogel.bench.inputs import Call, Inputs, NotApplicable
from aerogel.bench.worker import SESSIONS, feed_of

DEEPSPARSE_PYTHON = "AEROGEL_DEEPSPARSE_PYTHON"
_DEEPSPARSE_HINT = (
    "DeepSparse 1.8 is discontinued and needs Python 3.11 with numpy 1.26 and safetensors in an "
    "environment of its own (benchmarks/README.md says how to make one); then set "
    f"{DEEPSPARSE_PYTHON} to its python"
)


class OnnxEngine:
    """Runs the network as `torch.onnx` exports it."""

    name: str
    aliases: ClassVar[tuple[str, ...]] = ()
    opset: ClassVar[int | None] = None

    def available(self) -> str | None:
        """Needs the runtime and PyTorch's exporter."""
        lacking = [
            name for name in (self.name, "onnx", "onnxscript")
            if importlib.util.find_spec(name) is None
        ]  # fmt: skip
        if not lacking:
            return None
        return f"{', '.join(lacking)} not installed (pip install 'aerogel[bench]')"

    def interpreter(self) -> str:
        """The Python that has it."""
        return sys.executable

    def prepare(self, model: nn.Module, inputs: Inputs, threads: int, workspace: Workspace) -> Call:
        """A session in this process."""
        session, batch = SESSIONS[self.name], inputs.batch or 1
        names, run = session(str(workspace.onnx(model, inputs)), threads, batch, alone=False)
        arrays: list[Any] = [tensor.contiguous().numpy() for tensor in inputs.tensors]
        feed = feed_of(names, arrays, inputs.keywords)
        return lambda: run(feed)


class OnnxRuntime(OnnxEngine):
    """ONNX Runtime's CPU provider, all graph optimisations on."""

    name = "onnxruntime"
    aliases: ClassVar[tuple[str, ...]] = ("ort",)


class OpenVino(OnnxEngine):
    """OpenVINO's CPU plugin, set up for latency."""

    name = "openvino"


class DeepSparse(OnnxEngine):
    """Neural Magic's DeepSparse 1.8.0, a closed engine for sparse networks on CPUs.

    The interpreter that has it is named by the environment variable AEROGEL_DEEPSPARSE_PYTHON.
    """

    name = "deepsparse"
    opset = 13

    def available(self) -> str | None:
        """Needs its own interpreter."""
        named = os.environ.get(DEEPSPARSE_PYTHON)
        if named and shutil.which(named) is None:
            return f"{DEEPSPARSE_PYTHON}={named!r} is not a program"
        if named or importlib.util.find_spec("deepsparse"):
            return None
        return f"not installed: {_DEEPSPARSE_HINT}"

    def interpreter(self) -> str:
        """Of its own, or this one where it has the package."""
        return os.environ.get(DEEPSPARSE_PYTHON) or sys.executable

    def prepare(self, model: nn.Module, inputs: Inputs, threads: int, workspace: Workspace) -> Call:
        """Not in this process."""
        raise NotApplicable("runs in a process of its own only; compare through bench.Workers")
