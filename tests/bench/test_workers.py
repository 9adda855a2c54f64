"""Engines in processes of their own: one works at a time, and none takes the others down."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import worker_nets
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from aerogel import bench
from aerogel.bench import Contender, Inputs, Source, Workers, compare
from aerogel.bench.onnx_engines import DEEPSPARSE_PYTHON
from aerogel.bench.processes import Worker

QUICK: dict[str, Any] = {"rounds": 3, "sample_seconds": 1e-4, "threads": 1}
POSIX = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc")


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    """One pool for all tests: starting a process costs seconds."""
    with Workers(patience=60) as pool:
        yield pool


def odd(engine: Any, what: str, after: int = 0) -> Contender:
    return Contender(engine, nn.Linear(4, 4), source=Source("worker_nets:odd",
                     {"what": what, "after": after}))  # fmt: skip


def fine(engine: Any) -> Contender:
    return Contender(engine, nn.Linear(4, 4), source=Source("worker_nets:linear"))


def test_both_networks_give_eager_torchs_outputs_on_every_engine(workers) -> None:
    torch.manual_seed(0)
    dense, sparse = worker_nets.images().eval(), worker_nets.images().eval()
    with torch.no_grad():
        sparse[3].weight *= torch.rand_like(sparse[3].weight) > 0.9
    field = bench.lineup(
        dense,
        sparse,
        engines=(bench.TorchEager(), bench.TorchChannelsLast(), bench.OnnxRuntime()),
        source=Source("worker_nets:images"),
    )
    table = compare(field, torch.randn(2, 3, 12, 12), workers=workers, **QUICK)
    for row in table.rows:
        assert row.missing is None or "not installed" in row.missing
        if row.missing is None:
            assert row.max_error < 1e-4
            assert len(row.samples) == 3
            assert row.ratio > 0
    assert table.row("aerogel (sparse)").facts["rows"]
    assert table.baseline == "torch eager (dense)"


@pytest.mark.parametrize(
    ("what", "after", "reason"),
    [
        ("crash", 0, "its process was ended by SIGSEGV"),
        ("crash", 20, "its process was ended by SIGSEGV"),  # while it was being timed
        ("exit", 0, "its process ended with exit code 3: no licence"),
        ("raise", 0, "ValueError: cannot"),
        ("raise", 20, "ValueError: cannot"),
    ],
)
def test_who_crashes_or_fails_is_named_and_the_others_go_on(workers, what, after, reason) -> None:
    entries = {"odd": odd(bench.TorchEager(), what, after), "fine": fine(bench.Aerogel())}
    table = compare(entries, torch.randn(2, 4), workers=workers, **QUICK)
    assert table.row("odd").missing == reason
    assert table.row("odd").median is None
    assert table.row("fine").median > 0
    assert table.baseline == "fine"


def test_who_hangs_is_given_up() -> None:
    with Workers(patience=15) as pool:
        entries = {"fine": fine(bench.TorchEager()), "odd": odd(bench.Aerogel(), "hang")}
        began = time.monotonic()
        table = compare(entries, torch.randn(2, 4), workers=pool, **QUICK)
        assert time.monotonic() - began < 120
        assert table.row("odd").missing == "did not answer within 15 s and was stopped"
        assert table.row("fine").median > 0
        assert [process.lost for process in pool._workers.values()] == [False, True]


def test_what_a_network_prints_is_no_answer(workers) -> None:
    entries = {"odd": odd(bench.TorchEager(), "print")}
    assert compare(entries, torch.randn(2, 4), workers=workers, **QUICK).rows[0].missing is None


def test_networks_that_cannot_be_built_or_sent_say_why(workers) -> None:
    lone = Contender(bench.TorchEager(), nn.Linear(4, 4))
    table = compare({"lone": lone}, torch.randn(2, 4), workers=workers, **QUICK)
    assert "give its source" in table.row("lone").missing
    away = Contender(bench.TorchEager(), nn.Linear(4, 4), source=Source(
        "worker_nets:missing_package"))  # fmt: skip
    table = compare({"away": away}, torch.randn(2, 4), workers=workers, **QUICK)
    assert "a_package_that_nobody_has" in table.row("away").missing
    strange = compare({"fine": fine(bench.TorchEager())}, [torch.randn(2, 4), object()],
                      workers=workers, **QUICK)  # fmt: skip
    assert "cannot go to another process" in strange.row("fine").missing


def test_threads_are_set_in_the_process(workers) -> None:
    entry = Contender(bench.TorchEager(), nn.Linear(4, 4), source=Source("worker_nets:threads"))
    for count in (1, 2):
        workers.start([entry.engine])
        x = Inputs.of(torch.randn(2, 4))
        runner = workers.runner(entry, nn.Linear(4, 4), x, count, bench.Workspace())
        assert runner.prepare()[0][0].unique().tolist() == [count]


@POSIX
def test_processes_are_kept_and_stand_still_between_their_turns(workers) -> None:
    entries = [fine(bench.TorchEager()), fine(bench.Aerogel())]
    compare(entries, torch.randn(2, 4), workers=workers, **QUICK)
    first = {name: w._process.pid for name, w in workers._workers.items()}
    compare(entries, torch.randn(3, 4), workers=workers, **QUICK)
    assert {name: w._process.pid for name, w in workers._workers.items()} == first
    for pid in first.values():
        assert state(pid) == "T"


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def gone(pid: int, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if state(pid) == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


PARENT = """
import sys, time
sys.path.insert(0, {folder!r})
import torch
from torch import nn
from aerogel import bench
entries = {{"a": bench.Contender(bench.TorchEager(), nn.Linear(4, 4),
                                 source=bench.Source("worker_nets:linear")),
            "b": bench.Contender(bench.Aerogel(), nn.Linear(4, 4),
                                 source=bench.Source("worker_nets:odd",
                                                     {{"what": "hang", "after": 0}}))}}
