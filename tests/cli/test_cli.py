"""The command line: exit codes, clean errors, JSON alone on stdout, and quick help."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from aerogel import manifest
from aerogel.cli import terminal
from aerogel.cli.app import app

RECIPE = """
model: {name: digits_mlp, options: {hidden: [32]}}
data: digits
sparsity: 0.8
dense: {epochs: 2, lr: 0.05, eval_samples: 0}
prune: {epochs: 2, lr: 0.03, eval_samples: 0}
measure: {engines: [torch eager], batches: [1], threads: [1], rounds: 3, isolate: false}
"""


def aerogel(*arguments: str) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The networks are so small that a second thread only waits; sums depend on the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A recipe that takes seconds."""
    path = tmp_path_factory.mktemp("recipe") / "quick.yaml"
    path.write_text(RECIPE)
    return str(path)


@pytest.fixture(scope="module")
def run_folder(recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "quick"
    done = aerogel("compress", "--recipe", recipe, "--out", str(folder))
    assert done.exit_code == 0, done.output
    return folder


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['aerogel', '--help']\n"
        "from aerogel.cli import main\n"
        "try: main()\n"
        "finally: assert not {'torch', 'numpy', 'pydantic'} & set(sys.modules), 'heavy import'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["compress", "bench", "report", "systems", "reproduce", "info"])
def test_every_command_explains_itself(command: str) -> None:
    done = aerogel(command, "--help")
    assert done.exit_code == 0
    assert f"aerogel {command}" in done.output
    assert "--json" in done.output


def test_version() -> None:
    assert aerogel("--version").output.startswith("aerogel 0.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress", "--sparsity", "1.0"], "--sparsity: sparsity = 1.0: expected less than 1"),
        (["compress", "--sparsity", "nan"], "--sparsity"),
        (["compress", "--pattern", "4y1"], "--pattern"),
        (["compress", "--method", "gradual-prune"], "nearest: gradual-pruning"),
        (["compress", "--recipe", "none.yaml"], "none.yaml: No such file"),
        (["compress", "a", "--model", "b"], "two models are given"),
        (["bench", "digits_mpl"], "nearest names: digits_mlp"),
        (["bench", "digits_mlp", "--sparsity", "1"], "sparsity = 1"),
        (["bench", "digits_mlp", "--against", "torch,tensorrt"], "--against"),
        (["bench", "digits_mlp", "--batch", "1,x"], "batch = '1,x'"),
        (["bench", "digits_mlp", "--batch", "0"], "--batch"),
        (["bench", "digits_mlp", "--threads", "-1"], "threads = '-1'"),
        (["bench", "digits_mlp", "--shape", "3xx"], "shape = '3xx'"),
        (["bench", "digits_mlp", "--shape", "5"], "the model fails on example_inputs"),
        (["bench", "digits_mlp", "--plot", "none/a.html"], "there is no folder 'none'"),
        (["compress", "--dense-epochs", "-1"], "--dense-epochs: dense.epochs = -1"),
        (["report", "/nonexistent"], "no results.json"),
        (["systems", "--family", "cooking"], "there are pruning"),
        (["reproduce"], "give slugs, or --all, or --family"),
        (["reproduce", "gradul-pruning"], "nearest: gradual-pruning"),
        (["reproduce", "--family", "cooking"], "there are pruning"),
    ],
)
def test_bad_input_is_one_clean_error_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = aerogel(*arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "digits_mpl"], "nearest names: digits_mlp"),
        (["--data", "digitz"], "nearest: digits"),
        (["--model", "no_module:Net"], "cannot be imported"),
    ],
)
def test_unknown_names_list_the_nearest(
    flags: list[str], message: str, recipe: str, tmp_path: Path
) -> None:
    done = aerogel("compress", "--recipe", recipe, "--out", str(tmp_path / "out"), *flags)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())


