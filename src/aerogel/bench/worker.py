"""What runs in a worker process: one engine that works when its parent says so, and only then.

The parent (processes.py) writes requests to stdin, one JSON object a line, and reads one answer a
line from stdout; whatever else is printed here goes to stderr. Tensors travel as safetensors files
named in requests. Nothing is unpickled.

    {"do": "prepare", "key": K, "threads": n, "inputs": FILE, "outputs": FILE, ...}
    {"do": "calibrate", "key": K, "seconds": s, "warm_up": s}  ->  {"count": n}
    {"do": "sample", "key": K, "count": n}                     ->  {"wall": s, "cpu": s}
    {"do": "forget"}

`prepare` makes a call, runs it once, and writes its outputs; the rest of the request says how:
"onnx" (a session of `SESSIONS` on that file) or "network" (see `modules.from_request`). An answer
{"missing": why} says that an engine cannot run this network.

The parent runs this file by its path: another interpreter, which has neither aerogel nor torch,
may hold the engine. So the standard library is all that is imported at the top.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Call = Callable[[], Any]
Session = tuple[list[str], Callable[[Mapping[str, Any]], list[Any]]]
"""Names of the inputs, and what runs on arrays by these names."""

MAX_CALLS = 10_000


def onnxruntime_session(path: str, threads: int, batch: int, *, alone: bool = True) -> Session:
    """ONNX Runtime's CPU provider, all graph optimisations on.

    Args:
        path: Of the network.
        threads: How many may be used.
        batch: Of the inputs.
        alone: Whether the process is this engine's own; else its threads must not spin, because
            between its calls other engines need the same cores.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if alone else "0")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    return names, lambda feed: session.run(None, feed)


def openvino_session(path: str, threads: int, batch: int, *, alone: bool = True) -> Session:
    """OpenVINO's CPU plugin, set up for latency, its inputs shared without a copy.

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
    network = core.read_model(path)
    request = core.compile_model(network, "CPU", settings).create_infer_request()

    def run(feed: Mapping[str, Any]) -> list[Any]:
        return list(request.infer(feed, share_inputs=True, share_outputs=True).values())

    return [entry.any_name for entry in network.inputs], run


def deepsparse_session(path: str, threads: int, batch: int, *, alone: bool = True) -> Session:
    """DeepSparse's engine for one stream of requests."""
    from deepsparse import Engine

    engine = Engine(path, batch_size=batch, num_cores=threads)
    names = list(engine.input_names)
    return names, lambda feed: engine.run([feed[name] for name in names])


SESSIONS = {
    "onnxruntime": onnxruntime_session,
    "openvino": openvino_session,
    "deepsparse": deepsparse_session,
}


def feed_of(names: Sequence[str], arrays: Sequence[Any], keywords: Sequence[str | None]) -> Any:
    """Arrays by the names of a session's inputs; by order where the exporter has renamed them.

    Raises:
        ValueError: The session takes another number of inputs.
    """
    by_keyword = {name: array for name, array in zip(keywords, arrays, strict=True) if name}
    if set(names) <= set(by_keyword):
        return {name: by_keyword[name] for name in names}
    if len(names) != len(arrays):
        raise ValueError(f"the exported network takes {len(names)} inputs, not {len(arrays)}")
    return dict(zip(names, arrays, strict=True))


def calibrate(call: Call, seconds: float, warm_up: float) -> int:
    """Call for `warm_up` seconds, then say how many calls fill `seconds`."""
    end = time.perf_counter() + warm_up
    fastest = math.inf
    for _ in range(MAX_CALLS):
        begin = time.perf_counter()
        call()
        now = time.perf_counter()
        fastest = min(fastest, now - begin)
        if now > end:
            break
    return min(MAX_CALLS, max(1, math.ceil(seconds / max(fastest, 1e-9))))


def sample(call: Call, count: int) -> tuple[float, float]:
    """Seconds of one call, by the wall clock and of this process, as the mean over `count` calls.

    A call that is not counted goes first: it wakes the engine's threads and fetches its weights.
    """
    call()
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - wall) / count, (time.process_time() - cpu) / count


class _Desk:
    """The calls that were prepared here, by key."""

    def __init__(self) -> None:
        self._calls: dict[str, Call] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what a request says."""
        if request["do"] == "prepare":
            self._calls[request["key"]], answer = _prepare(request)
            return answer
        if request["do"] == "forget":
            self._calls.clear()
            gc.collect()
            return {}
        call = self._calls[request["key"]]
        if request["do"] == "calibrate":
            return {"count": calibrate(call, request["seconds"], request["warm_up"])}
        gc.disable()  # no collection inside a sample
        wall, cpu = sample(call, request["count"])
        gc.enable()
        return {"wall": wall, "cpu": cpu}


def _prepare(request: dict[str, Any]) -> tuple[Call, dict[str, Any]]:
    if "network" in request:
        from aerogel.bench import modules

        return modules.from_request(request)
    from safetensors.numpy import load_file, save_file

    stored = load_file(request["inputs"])
    arrays = [stored[str(i)] for i in range(len(stored))]
    session = SESSIONS[request["engine"]]
    names, run = session(request["onnx"], request["threads"], len(arrays[0]))
    feed = feed_of(names, arrays, request["keywords"])
    save_file({str(i): array.copy() for i, array in enumerate(run(feed))}, request["outputs"])
    return lambda: run(feed), {}


def _reason(error: BaseException) -> dict[str, str]:
    lines = str(error).strip().splitlines()
    if type(error).__name__ == "NotApplicable":
        return {"missing": lines[0]}
    return {"missing": f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"}


def _take_streams() -> tuple[int, Any]:
    """The pipes to the parent; nothing else can read from the one or print into the other."""
    requests, answers = os.dup(0), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return requests, answers


def _read(requests: int, lines: queue.SimpleQueue[str]) -> None:
    """Pass lines on. When the parent is gone, so is this process, whatever it is doing."""
    with os.fdopen(requests) as pipe:
        for line in pipe:
            lines.put(line)
    os._exit(0)


def main() -> None:
    """Answer requests until the parent hangs up."""
    # The parent stops this whole group between its turns; and Ctrl-C is the parent's to handle.
    with contextlib.suppress(AttributeError, OSError):
        os.setpgid(0, 0)
    if sys.path and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
        del sys.path[0]  # else this folder's files would stand in for packages of their names
    requests, answers = _take_streams()
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(requests, lines), daemon=True).start()
    desk = _Desk()
    answer: dict[str, Any] = {"ready": os.getpid()}
    while True:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        try:
            answer = desk.answer(json.loads(lines.get()))
        except Exception as error:  # an engine's failure is an answer
            answer = _reason(error)


if __name__ == "__main__":
    main()
