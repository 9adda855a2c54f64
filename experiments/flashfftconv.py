"""Filters of a trained sequence model with few frequencies, or few taps.

Fashion-MNIST as sequences of 784 grey values, 6,000 training images, the first 2,000 test images.
Two residual layers of long convolutions (32 channels, filters of 784 taps) are trained for 4 epochs
(AdamW, one cycle to 1e-2, batch 50). Then, without any further training, the filters' spectra
(2,048 points) keep the lowest 50 %, 25 % and 12.5 % of their frequencies, or as many at random; or
the filters keep their first half or quarter. A second model has filters of a quarter of the taps
from the start.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aerogel import data
from aerogel.nn import FlashFFTConv, LongConv, shorten_filters, sparsify_frequency
from aerogel.report.evidence import Claim, Result, as_script, mean

SLUG = "flashfftconv"
SEEDS = (0, 1, 2)

TRAIN_IMAGES, TEST_IMAGES = 6_000, 2_000
CHANNELS, LAYERS, LENGTH = 32, 2, 28 * 28
EPOCHS, BATCH, LEARNING_RATE = 4, 50, 1e-2
KEEPS = (0.5, 0.25, 0.125)


class Network(nn.Module):
    """Grey values -> channels -> long convolutions -> mean over steps -> classes."""

    def __init__(self, taps: int | None = None) -> None:
        super().__init__()
        self.enter = nn.Linear(1, CHANNELS)
        self.norms = nn.ModuleList(nn.LayerNorm(CHANNELS) for _ in range(LAYERS))
        self.mixers = nn.ModuleList(LongConv(CHANNELS, LENGTH, partial=taps) for _ in range(LAYERS))
        self.leave = nn.Linear(CHANNELS, 10)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, 784) -> (batch, 10)."""
        h = self.enter(x.unsqueeze(-1))
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            h = h + mixer(norm(h).transpose(1, 2)).transpose(1, 2)
        return self.leave(h.mean(1))


class RandomFrequencies(FlashFFTConv):
    """Keeps a random part of the frequencies: the baseline, by torch.fft."""

    def __init__(self, seqlen: int, keep: float, generator: torch.Generator) -> None:
        super().__init__(seqlen)
        half = seqlen // 2 + 1
        kept = torch.randperm(half, generator=generator)[: round(keep * seqlen / 2)]
        self.weights = torch.zeros(half)
        self.weights[kept] = 1.0

    def forward(
        self, u: Tensor, k: Tensor, pregate: Tensor | None = None, postgate: Tensor | None = None
    ) -> Tensor:
        """As `FlashFFTConv`, without gates."""
        spectrum = torch.fft.rfft(k, n=self.seqlen) * self.weights
        y = torch.fft.irfft(torch.fft.rfft(u, n=self.seqlen) * spectrum, n=self.seqlen)
        return y[..., : u.shape[-1]]


def run(seed: int) -> Result:
    """Train both models, then measure test accuracy in per cent for every form of the filters."""
    started = time.perf_counter()
    images, labels, test_images, test_labels = _data()
    torch.manual_seed(seed)
    model = Network()
    _train(model, images, labels, seed)

    def accuracy(measured: nn.Module = model) -> float:
        return _accuracy(measured, test_images, test_labels)

    metrics = {"dense": accuracy()}
    for keep in KEEPS:
        sparsify_frequency(model, 1.0 - keep)
        metrics[f"lowest {keep:.1%}"] = accuracy()
    sparsify_frequency(model, 0.0)
    for part in (2, 4):
        shorten_filters(model, LENGTH // part)
        metrics[f"first 1/{part} of the taps"] = accuracy()
    shorten_filters(model, None)
    generator = torch.Generator().manual_seed(seed)
    for keep in KEEPS:
        for mixer in model.mixers:
            assert isinstance(mixer, LongConv)
            mixer.conv = RandomFrequencies(mixer.conv.seqlen, keep, generator)
        metrics[f"random {keep:.1%}"] = accuracy()
    torch.manual_seed(seed)
    short = Network(LENGTH // 4)
    _train(short, images, labels, seed)
    metrics["trained with 1/4 of the taps"] = accuracy(short)
    return Result(SLUG, seed, metrics, time.perf_counter() - started)


def claims(results: Sequence[Result]) -> list[Claim]:
    """The thresholds, on the means over seeds."""

    def claim(text: str, ours: str, baseline: str, threshold: float, paper: str = "") -> Claim:
        pair = (mean(results, ours), mean(results, baseline))
        return Claim(text, *pair, threshold, paper, "% test accuracy")

    paper = "HyenaDNA-1M keeps its perplexity with 75 to 79 % of frequencies zero"
    return [
        claim("lowest half of the frequencies against all", "lowest 50.0%", "dense", -1, paper),
        claim("lowest quarter against all", "lowest 25.0%", "dense", -3, paper),
        claim("lowest quarter against as many at random", "lowest 25.0%", "random 25.0%", 0),
        claim(
            "trained with a quarter of the taps against all",
            "trained with 1/4 of the taps",
            "dense",
            -2,
            "Hyena of 8K tokens keeps its perplexity with filters of 2K",
        ),
    ]


def _data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dataset = data.load("fashion-mnist")

    def rows(split: data.ImageSplit, count: int) -> Tensor:
        flat = split.images[:count].float().flatten(1) / 255.0
        return (flat - split.mean[0]) / split.std[0]

    train, test = dataset.train, dataset.test
    return (
        rows(train, TRAIN_IMAGES),
        train.labels[:TRAIN_IMAGES],
        rows(test, TEST_IMAGES),
        test.labels[:TEST_IMAGES],
    )


def _train(model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> None:
    steps = EPOCHS * TRAIN_IMAGES // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=0.2)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(images), generator=generator).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            rates.step()


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    found = torch.cat([model(part).argmax(1) for part in images.split(100)])
    return 100.0 * float((found == labels).float().mean())


if __name__ == "__main__":
    as_script(run, claims, SEEDS)
