"""Training runs as a program, started by the tests once or several times side by side.

    python worker.py OUT STATE_DIR|- KILL_AFTER_STEPS|0 CASE...

Each case is words `key=value` joined by commas, or `plain`.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from train_toys import pruner_of, toy_dataset, toy_model

from aerogel.train import Callback, TrainConfig, fit
from processes import leave_group


class KilledAfter(Callback):
    """Kills its own process in the middle of training, as a power cut would."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_optimizer_step(self, run) -> None:
        if run.step == self.steps:
            os.kill(os.getpid(), signal.SIGKILL)


def train(case: str, folder: str | None = None, kill: int = 0) -> dict[str, Tensor]:
    """Train and prune the toy network; return everything that the outcome consists of."""
    extra = dict(word.split("=") for word in case.split(",") if "=" in word)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = toy_model(drop_rate=float(extra.get("drop", 0)))
    config = TrainConfig(
        steps=18,
        batch_size=16,
        lr=0.05,
        optimizer=extra.get("optimizer", "sgd"),
        augment=extra.get("augment", "standard"),
        grad_accumulation=int(extra.get("parts", 1)),
        gradient_clip=1.0,
    )
    box = {}

    def wrap(model, optimizer):
        box["pruner"] = pruner_of(model, optimizer)
        return box["pruner"]

    history = fit(
        model,
        toy_dataset(),
        config,
        optimizer_wrapper=wrap,
        callbacks=[KilledAfter(kill)],
        teacher=toy_model() if "teacher" in extra else None,
        resume_dir=folder,
        save_seconds=0.0,
    )
    torch.set_num_threads(threads)
    outcome = {f"mask.{k}": v.clone() for k, v in box["pruner"].masks.items()}
    box["pruner"].finalize()
    outcome |= {f"model.{k}": v.clone() for k, v in model.state_dict().items()}
    curves = ((history.steps, "loss"), (history.epochs, "accuracy"))
    for rows, name in curves:
        outcome[name] = torch.tensor([row[name] for row in rows], dtype=torch.float64)
    return outcome


def main() -> None:
    out, folder, kill, *cases = sys.argv[1:]
    outcomes = [train(case, None if folder == "-" else folder, int(kill)) for case in cases]
    rank = int(os.environ.get("RANK", 0))
    tensors = {f"{n}.{k}": v for n, one in enumerate(outcomes) for k, v in one.items()}
    save_file(tensors, f"{out}.{rank}.safetensors")


if __name__ == "__main__":
    main()
    leave_group()
