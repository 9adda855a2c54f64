"""Run a compression in child processes that are killed at random moments, until one finishes.

    python kills.py OUT RECIPE KILLS SEED

What a kill leaves behind depends only on which file operations came before it, so a child kills
itself right before a randomly chosen one: however busy the machine is, kills fall into training,
into saving and between the stages alike. The parent only imports; children are forked from it
before any thread exists, so that a run starts within milliseconds. Prints what each kill prevented.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # compiling needs it, and each child would load it anew

from aerogel import compress

OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "tempfile.mkstemp")
# An uninterrupted run of the tests' recipe makes about 80 before it measures.
MOST_OPERATIONS = 30


def kill_before(operation: int, out: str) -> None:
    """Die at the given file operation under `out`, counted from 1."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in OPERATIONS and str(arguments[0]).startswith(out):
            count += 1
            if count == operation:
                os.write(1, f"{event} {arguments[0]}\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def run(out: str, recipe: str, operation: int | None) -> int:
    """Compress in a child, and return how it ended."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if operation is not None:
                kill_before(operation, out)
            compress.run(compress.load_recipe(recipe), Path(out))
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def main(out: str, recipe: str, kills: int, seed: int) -> None:
    """Kill so many runs, then let one finish."""
    torch.set_num_threads(1)
    choose = random.Random(seed)
    for _ in range(kills):
        ended = run(out, recipe, choose.randint(1, MOST_OPERATIONS))
        if ended not in (0, signal.SIGKILL):
            sys.exit(f"a run ended with status {ended}")
    if ended := run(out, recipe, None):
        sys.exit(f"the last run ended with status {ended}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
