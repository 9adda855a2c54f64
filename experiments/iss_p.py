"""ISS-P against hard thresholding, a mask fixed at the start, and pruning a dense network at once.

The two photographs that come with scikit-learn, Y channel, in tiles of 64x64; every fourth tile of
a diagonal pattern is for testing, so that both scenes are in both parts. An EDSR of 20 channels and
3 blocks, added to bicubic interpolation, doubles both sides. L1 loss, 6 flipped tiles a step, Adam
1e-3 (0.9, 0.99) for 1,300 steps, times 0.4 at 80 % and at 93 %; the first stage takes 600 steps.
The upsampling tail stays dense. PSNR is that of all test tiles together, 2 pixels of border cut.

Five seeds of one recipe lie 0.044 dB apart, recipes of one seed by less: at 90 % ISS-P is 0.000 to
0.013 dB above scratch and 0.007 to 0.013 above IHT, at 95 % 0.009 to 0.017 above scratch. What is
below the spread of seeds is reported without a verdict. The dense network that is cut is better
than ISS-P in three seeds of five.

Masks do not settle here: with alpha 0.95 no weight changes sides at first, because the unimportant
ones are far below all others, and half a weight a step does at the end; with 0.99 changes do fall.

Speed: an EDSR of 24 channels and 3 blocks with 95 % zeros outside its tail, a 320x213 image, one
thread: the compiled network and the dense one in turn, medians.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import aerogel
from aerogel.data import superres
from aerogel.insight import psnr
from aerogel.models import EDSR
from aerogel.pruning import IterativeSoftShrinkage, StaticSparseTrainer
from aerogel.report.evidence import Claim, Result, mean
from aerogel.runtime.timing import measure
from aerogel.sparsity import build_masks, compute_scores, magnitude_, select_parameters

SLUG = "iss-p"
SEEDS = (0, 1, 2, 3, 4)

SCALE, TILE, STEP_BETWEEN = 2, 64, 70
CHANNELS, BLOCKS, BATCH = 20, 3, 6
STEPS, PRUNE_STEPS, RATE = 1_300, 600, 1e-3
TAIL = ("*upsample*", "*conv_last*")

ISS, SLOW, IHT, SCRATCH, L1 = "ISS-P", "ISS-P, alpha 0.99", "IHT", "scratch", "dense, then cut"
ALPHAS = {ISS: 0.95, SLOW: 0.99, IHT: 0.0, L1: 1.0}
EARLY, LATE = "weights that change sides a step, 10-60", "the same, last 50 before the cut"
SEEDS_APART = 4.0  # 0.01 dB: recipes that differ by less than seeds do are not judged
SECONDS_OF_TIMING = 4.0
FASTER = 1.5


class Tiles(NamedTuple):
    """Training pairs to draw from, and (n, 1, 32, 32) and (n, 1, 64, 64) tiles to test on."""

    train: superres.PatchPairs
    low: Tensor
    high: Tensor


class Restorer(nn.Module):
    """Bicubic interpolation, and what an EDSR adds to it."""

    def __init__(self) -> None:
        super().__init__()
        self.edsr = EDSR(SCALE, CHANNELS, BLOCKS, 1.0, in_chans=1, img_range=1.0)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 1, H, W) -> (B, 1, 2 H, 2 W)."""
        return superres.enlarge_bicubic(x, SCALE) + self.edsr(x)


def run(seed: int) -> Result:
    """Train every recipe at 90 %, two of them at 95 %, and time a compiled network."""
    started = time.perf_counter()
    tiles = _tiles()
    bicubic = _psnr(superres.enlarge_bicubic(tiles.low, SCALE), tiles)
    metrics = {"bicubic (dB)": bicubic}
    for sparsity, recipes in ((0.9, (ISS, SLOW, IHT, SCRATCH, L1)), (0.95, (ISS, SCRATCH))):
        for recipe in recipes:
            found = _train(tiles, seed, recipe, sparsity)
            label = f"{recipe} {sparsity:.0%}"
            metrics[f"{label} over bicubic"] = 100.0 * (found.psnr - bicubic)
            if sparsity == 0.9 and recipe in (ISS, SLOW, L1):
                metrics[f"{label}: lost by the cut"] = 100.0 * found.lost
                metrics[f"{label}: {EARLY}"], metrics[f"{label}: {LATE}"] = found.flips
            if sparsity == 0.9 and recipe in (ISS, SLOW):
                metrics[f"{label}: lr / (1 - alpha) of kept weights"] = found.rate_ratio
    metrics |= _times()
    return Result(SLUG, seed, metrics, time.perf_counter() - started)


def claims(results: Sequence[Result]) -> list[Claim]:
    """The thresholds, on the means over seeds."""

    def at_90(recipe: str, what: str = " over bicubic") -> float:
        return mean(results, f"{recipe} 90%{what}")

    unit = "0.01 dB over bicubic"
    cut = ": lost by the cut"
    against = [
        Claim(
            text=f"ISS-P 90% against {recipe}",
            ours=at_90(ISS),
            baseline=at_90(recipe),
            threshold=threshold,
            unit=unit,
        )
        for recipe, threshold in ((SCRATCH, 1.0), (IHT, -1.0))
        if _seeds_apart(results) <= SEEDS_APART
    ]
    return [
        *against,
        Claim(
            text="ISS-P 90% against bicubic interpolation",
            ours=at_90(ISS),
            baseline=0.0,
            threshold=15.0,
            unit=unit,
        ),
        Claim(
            text="lost by the cut at 90%, ISS-P against a dense network",
            ours=at_90(ISS, cut),
            baseline=at_90(L1, cut),
            threshold=0.0,
            unit="0.01 dB",
            higher_is_better=False,
        ),
        Claim(
            text="changes of sides at 90%, last 50 steps before the cut against half of 10-60",
            ours=at_90(ISS, f": {LATE}"),
            baseline=0.5 * at_90(ISS, f": {EARLY}"),
            threshold=0.0,
            unit="weights a step",
            higher_is_better=False,
        ),
        Claim(
            text="speed of the compiled network of 95% zeros, dense = 1",
            ours=mean(results, "times as fast"),
            baseline=1.0,
            threshold=FASTER - 1.0,
            unit="times",
        ),
    ]


