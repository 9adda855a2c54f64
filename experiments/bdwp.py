"""N:M training in both directions against SR-STE and pruning at once, and the accelerator's model.

Fashion-MNIST, 6,000 training images pooled to 14x14, all 10,000 test images; a multilayer
perceptron 196-256-256-128-10 whose two middle layers are 2:8 or 1:16. SGD, learning rate 0.1 to 0
along a cosine, momentum 0.9, weight decay 1e-4, batch 100, 900 steps. The cycle model trains
ResNet-18 on 64x64 images with a batch of 256.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import nn

import small_fashion
from aerogel.insight import SATModel
from aerogel.models import create_model
from aerogel.pruning import BidirectionalNM
from aerogel.report.evidence import Claim, Result, mean
from aerogel.sparsity import magnitude_

SLUG = "bdwp"
SEEDS = (0, 1, 2)

STEPS = 900
MIDDLE = ("2.weight", "4.weight")
MODES = ("bdwp", "sr_ste", "sdgp")
PATTERNS = ((2, 8), (1, 16))


def run(seed: int) -> Result:
    """Train dense and by every recipe, prune the dense network at once, run the cycle model."""
    started = time.perf_counter()
    images = small_fashion.load()
    metrics = dict(_cycles())
    dense = _train(images, seed, None)
    metrics["dense"] = small_fashion.accuracy(dense, images)
    state = {name: value.clone() for name, value in dense.state_dict().items()}
    for n, m in PATTERNS:
        for mode in MODES:
            model = _train(images, seed, (n, m, mode))
            metrics[f"{mode} {n}:{m}"] = small_fashion.accuracy(model, images)
        magnitude_(dense, pattern=f"{n}:{m}", include=MIDDLE)
        metrics[f"one-shot {n}:{m}"] = small_fashion.accuracy(dense, images)
        dense.load_state_dict(state)
    return Result(SLUG, seed, metrics, time.perf_counter() - started)


def claims(results: Sequence[Result]) -> list[Claim]:
    """The thresholds, on the means over seeds."""
    loss = "0.56 % lost on average, 2:8"
    wanted = [
        ("bdwp 2:8", "dense", -1.0, loss),
        ("bdwp 2:8", "one-shot 2:8", 0.4, ""),
        ("bdwp 1:16", "dense", -1.5, ""),
        ("bdwp 1:16", "sr_ste 1:16", -1.0, ""),
        ("bdwp 1:16", "one-shot 1:16", 25.0, ""),
    ]
    found = [
        Claim(
            text=f"{ours} against {baseline}",
            ours=mean(results, ours),
            baseline=mean(results, baseline),
            threshold=threshold,
            unit="% test accuracy",
            paper=paper,
        )
        for ours, baseline, threshold, paper in wanted
    ]
    for name, least, most, paper in (
        ("cycles bdwp 2:8, products", 1.90, 2.00, ""),
        ("cycles bdwp 2:8", 1.60, 1.99, "1.75x on average over networks"),
        ("cycles sr_ste 2:8", 1.25, 1.34, ""),
        ("cycles bdwp 2:4", 1.30, 1.50, ""),
    ):
        ours = mean(results, name)
        for text, bound, higher in (("at least", least, True), ("at most", most, False)):
            found.append(
                Claim(
                    text=f"{name}: speed-up {text} {bound:g}",
                    ours=ours,
                    baseline=bound,
                    threshold=0.0,
                    unit="x dense training",
                    paper=paper,
                    higher_is_better=higher,
                )
            )
    return found


@lru_cache(maxsize=1)
def _cycles() -> dict[str, float]:
    """Speed-ups by the model of the accelerator; no seed changes them."""
    network, sat = create_model("resnet18", num_classes=200), SATModel()
    shape, batch = (3, 64, 64), 256
    dense = sat.estimate(network, shape, batch, mode="dense")
    bdwp = sat.estimate(network, shape, batch, 2, 8, "bdwp")
    return {
        "cycles bdwp 2:8, products": dense.matmul_cycles / bdwp.matmul_cycles,
        "cycles bdwp 2:8": bdwp.speedup,
        "cycles sr_ste 2:8": sat.estimate(network, shape, batch, 2, 8, "sr_ste").speedup,
        "cycles bdwp 2:4": sat.estimate(network, shape, batch, 2, 4, "bdwp").speedup,
    }


def _train(
    images: small_fashion.Images, seed: int, recipe: tuple[int, int, str] | None
) -> nn.Module:
    model = small_fashion.mlp((196, 256, 256, 128, 10), seed)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    if recipe is None:
        small_fashion.train(model, images, optimizer, STEPS, seed=seed)
        return model
    n, m, mode = recipe
    pruner = small_fashion.train(
        model,
        images,
        optimizer,
        STEPS,
        seed=seed,
        wrapper=lambda model, optimizer: BidirectionalNM(
            model, optimizer, n, m, mode=mode, include=MIDDLE
        ),
    )
    pruner.finalize()
    return model
