"""Combiner: far tokens, read through summaries, tell digits apart that the last row alone cannot.

Digits of 64 tokens, one causal layer of 4 heads of 16 trained from scratch, classified from the
last token; segments of 8 tokens are the rows of the image. Blocks alone see the last row only;
Combiner reads the same block and seven summaries; dense attention reads everything.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from aerogel.attention import SparseSelfAttention
from aerogel.attention.combiner_layer import CombinerAttention
from aerogel.attention.summaries import run_plan
from aerogel.report.evidence import Claim, Result, as_script, mean
from digit_tokens import WIDTH, accuracy

SLUG = "combiner"
SEEDS = (0, 1, 2)
HEADS, SEGMENT, EPOCHS = 4, 8, 25


def run(seed: int) -> Result:
    """Train a reader around every kind of attention."""
    started = time.perf_counter()
    plain = partial(SparseSelfAttention, WIDTH, HEADS)
    combiner = partial(CombinerAttention, WIDTH, HEADS, seg_len=SEGMENT)
    readers = {
        "blocks": partial(plain, selector=_blocks),
        "dense": plain,
        "fixed": combiner,
    }
    metrics = {
        f"{name}, %": accuracy(reader, "last", EPOCHS, seed) for name, reader in readers.items()
    }
    notes = (
        f"Test accuracy in % after {EPOCHS} epochs.",
        "Not repeated here: training on text, where the paper measures perplexity.",
    )
    return Result(SLUG, seed, metrics, time.perf_counter() - started, notes)


def claims(results: Sequence[Result]) -> list[Claim]:
    """The thresholds, on the means over seeds."""
    return [
        Claim(
            text=f"digits from the last token: accuracy of Combiner's fixed blocks, {against}",
            ours=mean(results, "fixed, %"),
            baseline=mean(results, f"{baseline}, %"),
            threshold=threshold,
            paper="",
            unit="%",
        )
        for against, baseline, threshold in (
            ("15 points above the blocks alone", "blocks", 15.0),
            ("at most 13 points below dense", "dense", -13.0),
        )
    ]


def _blocks(q: Tensor, k: Tensor, **_: Any) -> Any:
    return run_plan(k.shape[2], SEGMENT, k.device)


if __name__ == "__main__":
    as_script(run, claims, SEEDS, threads=1)