def _seeds_apart(results: Sequence[Result]) -> float:
    """How far the seeds of one recipe lie apart, 0.01 dB."""
    found = []
    for recipe in (ISS, IHT, SCRATCH):
        psnr = [result.metrics[f"{recipe} 90% over bicubic"] for result in results]
        found.append(max(psnr) - min(psnr))
    return max(found)


class Trained(NamedTuple):
    """What a training ended with."""

    psnr: float
    lost: float
    flips: tuple[float, float]
    rate_ratio: float


def _train(tiles: Tiles, seed: int, recipe: str, sparsity: float) -> Trained:
    torch.manual_seed(seed)
    model = Restorer().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), RATE, betas=(0.9, 0.99))
    stepper = _stepper(model, optimizer, recipe, sparsity)
    falls = torch.optim.lr_scheduler.MultiStepLR(
        optimizer, [round(0.8 * STEPS), round(0.93 * STEPS)], 0.4
    )
    source = torch.Generator().manual_seed(seed)
    flips, ratio, around_cut = [], 0.0, []
    for step in range(1, STEPS + 1):
        low, high = tiles.train.batch(BATCH, source)
        optimizer.zero_grad()
        F.l1_loss(model(low), high).backward()
        stepper.step()
        falls.step()
        if isinstance(stepper, IterativeSoftShrinkage):
            flips.append(stepper.mask_flips())
            if step == PRUNE_STEPS - 1:
                ratio = stepper.rate_ratio()
            if step in (PRUNE_STEPS - 1, PRUNE_STEPS):
                around_cut.append(_restored(model, tiles))
    stepper.finalize()
    early, late = flips[9:59], flips[PRUNE_STEPS - 51 : PRUNE_STEPS - 1]
    return Trained(
        _restored(model, tiles),
        around_cut[0] - around_cut[1] if around_cut else 0.0,
        (sum(early) / 50, sum(late) / 50),
        ratio,
    )


def _stepper(
    model: nn.Module, optimizer: torch.optim.Optimizer, recipe: str, sparsity: float
) -> IterativeSoftShrinkage | StaticSparseTrainer:
    if recipe == SCRATCH:
        selection = select_parameters(model, exclude=TAIL)
        scores = compute_scores(selection, "magnitude")
        return StaticSparseTrainer(model, optimizer, build_masks(scores, 1.0 - sparsity))
    return IterativeSoftShrinkage(
        model,
        optimizer,
        sparsity,
        alpha=ALPHAS[recipe],
        prune_steps=PRUNE_STEPS,
        total_steps=STEPS,
        exclude=TAIL,
    )


@lru_cache(maxsize=1)
def _tiles() -> Tiles:
    planes = superres.to_luma(superres.photographs().float() / 255.0)
    grid = superres.tiles(planes, TILE, STEP_BETWEEN, TILE)
    row, column = torch.meshgrid(*(torch.arange(n) for n in grid.shape[1:3]), indexing="ij")
    held_out = (row + column) % 4 == 0
    train, high = (grid[:, chosen].flatten(0, 1) for chosen in (~held_out, held_out))
    pairs = superres.PatchPairs(list(train), SCALE, TILE, rotate=False)
    return Tiles(pairs, superres.shrink_images(high, SCALE), high)


@torch.no_grad()
def _restored(model: nn.Module, tiles: Tiles) -> float:
    return _psnr(model(tiles.low), tiles)


def _psnr(restored: Tensor, tiles: Tiles) -> float:
    """Of all tiles together: laid out as one image, so that flat ones do not count for most."""

    def sheet(planes: Tensor) -> Tensor:
        return planes[..., SCALE:-SCALE, SCALE:-SCALE].flatten(0, 2)[None, None]

    return psnr(sheet(restored), sheet(tiles.high), rounded=False)


def _times() -> dict[str, float]:
    torch.manual_seed(0)
    model = EDSR(SCALE, 24, 3, 1.0, in_chans=1, img_range=1.0).eval()
    magnitude_(model, 0.95, exclude=TAIL)
    image = torch.rand(1, 1, 213, 320)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        compiled = aerogel.compile(model, (image,), cache=False)
        with torch.inference_mode():
            calls = {"dense": lambda: model(image), "compiled": lambda: compiled(image)}
            seconds = measure(calls, SECONDS_OF_TIMING)
    finally:
        torch.set_num_threads(threads)
    return {
        "dense, 320x213 (ms)": 1e3 * seconds["dense"],
        "compiled 95%, 320x213 (ms)": 1e3 * seconds["compiled"],
        "times as fast": seconds["dense"] / seconds["compiled"],
    }
