"""A wave surrogate with one-way convolutions against a plain one and a plain one thinned to fit.

2-D waves (grid 24, 96 leapfrog steps, zone 16x16, 16 frames): 400 training and 100 test samples
from one distribution. Decoder of 4 convolutions 3x3x3; plain with 16 channels, one-way chain with
16, plain with 9 (as many parameters in the convolutions as one-way). Adam, learning rate 2e-3 to 0
along a cosine, batch 20, 40 epochs. The error is the mean squared one over the variance of the
field. Submodel: the border values drive leapfrog on the zone; the relative error is its interior's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aerogel.data import wave2d
from aerogel.models import WaveSurrogate
from aerogel.nn import OneWayConv3d
from aerogel.report.evidence import Claim, Result, mean

SLUG = "a-priori-compression"
SEEDS = (0, 1, 2)

GRID, STEPS, FRAMES, ZONE = 24, 96, 16, 16
TRAIN, TEST, EPOCHS, BATCH, RATE = 400, 100, 40, 20, 2e-3
PLAIN, ONE_WAY, THIN = "plain C=16", "one-way C=16", "thin plain C=9"
NETWORKS: dict[str, tuple[int, Callable[..., nn.Module]]] = {
    PLAIN: (16, nn.Conv3d),
    ONE_WAY: (16, OneWayConv3d),
    THIN: (9, nn.Conv3d),
}


def run(seed: int) -> Result:
    """Make the waves and train the three networks on them."""
    started = time.perf_counter()
    params, fields = wave2d.generate(TRAIN + TEST, seed, GRID, STEPS, FRAMES, zone=ZONE)
    target = wave2d.scale_to_unit(fields, fields[:TRAIN])
    lows, highs = torch.tensor(list(wave2d.RANGES.values())).T
    inputs = 2 * (params - lows) / (highs - lows) - 1
    metrics: dict[str, float] = {}
    metrics["submodel, true border"] = _submodel_error(params[TRAIN:], fields[TRAIN:], None)
    for name, (channels, conv) in NETWORKS.items():
        torch.manual_seed(seed)
        model = WaveSurrogate(3, channels, (FRAMES, ZONE, ZONE), conv)
        _train(model, inputs[:TRAIN], target[:TRAIN], seed)
        found = _predict(model, inputs)
        metrics[f"{name}: conv parameters"] = float(model.num_conv_parameters)
        metrics[f"{name}: train"] = _relative(found[:TRAIN], target[:TRAIN])
        metrics[f"{name}: test"] = _relative(found[TRAIN:], target[TRAIN:])
        spread = fields[:TRAIN].max() - fields[:TRAIN].min()
        back = (found[TRAIN:] + 1) / 2 * spread + fields[:TRAIN].min()
        error = _submodel_error(params[TRAIN:], fields[TRAIN:], back)
        metrics[f"{name}: submodel"] = error
    return Result(SLUG, seed, metrics, time.perf_counter() - started)


def claims(results: Sequence[Result]) -> list[Claim]:
    """The thresholds, on the means over seeds."""
    error = {name: mean(results, f"{name}: test") for name in NETWORKS}
    gap = {name: error[name] - mean(results, f"{name}: train") for name in NETWORKS}
    wins = sum(r.metrics[f"{ONE_WAY}: test"] <= r.metrics[f"{THIN}: test"] for r in results)
    parameters = {name: mean(results, f"{name}: conv parameters") for name in NETWORKS}
    lower: dict[str, Any] = {"threshold": 0.0, "higher_is_better": False}
    return [
        Claim(
            text="test error of one-way against 1.35 of plain's",
            ours=error[ONE_WAY],
            baseline=1.35 * error[PLAIN],
            unit="relative squared error",
            paper="equivalent performance to classical layers",
            **lower,
        ),
        Claim(
            text="parameters in convolutions of one-way against 0.36 of plain's",
            ours=parameters[ONE_WAY],
            baseline=0.36 * parameters[PLAIN],
            unit="parameters",
            paper="fewer trainable parameters",
            **lower,
        ),
        Claim(
            text="share of seeds where one-way is no worse than plain thinned to its size",
            ours=wins / len(results),
            baseline=2 / 3,
            threshold=0.0,
            unit="of seeds",
        ),
        Claim(
            text="test minus training error of one-way against 1.1 of plain's",
            ours=gap[ONE_WAY],
            baseline=1.1 * gap[PLAIN],
            unit="relative squared error",
            paper="less overfitting",
            **lower,
        ),
    ]


def _train(model: nn.Module, inputs: Tensor, target: Tensor, seed: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    total = EPOCHS * (len(inputs) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    order = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(inputs), generator=order).split(BATCH):
            optimizer.zero_grad()
            F.mse_loss(model(inputs[chosen]), target[chosen]).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def _predict(model: nn.Module, inputs: Tensor) -> Tensor:
    return torch.cat([model(part) for part in inputs.split(BATCH)])


def _relative(found: Tensor, target: Tensor) -> float:
    return float((found - target).square().mean() / target.var())


def _submodel_error(params: Tensor, fields: Tensor, predicted: Tensor | None) -> float:
    """Of the interior that the (predicted or true) border drives, from the true first frame."""
    every = STEPS // FRAMES
    border = wave2d.border_of(fields if predicted is None else predicted).double()
    border = wave2d.between_frames(border, every)
    submodel = wave2d.WaveSubmodel(1 / (GRID - 1), wave2d.time_step(GRID))
    found = submodel.solve(border, fields[:, 0].double(), params[:, 2].double())
    inner = found[:, ::every, 1:-1, 1:-1].float()
    return _relative(inner, fields[:, :, 1:-1, 1:-1])