with bench.Workers() as pool:
    pool.start([entry.engine for entry in entries.values()])
    print(*[w._process.pid for w in pool._workers.values()], flush=True)
    bench.compare(entries, torch.randn(2, 4), threads=1, workers=pool)
"""


@POSIX
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_parent_however_it_ends(how) -> None:
    """One of them is stopped between turns, the other hangs."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(folder=str(Path(__file__).parent))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert parent.stdout is not None
    children = [int(word) for word in parent.stdout.readline().split()]
    assert len(children) == 2
    time.sleep(1)
    parent.send_signal(how)
    parent.communicate(timeout=30)
    assert all(gone(pid) for pid in children)


def test_a_worker_that_cannot_start_says_so(tmp_path) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho no such library >&2\nexit 7\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    process = Worker(str(program), tmp_path / "log")
    with pytest.raises(bench.WorkerLost, match="exit code 7: no such library"):
        process.wait_ready()
    assert process.lost


FAKE_DEEPSPARSE = """
import onnx, onnxruntime

class Engine:
    def __init__(self, path, batch_size, num_cores):
        model = onnx.load(path)
        assert model.ir_version <= 7 and model.opset_import[0].version == 13
        assert (batch_size, num_cores) == (2, 1)
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.input_names = [i.name for i in self.session.get_inputs()]

    def run(self, arrays):
        return self.session.run(None, dict(zip(self.input_names, arrays)))
"""


def test_an_engine_may_live_in_another_interpreter(tmp_path, monkeypatch, workers) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "deepsparse.py").write_text(FAKE_DEEPSPARSE)
    program = tmp_path / "python"
    run = (
        f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); "
        "sys.modules['aerogel'] = None; runpy.run_path(sys.argv[2], run_name='__main__')"
    )
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{run}" "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv(DEEPSPARSE_PYTHON, str(program))
    entry = Contender(bench.DeepSparse(), worker_nets.images().eval(), "sparse")
    row = compare([entry], torch.randn(2, 3, 12, 12), workers=workers, **QUICK).rows[0]
    assert row.missing is None
    assert row.max_error < 1e-5


def test_a_missing_peer_says_what_would_install_it(monkeypatch, workers) -> None:
    monkeypatch.delenv(DEEPSPARSE_PYTHON, raising=False)
    field = [Contender(bench.DeepSparse(), nn.Linear(4, 4), "sparse"), fine(bench.TorchEager())]
    table = compare(field, torch.randn(2, 4), workers=workers, **QUICK)
    assert DEEPSPARSE_PYTHON in table.row("deepsparse (sparse)").missing
    monkeypatch.setenv(DEEPSPARSE_PYTHON, "/nowhere/python")
    assert "'/nowhere/python' is not a program" in bench.DeepSparse().available()
    monkeypatch.setenv(DEEPSPARSE_PYTHON, sys.executable)
    here = compare({"d": field[0]}, torch.randn(2, 4), **QUICK)
    assert "process of its own" in here.rows[0].missing


@pytest.mark.parametrize(
    "example",
    [
        torch.randn(2, 4),
        (torch.arange(6).reshape(2, 3), torch.ones(2, 3, dtype=torch.bfloat16)),
        {"pair": [torch.randn(2), torch.randn(2)], "mask": torch.ones(2), "scale": 2.0},
        (torch.randn(2, 6).t(), {"flag": True, "none": None, "name": "x"}),
    ],
)
def test_inputs_arrive_as_they_were_sent(example, tmp_path) -> None:
    sent = Inputs.of(example)
    sent.save(tmp_path / "inputs")
    got = Inputs.load(tmp_path / "inputs")
    ours, spec = pytree.tree_flatten((sent.args, sent.kwargs))
    theirs, same = pytree.tree_flatten((got.args, got.kwargs))
    assert spec == same
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, Tensor) else a == b


def test_nested_inputs_reach_a_network(workers) -> None:
    example = {"pair": [torch.randn(2), torch.randn(2)], "mask": torch.ones(2), "scale": 2.0}
    entry = Contender(bench.TorchEager(), worker_nets.nested(), source=Source("worker_nets:nested"))
    assert compare([entry], example, workers=workers, **QUICK).rows[0].max_error == 0


def test_a_file_of_something_else_is_no_inputs(tmp_path) -> None:
    (tmp_path / "inputs").write_bytes(b"\x80\x04pickle")
    with pytest.raises(ValueError, match="no example inputs"):
        Inputs.load(tmp_path / "inputs")


def test_engines_are_found_by_name_and_alias() -> None:
    assert bench.find_engine("torch").name == "torch eager"
    assert bench.find_engine("Compile").name == "torch.compile"
    with pytest.raises(ValueError, match="deepsparse"):
        bench.find_engine("tensorrt")


def test_the_table_comes_back_from_its_json(workers) -> None:
    table = compare([fine(bench.TorchEager())], torch.randn(2, 4), workers=workers, **QUICK)
    assert bench.BenchTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table
