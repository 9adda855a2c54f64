"""Worker processes: one for each engine, of which one works at a time.

A process that is not at work is stopped, so that no engine's spinning threads take a core from
another, and each may keep the settings it has when it runs alone. A worker that crashes or does not
answer is given up, with the reason; the others go on. When this process ends, however it ends, its
workers do too: they hang up when the pipe closes, and the system wakes those that were stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from aerogel import runtime
from aerogel.bench import worker
from aerogel.bench.engines import Engine, ModuleEngine, Workspace
from aerogel.bench.field import Contender
from aerogel.bench.inputs import Inputs, NotApplicable, load_tensors
from aerogel.bench.onnx_engines import OnnxEngine

# Starting an interpreter and importing torch on a busy machine.
START_SECONDS = 120.0
GRACE_SECONDS = 2.0


class WorkerLost(RuntimeError):
    """A worker ended or was given up; the message says why."""


class Worker:
    """One process.

    Args:
        interpreter: The Python to run.
        log: File for what the process prints.
    """

    def __init__(self, interpreter: str, log: Path) -> None:
        self._log = log
        self._buffer = b""
        self._reason: str | None = None
        command, environment = [interpreter], dict(os.environ)
        if interpreter == sys.executable:
            # What can be imported here can be imported there.
            environment["PYTHONPATH"] = os.pathsep.join(p or os.getcwd() for p in sys.path)
        else:
            command.append("-I")
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [*command, worker.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment,
            )
        self._ready = False

    @property
    def lost(self) -> bool:
        """Whether the process has ended or was given up."""
        return self._reason is not None

    def wait_ready(self) -> None:
        """Wait until the process has started.

        Raises:
            WorkerLost: It did not.
        """
        if self._reason is not None:
            raise WorkerLost(self._reason)
        if not self._ready:
            self._receive(START_SECONDS)
            self._ready = True
            self._signal("SIGSTOP")

    def ask(self, request: dict[str, Any], patience: float) -> dict[str, Any]:
        """Let the process work, until it has answered.

        Args:
            request: See `worker`.
            patience: Seconds after which it is given up.

        Raises:
            WorkerLost: The process has ended, now or before, or does not answer.
        """
        self.wait_ready()
        self._signal("SIGCONT")
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # why it ended is found out below
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        answer = self._receive(patience)
        self._signal("SIGSTOP")
        return answer

    def _receive(self, patience: float) -> dict[str, Any]:
        """The next line of the process, as JSON."""
        assert self._process.stdout is not None
        pipe, deadline = self._process.stdout.fileno(), time.monotonic() + patience
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    self._give_up(f"did not answer within {patience:.0f} s and was stopped")
                received = os.read(pipe, 1 << 16)
                if not received:
                    self._give_up(None)
                self._buffer += received
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def _give_up(self, reason: str | None) -> None:
        if reason is None:  # the pipe was closed, so the process is about to end
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_SECONDS)
            reason = self._epitaph(self._process.poll())
        self._reason = reason
        self.close()
        raise WorkerLost(reason)

    def close(self) -> None:
        """End the process and all it has started."""
        self._signal("SIGKILL")
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _epitaph(self, code: int | None) -> str:
        if code is not None and code < 0:
            return f"its process was ended by {signal.Signals(-code).name}"
        lines = self._log.read_text(errors="replace").strip().splitlines()
        said = f": {lines[-1][:200]}" if lines else ""
        return f"its process ended with exit code {code}{said}"

    def _signal(self, name: str) -> None:
        """Signal the worker's group, where the system has such signals."""
        if hasattr(signal, name) and hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, getattr(signal, name))


