"""Several processes, and killed ones: the result is that of one undisturbed process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("aerogel.pruning")
from worker import train

WORKER = Path(__file__).with_name("worker.py")
CASES = ("plain", "parts=2,augment=strong")
Outcome = dict[str, Tensor]


def start(*arguments: object, processes: int = 1) -> subprocess.CompletedProcess[str]:
    command = [sys.executable]
    if processes > 1:
        launch = ["--standalone", f"--nproc-per-node={processes}"]
        command += ["-m", "torch.distributed.run", *launch]
    return subprocess.run(
        [*command, str(WORKER), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


def outcomes(out: Path, *arguments: object, processes: int = 1) -> list[Outcome]:
    """What each rank ended with."""
    done = start(out, *arguments, processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    return [load_file(f"{out}.{rank}.safetensors") for rank in range(processes)]


def assert_same_bits(one: Outcome, other: Outcome) -> None:
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def case(outcome: Outcome, number: int) -> Outcome:
    prefix = f"{number}."
    return {k.removeprefix(prefix): v for k, v in outcome.items() if k.startswith(prefix)}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[Outcome]:
    return outcomes(tmp_path_factory.mktemp("two") / "out", "-", 0, *CASES, processes=2)


def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path):
    options = "optimizer=adamw,drop=0.3,teacher=1,augment=strong"
    state = tmp_path / "state"
    for kill_after in (5, 11):
        killed = start(tmp_path / "killed", state, kill_after, options)
        assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    (resumed,) = outcomes(tmp_path / "resumed", state, 0, options)
    whole = train(options)
    assert_same_bits(whole, case(resumed, 0))
    assert_same_bits(whole, train(options, str(state)))


def test_all_processes_end_with_the_same_bits(two_processes: list[Outcome]):
    assert_same_bits(*two_processes)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_two_processes_equal_one(two_processes: list[Outcome], number: int):
    one, two = train(CASES[number]), case(two_processes[0], number)
    assert any(key.startswith("mask") for key in one)
    for key, value in one.items():
        if key.startswith("mask"):
            assert torch.equal(value, two[key]), key
        else:
            torch.testing.assert_close(two[key], value, rtol=2e-3, atol=2e-4, msg=key)


def test_two_killed_processes_end_with_the_same_bits(two_processes: list[Outcome], tmp_path: Path):
    state = tmp_path / "state"
    assert start(tmp_path / "killed", state, 7, CASES[0], processes=2).returncode != 0
    resumed = outcomes(tmp_path / "resumed", state, 0, CASES[0], processes=2)
    assert_same_bits(case(two_processes[0], 0), case(resumed[0], 0))
