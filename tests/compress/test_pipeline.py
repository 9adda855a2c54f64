"""The main job on a network that trains in seconds: what it writes, and that kills are harmless."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import aerogel
from aerogel import compress, runtime, sparsity
from aerogel.compress import pipeline
from aerogel.report import Results

KILLS = Path(__file__).with_name("kills.py")


def test_run_leaves_every_file_and_a_sparse_network(finished_run: tuple[Path, Results]) -> None:
    folder, results = finished_run
    names = {path.name for path in folder.iterdir()}
    assert names == {
        ".aerogel",
        "dense.safetensors",
        "model.safetensors",
        "recipe.yaml",
        "report.html",
        "results.json",
    }
    state = aerogel.load(folder / "model.safetensors")
    for name in ("features.0.weight", "features.2.weight"):
        weight = state[name]
        assert int(weight.count_nonzero()) == round(weight.numel() * 0.2)
    assert results.size.sparsity == pytest.approx(0.8, abs=1e-3)
    assert results.quality[0].name == "accuracy"
    assert min(results.quality[0].dense or 0, results.quality[0].sparse or 0) > 0.8
    assert (results.size.sparse_bytes or 0) < 0.7 * (results.size.dense_bytes or 0)


def test_results_hold_all_that_the_report_shows(finished_run: tuple[Path, Results]) -> None:
    folder, results = finished_run
    assert Results.from_file(folder / "results.json").to_dict() == results.to_dict()
    page = (folder / "report.html").read_text()
    assert "digits_mlp" in page
    assert {(curve.stage, curve.name) for curve in results.curves} >= {
        ("dense", "loss"),
        ("dense", "test accuracy"),
        ("prune", "loss"),
        ("prune", "sparsity"),
    }
    (latency,) = results.latency
    assert {(row.engine, row.weights) for row in latency.rows} >= {
        ("torch eager", "dense"),
        ("aerogel", "sparse"),
    }
    assert [layer.sparsity for layer in results.layers[:2]] == pytest.approx([0.8, 0.8], abs=1e-3)


def test_training_state_is_gone_once_a_stage_is_done(finished_run: tuple[Path, Results]) -> None:
    folder, _ = finished_run
    assert not list((folder / ".aerogel" / "training").iterdir())


def test_model_file_says_which_network_and_pattern_it_holds(
    finished_run: tuple[Path, Results],
) -> None:
    folder, _ = finished_run
    info = runtime.inspect(folder / "model.safetensors")
    assert json.loads(info.metadata["aerogel.model"])["name"] == "digits_mlp"
    patterns = {tensor.name: tensor.pattern for tensor in info.tensors}
    assert patterns["features.0.weight"] == "unstructured"


def test_repeating_a_finished_run_does_no_work(
    finished_run: tuple[Path, Results], tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, results = finished_run
    monkeypatch.setattr(pipeline, "load_model", None)
    again = compress.run(compress.load_recipe(tiny_recipe), folder)
    assert again is not None
    assert again.quality == results.quality
    assert again.latency == results.latency


def test_effective_recipe_reproduces_the_run(
    finished_run: tuple[Path, Results], tmp_path: Path
) -> None:
    folder, _ = finished_run
    again = compress.load_recipe(folder / "recipe.yaml")
    compress.run(again, tmp_path / "again")
    assert _weights(tmp_path / "again") == _weights(folder)


def test_killed_run_ends_like_an_uninterrupted_one(
    finished_run: tuple[Path, Results], tiny_recipe: Path, tmp_path: Path
) -> None:
    folder, results = finished_run
    out = tmp_path / "killed"
    command = [sys.executable, str(KILLS), str(out), str(tiny_recipe), "8", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 5
    assert "training" in done.stdout
    assert _weights(out) == _weights(folder)
    ended = Results.from_file(out / "results.json")
    assert ended.quality == results.quality
    assert ended.curves == results.curves


def _weights(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "dense.safetensors").read_bytes(), (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["dense.safetensors", "model.safetensors"])
def test_lost_or_damaged_output_is_made_again(
    finished_run: tuple[Path, Results], tiny_recipe: Path, tmp_path: Path, name: str
) -> None:
    folder, _ = finished_run
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    damaged = bytearray((copy / name).read_bytes())
    damaged[-1] ^= 1
    (copy / name).write_bytes(bytes(damaged))
    compress.run(compress.load_recipe(tiny_recipe), copy)
    assert _weights(copy) == _weights(folder)


def test_a_run_whose_own_measurement_fails_can_be_finished_later(
    finished_run: tuple[Path, Results],
    tiny_recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished_run[0], copy)
    for marker in (copy / ".aerogel" / "stages").glob("measure-*"):
        marker.unlink()

    def broken(*args: object, **kwargs: object) -> None:
        raise NotImplementedError("no such layer")

    with monkeypatch.context() as patch:
        patch.setattr(runtime, "compile", broken)
        with pytest.raises(RuntimeError, match=r"could not be measured.*no such layer"):
            compress.run(compress.load_recipe(tiny_recipe), copy)
    results = compress.run(compress.load_recipe(tiny_recipe), copy)
    assert results is not None
    assert [row.missing for row in results.latency[0].rows if row.engine == "aerogel"] == [None]


def test_engines_with_a_process_each_measure_the_same_networks(
    tiny_recipe: Path, tmp_path: Path
) -> None:
    """The networks that the engines' processes build are those of the run's files."""
    apart = {"measure.isolate": True, "measure.threads": [1, 2]}
    results = compress.run(compress.load_recipe(tiny_recipe, apart), tmp_path / "apart")
    assert results is not None
    assert [latency.threads for latency in results.latency] == [1, 2]
    for latency in results.latency:
        assert [row.missing for row in latency.rows] == [None] * 3
        assert all(row.max_error is not None and row.max_error < 1e-4 for row in latency.rows)


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"],
    # Without --multi_gpu, accelerate starts one process on a machine that has no GPU.
    "accelerate launch": ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "-m"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_train_what_one_trains(
    finished_run: tuple[Path, Results], tiny_recipe: Path, tmp_path: Path, launcher: str
) -> None:
    folder, _ = finished_run
    out = tmp_path / "two"
    command = ["aerogel", "compress", "--recipe", str(tiny_recipe), "--out", str(out), "--json"]
    done = subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[launcher], *command],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["quality"]
    one, two = (aerogel.load(path / "model.safetensors") for path in (folder, out))
    for name in ("features.0.weight", "features.2.weight"):
        same = ((one[name] != 0) == (two[name] != 0)).float().mean()
        assert same > 0.99, name


def test_diverging_training_says_so(tiny_recipe: Path, tmp_path: Path) -> None:
    wild = compress.load_recipe(tiny_recipe, {"dense.lr": 1e5, "dense.schedule": "constant"})
    with pytest.raises((FloatingPointError, ValueError), match=r"loss is|NaN or infinite"):
        compress.run(wild, tmp_path / "wild")


def test_nothing_to_train_on_is_refused_before_training(tmp_path: Path) -> None:
    recipe = compress.load_recipe("digits", {"dense.batch_size": 5000})
    with pytest.raises(ValueError, match="batch_size = 5000 is larger than the 1438"):
        compress.run(recipe, tmp_path / "out")


def test_blocks_and_nm_reach_the_file(tiny_recipe: Path, tmp_path: Path) -> None:
    for pattern, zeros in (("4x1", 0.75), ("2:4", 0.5)):
        flags = {"pattern": pattern, "sparsity": zeros, "dense.epochs": 1, "prune.epochs": 1}
        out = tmp_path / pattern.replace(":", "-")
        began = time.monotonic()
        recipe = compress.load_recipe(tiny_recipe, flags)
        dense, sparse = pipeline._Run(recipe, _folder(out, recipe), pipeline.Silent()).train()
        weight = aerogel.load(out / "model.safetensors")["features.0.weight"]
        rule = sparsity.parse_pattern(pattern)
        assert rule.is_satisfied(weight != 0)
        assert torch.isclose((weight == 0).float().mean(), torch.tensor(zeros), atol=1e-2)
        assert time.monotonic() - began < 60
        assert dense.files
        assert sparse.files


def _folder(path: Path, recipe: compress.Recipe) -> pipeline.RunFolder:
    with pipeline.RunFolder.opened(path, recipe) as folder:
        return folder