class Workers:
    """A process for each engine, kept from one comparison to the next.

    with bench.Workers() as workers:
        table = bench.compare(lineup(dense, sparse, source=source), example, workers=workers)

    Args:
        patience: Seconds after which a worker that does not answer is given up. Some engines take
            minutes to compile a large network.
    """

    def __init__(self, patience: float = 900.0) -> None:
        if not patience > 0:
            raise ValueError(f"patience={patience} must be positive seconds")
        self.patience = patience
        self._folder = tempfile.TemporaryDirectory(prefix="aerogel-workers-")
        self._workers: dict[str, Worker] = {}

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes."""
        for process in self._workers.values():
            process.close()
        self._workers.clear()
        self._folder.cleanup()

    def start(self, engines: Sequence[Engine]) -> None:
        """Have a worker for each of these engines; all workers forget earlier networks.

        They start side by side; nothing is timed before all of them are ready.
        """
        for name in [name for name, process in self._workers.items() if process.lost]:
            self._workers.pop(name).close()
        for process in self._workers.values():
            with contextlib.suppress(WorkerLost):
                process.ask({"do": "forget"}, self.patience)
        for engine in engines:
            if engine.name not in self._workers:
                log = Path(self._folder.name) / f"{engine.name.replace(' ', '-')}.log"
                self._workers[engine.name] = Worker(_interpreter(engine), log)
        for process in self._workers.values():
            with contextlib.suppress(WorkerLost):  # the engine's own row will say so
                process.wait_ready()

    def runner(
        self, entry: Contender, model: nn.Module, inputs: Inputs, threads: int, workspace: Workspace
    ) -> RemoteRunner:
        """A contender in its engine's process.

        Args:
            entry: Its engine must have been started.
            model: Its network, without parametrizations.
            inputs: What it is called with.
            threads: How many the engine may use.
            workspace: For the files that travel.
        """
        process = self._workers[entry.engine.name]
        return RemoteRunner(process, entry, model, inputs, threads, workspace, self.patience)


class RemoteRunner:
    """A contender in a worker process; see `Workers.runner`."""

    def __init__(
        self,
        process: Worker,
        entry: Contender,
        model: nn.Module,
        inputs: Inputs,
        threads: int,
        workspace: Workspace,
        patience: float,
    ) -> None:
        self._process, self._entry, self._model = process, entry, model
        self._inputs, self._threads, self._workspace = inputs, threads, workspace
        self._patience, self._key = patience, str(id(self))

    def prepare(self) -> tuple[list[Tensor], dict[str, Any]]:
        """Send the network over; return its outputs and the engine's facts."""
        given, found = (self._workspace.path / f"{self._key}-{what}.safetensors"
                        for what in ("inputs", "outputs"))  # fmt: skip
        self._inputs.save(given)
        answer = self._ask({
            "do": "prepare",
            "engine": self._entry.engine.name,
            "threads": self._threads,
            "inputs": str(given),
            "keywords": self._inputs.keywords,
            "outputs": str(found),
            **self._network(),
        })  # fmt: skip
        return load_tensors(found), answer.get("facts", {})

    def _network(self) -> dict[str, Any]:
        engine, source = self._entry.engine, self._entry.source
        if isinstance(engine, OnnxEngine):
            path = self._workspace.onnx(self._model, self._inputs, engine.opset)
            return {"onnx": str(path)}
        if source is None or not isinstance(engine, ModuleEngine):
            raise NotApplicable("another process cannot build this network: give its source")
        weights = self._workspace.path / f"{id(self._model)}.safetensors"
        if not weights.exists():
            runtime.save(self._model, weights, format="dense")
        network = {"builder": source.builder, "arguments": source.arguments}
        return {"network": {**network, "weights": str(weights)}, "options": engine.options}

    def calibrate(self, seconds: float, warm_up: float) -> int:
        """Warm up, and say how many calls fill `seconds`."""
        request = {"do": "calibrate", "seconds": seconds, "warm_up": warm_up}
        return int(self._ask(request)["count"])

    def sample(self, count: int) -> tuple[float, float]:
        """Wall and CPU seconds of a call, as the mean over `count` calls."""
        answer = self._ask({"do": "sample", "count": count})
        return answer["wall"], answer["cpu"]

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        answer = self._process.ask({**request, "key": self._key}, self._patience)
        if "missing" in answer:
            raise NotApplicable(answer["missing"])
        return answer


def _interpreter(engine: Engine) -> str:
    return engine.interpreter() if isinstance(engine, OnnxEngine) else sys.executable