def test_recipe_errors_show_the_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("seed: 1\nsparsity: 1.0\n")
    done = aerogel("compress", "--recipe", str(path), "--out", str(tmp_path / "out"))
    assert done.exit_code == 2
    assert f"{path}:2:11: sparsity = 1.0" in done.stderr
    assert "2 | sparsity: 1.0" in done.stderr


def test_unwritable_folder_is_bad_input(recipe: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (str(tmp_path / "file"), "/proc/aerogel"):
        done = aerogel("compress", "--recipe", recipe, "--out", folder)
        assert done.exit_code == 2
        assert folder in done.stderr


def test_changed_recipe_is_refused_by_name(recipe: str, run_folder: Path) -> None:
    done = aerogel("compress", "--recipe", recipe, "--out", str(run_folder), "--sparsity", "0.5")
    assert done.exit_code == 2
    assert "sparsity was 0.8, now 0.5" in " ".join(done.stderr.split())


def test_json_is_all_there_is_on_stdout(recipe: str, run_folder: Path) -> None:
    done = aerogel("compress", "--recipe", recipe, "--out", str(run_folder), "--json")
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert found["quality"][0]["name"] == "accuracy"
    assert found == json.loads((run_folder / "results.json").read_text())


def test_last_screen_says_what_was_won_and_where_the_report_lies(
    recipe: str, run_folder: Path
) -> None:
    done = aerogel("compress", "--recipe", recipe, "--out", str(run_folder))
    for part in ("accuracy", "x smaller", "aerogel (sparse)", "torch eager (dense)", "points"):
        assert part in done.stdout
    assert str(run_folder / "report.html") in done.stdout
    assert len(done.stdout.splitlines()) < 40


def test_report_is_drawn_again_from_results(run_folder: Path) -> None:
    page = run_folder / "report.html"
    before = page.read_text()
    page.unlink()
    done = aerogel("report", str(run_folder))
    assert done.exit_code == 0
    assert page.read_text() == before


def test_bench_times_a_run_and_a_network(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AEROGEL_DEEPSPARSE_PYTHON", raising=False)
    page = tmp_path / "bench.html"
    quick = ["--rounds", "3", "--json", "--plot", str(page), "--against", "torch,deepsparse"]
    labels = ["torch eager (dense)", "torch eager (sparse)", "deepsparse (sparse)",
              "aerogel (sparse)"]  # fmt: skip
    for name, batches in ((str(run_folder), "1"), ("digits_mlp", "1,2")):
        done = aerogel("bench", name, "--batch", batches, *quick)
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)
        assert [str(one["latency"]["batch"]) for one in found] == batches.split(",")
        for one in found:
            rows = {row["label"]: row for row in one["latency"]["rows"]}
            assert list(rows) == labels
            assert "AEROGEL_DEEPSPARSE_PYTHON" in rows["deepsparse (sparse)"]["missing"]
            assert rows["aerogel (sparse)"]["low"] <= rows["aerogel (sparse)"]["median"]
            assert one["max_error"] < 1e-4
            assert one["layers"]
    assert "digits_mlp, 90% zeros" in page.read_text()
    assert "latency-1" in page.read_text()


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_the_engines_of_bench(number: int, code: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "aerogel", "bench", "digits_mlp", "--against", "torch"]
    parent = subprocess.Popen(
        [*command, "--rounds", "100000"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    end = time.monotonic() + 60
    while len(children_of(parent.pid)) < 2 and time.monotonic() < end:
        time.sleep(0.1)
    engines = children_of(parent.pid)
    time.sleep(1)
    parent.send_signal(number)
    _, said = parent.communicate(timeout=60)
    assert parent.returncode == code, said
    assert not list(tmp_path.iterdir())
    assert "Traceback" not in said
    assert len(engines) == 2
    assert not any(os.path.exists(f"/proc/{pid}") for pid in engines)


def children_of(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[1]) == pid:
            found.append(int(path.parent.name))
    return found


def test_systems_lists_the_manifest() -> None:
    rows = json.loads(aerogel("systems", "--json").stdout)
    assert rows == [system.to_dict() for system in manifest.load_systems()]
    assert "gradual-pruning" in aerogel("systems", "--family", "pruning").stdout
    assert aerogel("systems", "--markdown").stdout.strip() == manifest.systems_table_markdown()


def test_info_says_that_the_kernels_are_missing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "aerogel", "info", "--json"],
        env={**os.environ, "AEROGEL_NATIVE": "/nowhere/_native.so"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["kernels"] | {"reference_mode": False} == {
        "isa": None,
        "available": [],
        "native": False,
        "reference_mode": False,
    }
    assert facts["hardware"]["kernels"] == "reference"


def test_info_names_machine_kernels_and_engines() -> None:
    facts = json.loads(aerogel("info", "--json").stdout)
    assert facts["kernels"]["isa"] in facts["kernels"]["available"]
    assert facts["packages"]["torch"]
    assert "torch" in aerogel("info").stdout


def test_failed_claim_exits_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    from aerogel.report import evidence

    def found(ours: float) -> evidence.Evidence:
        claims = (evidence.Claim("sparse against dense", ours, 90.0, 0.5),)
        return evidence.Evidence("gradual-pruning", (), claims)

    for ours, code, word in ((91.0, 0, "pass"), (90.1, 1, "FAIL"), (float("nan"), 1, "FAIL")):
        result = found(ours)
        monkeypatch.setattr(evidence, "reproduce", lambda *a, r=result, **k: r)
        done = aerogel("reproduce", "gradual-pruning")
        assert done.exit_code == code
        assert word in done.stdout
        assert json.loads(aerogel("reproduce", "gradual-pruning", "--json").stdout)


def test_an_interrupt_that_a_library_turns_into_an_error_of_its_own_is_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(typer.Exit) as left, terminal.guarded("All is kept."):
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                raise ValueError("could not determine the shape") from None
        assert left.value.exit_code == 130
        assert "All is kept." in capsys.readouterr().err
        with pytest.raises(typer.Exit) as left, terminal.guarded():
            raise ValueError("threads must be at least 1, got 0")
        assert left.value.exit_code == 2
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_exits_with_130_and_the_run_goes_on_later(
    recipe: str, run_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "aerogel", "compress", "--recipe", recipe, "--out", str(out)]
    command += ["--threads", "1"]
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A runner that was started in the background ignores SIGINT, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert child.stderr is not None
    said = ""
    for line in child.stderr:
        said += line
        if line.startswith("prune"):
            break
    child.send_signal(signal.SIGINT)
    stdout, rest = child.communicate(timeout=120)
    assert child.returncode == 130, said + rest
    assert "goes on from here" in rest
    assert "Traceback" not in rest
    assert stdout == ""
    assert not [p for p in out.rglob("*") if p.name.endswith(".tmp")]
    done = aerogel("compress", "--recipe", recipe, "--out", str(out))
    assert done.exit_code == 0
    assert "dense: done before" in done.stderr
    same = "model.safetensors"
    assert (out / same).read_bytes() == (run_folder / same).read_bytes()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_broken_stdout_is_no_traceback() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "aerogel", "systems"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr


def test_progress_in_a_log_file_has_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 100.0, 110.0, 116.0, 120.0])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    with terminal.Terminal().task("dense", "steps") as task:
        for done in (40, 60, 72, 80):  # at 100 s (resumed at step 40), 110 s, 116 s and 120 s
            task.update(done, 100, "loss 1.5")
    said = capsys.readouterr().err.splitlines()
    assert said == ["  dense 72/100 steps, 2 steps/s, 14 s left loss 1.5"]


def test_sat_prints_what_a_training_step_takes() -> None:
    shown = CliRunner().invoke(app, ["sat", "resnet18", "--size", "64", "--layers"])
    assert shown.exit_code == 0, shown.output
    assert "x the dense step" in shown.output
    assert "layer4.1.conv2" in shown.output
    bad = CliRunner().invoke(app, ["sat", "resnet18", "--nm", "2-8"])
    assert bad.exit_code == 2
    assert "nm = '2-8'" in bad.output
