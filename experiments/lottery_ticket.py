"""Winning tickets against the dense network, new initial values, and shuffled masks.

Fashion-MNIST, 6,000 training images pooled to 14x14, 5,000 test images; 5,000 other training
images only say when training could have stopped. A LeNet 196-300-100-10 is pruned in 8 rounds of
40 % of the alive weights (20 % in the last layer). Every network trains for the same 700 iterations
on the same batches of 60, with Adam at 1.2e-3.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import small_fashion
from aerogel.models import LeNet300
from aerogel.pruning import LotteryTicket, StaticSparseTrainer, TrainOutcome
from aerogel.report.evidence import Claim, Result, as_script, mean
from aerogel.sparsity import MaskSet, Snapshot

SLUG = "lottery-ticket"
SEEDS = (0, 1, 2)

TRAIN_IMAGES, HELD_OUT_IMAGES, TEST_IMAGES = 6_000, 5_000, 5_000
STEPS, BATCH, LEARNING_RATE = 700, 60, 1.2e-3
ROUNDS, RATE, OUTPUT_RATE = 8, 0.4, 0.2
COMPARED = (6, 8)  # rounds whose tickets meet their controls
LOOK_EVERY = 50  # iterations between two looks at the held-out loss


class Split(NamedTuple):
    """Images (N, 196) and labels (N,)."""

    images: Tensor
    labels: Tensor


def run(seed: int) -> Result:
    """Search once, train the controls, and measure test accuracy in per cent."""
    started = time.perf_counter()
    metrics: dict[str, float] = {}
    search = LotteryTicket(
        lambda: LeNet300(img_size=14),
        lambda model, masks, start, snapshot_at: _train(model, masks, start, snapshot_at, seed),
        rounds=ROUNDS,
        rate=RATE,
        output_rate=OUTPUT_RATE,
        generator=torch.Generator().manual_seed(seed),
    )
    for found in search.run().rounds:
        name = f"ticket, round {found.round}" if found.round else "dense"
        metrics[name] = found.metrics["test"]
        if found.round in (0, *COMPARED):
            metrics[f"{name}: stops at iteration"] = found.metrics["early_stop"]
            metrics[f"{name}: accuracy where it stops"] = found.metrics["test_at_stop"]
            metrics[f"{name}: train accuracy"] = found.metrics["train"]
            metrics[f"{name}: weights left"] = 100.0 * found.density
    for number in COMPARED:
        controls = {
            "re-init": search.random_reinit(number, seed=1_000 + seed),
            "shuffled mask": search.shuffled_mask(number, seed=1_000 + seed),
            "reused values": search.reuse(number, seed=1_000 + seed),
        }
        for name, (state, masks) in controls.items():
            model = LeNet300(img_size=14)
            model.load_state_dict(state)
            outcome = _train(model, masks, 0, None, seed)
            metrics[f"{name}, round {number}"] = outcome.metrics["test"]
    return Result(SLUG, seed, metrics, time.perf_counter() - started)


def claims(results: Sequence[Result]) -> list[Claim]:
    """The thresholds, on the means over seeds."""
    wanted = [
        (6, "dense", -0.3, "LeNet on MNIST: at 3.6 % of the weights back at the dense accuracy"),
        (6, "re-init, round 6", 2.0, "re-initialised tickets are slower and worse (0.5 at 21 %)"),
        (6, "shuffled mask, round 6", 2.5, ""),
        (8, "shuffled mask, round 8", 4.0, ""),
    ]
    return [
        Claim(
            text=f"ticket of round {number} against {baseline}",
            ours=mean(results, f"ticket, round {number}"),
            baseline=mean(results, baseline),
            threshold=threshold,
            paper=figure,
            unit="% test accuracy",
        )
        for number, baseline, threshold, figure in wanted
    ]


def _data() -> tuple[Split, Split, Split]:
    """To train on, to stop by, and to test on."""
    images = small_fashion.load(TRAIN_IMAGES + HELD_OUT_IMAGES, TEST_IMAGES)
    return (
        Split(images.train[:TRAIN_IMAGES], images.labels[:TRAIN_IMAGES]),
        Split(images.train[TRAIN_IMAGES:], images.labels[TRAIN_IMAGES:]),
        Split(images.test, images.test_labels),
    )


def _train(
    model: nn.Module, masks: MaskSet, start: int, snapshot_at: int | None, seed: int
) -> TrainOutcome:
    train, held_out, test = _data()
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    trainer = StaticSparseTrainer(model, optimizer, masks)
    generator = torch.Generator().manual_seed(seed)
    snapshot, batches = None, []
    best_loss, early_stop, test_at_stop = float("inf"), 0, 0.0
    for step in range(STEPS):
        if not batches:
            batches = list(torch.randperm(TRAIN_IMAGES, generator=generator).split(BATCH))
        chosen = batches.pop()
        if step == snapshot_at:
            snapshot = Snapshot.capture(model, step=step)
        if step < start:  # keeps the order of the data
            continue
        optimizer.zero_grad()
        F.cross_entropy(model(train.images[chosen]), train.labels[chosen]).backward()
        trainer.step()
        if (step + 1) % LOOK_EVERY == 0 and (loss := _loss(model, held_out)) < best_loss:
            best_loss, early_stop, test_at_stop = loss, step + 1, _accuracy(model, test)
    trainer.finalize()
    metrics = {
        "test": _accuracy(model, test),
        "train": _accuracy(model, train),
        "early_stop": float(early_stop),
        "test_at_stop": test_at_stop,
    }
    return TrainOutcome(STEPS, metrics, snapshot)


@torch.no_grad()
def _loss(model: nn.Module, split: Split) -> float:
    return F.cross_entropy(model(split.images), split.labels).item()


@torch.no_grad()
def _accuracy(model: nn.Module, split: Split) -> float:
    return 100.0 * (model(split.images).argmax(dim=1) == split.labels).float().mean().item()


if __name__ == "__main__":
    as_script(run, claims, SEEDS)
