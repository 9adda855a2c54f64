"""`aerogel attention`: calibrated files are used, results are kept, errors are clean."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from aerogel import models
from aerogel.cli import terminal
from aerogel.cli.app import app

pytest.importorskip("transformers")
SMALL = ["--sequences", "1", "--probes", "1", "--rounds", "1"]


def aerogel(*arguments: object) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(app, ["attention", *map(str, arguments)])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level model and a text."""
    folder = tmp_path_factory.mktemp("attention")
    torch.manual_seed(0)
    model = models.create_model(
        "tiny_lm", hidden_size=32, intermediate_size=32, num_hidden_layers=2
    )
    model.save_pretrained(folder / "model")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return folder


@pytest.fixture(scope="module")
def selector(place: Path) -> Path:
    """A file that `calibrate` wrote."""
    out = place / "patterns.safetensors"
    candidates = '[["vertical_and_slash", 4, 8], ["stream_llm", 2, 16]]'
    options = [f"candidates={candidates}", "last-q=8", "force_first=2", "force_local=4", "block=16"]
    flags = [flag for option in options for flag in ("--option", option)]
    run = aerogel(
        *("calibrate", place / "model", "--method", "minference", "--out", out, *flags),
        *("--data", place / "text.txt", "--windows", 2, "--length", 64, "--json"),
    )
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["slug"] == "minference"
    return out


def test_evaluation_compares_and_goes_on(place, selector):
    out = place / "results"
    command = ["evaluate", place / "model", "--data", place / "text.txt", "--out", out, *SMALL]
    run = aerogel(*command, "--methods", f"dense,{selector}", "--lengths", "500", "--json")
    assert run.exit_code == 0, run.output
    dense, sparse = json.loads(run.stdout)
    assert (dense["method"], sparse["method"]) == ("dense", "patterns")
    assert dense["density"] == 1.0 > sparse["density"]
    assert not sparse["missing"]
    parts = {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}
    run = aerogel(*command, "--methods", f"dense,{selector}", "--lengths", "500,600")
    assert run.exit_code == 0, run.output
    assert "patterns" in run.stdout
    assert {path: path.stat().st_mtime_ns for path in parts} == parts
    assert len(list((out / "parts").iterdir())) == 2 * len(parts)
    assert "| patterns |" in (out / "attention.md").read_text()
    assert "patterns" in (out / "attention.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--methods", "nothing"), "expected dense"),
        (("--lengths", "4x"), "such as 512,4k"),
        (("--lengths", "1m"), "such as 512,4k"),
        (("--lengths", "8k"), "tokens, expected at least"),
        (("--data", "no-such-text"), "expected brown, python or a file"),
        (("--methods", "minference:lastq=3"), "has no option lastq"),
    ],
)
def test_bad_input_is_one_clean_paragraph(place, tmp_path, arguments, said):
    defaults = ["--data", place / "text.txt", "--lengths", "64", "--out", tmp_path / "out"]
    run = aerogel("evaluate", place / "model", *defaults, *arguments)
    assert run.exit_code == terminal.BAD_INPUT
    assert said in " ".join(run.stderr.split())
    assert not (tmp_path / "out" / "attention.md").exists()


def test_a_model_that_is_none_is_named(place, tmp_path):
    common = ("--data", place / "text.txt", "--lengths", "64", "--out", tmp_path)
    run = aerogel("evaluate", tmp_path / "nowhere", *common)
    assert run.exit_code == terminal.BAD_INPUT
    assert "folder of a transformers model" in " ".join(run.stderr.split())


def test_calibration_writes_nothing_where_it_cannot(place, tmp_path):
    out = tmp_path / "none" / "x.safetensors"
    run = aerogel("calibrate", place / "model", "--method", "minference", "--out", out)
    assert run.exit_code == terminal.BAD_INPUT
    assert "there is no folder" in " ".join(run.stderr.split())
    run = aerogel(
        *("calibrate", place / "model", "--method", "nothing", "--out", tmp_path / "x"),
        *("--data", place / "text.txt", "--windows", 1, "--length", 32),
    )
    assert run.exit_code == terminal.BAD_INPUT
    assert not (tmp_path / "x").exists()
