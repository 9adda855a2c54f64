"""Combiner: far tokens, read through summaries, tell digits apart that the last row alone cannot.

Digits of 64 tokens, one causal layer of 4 heads of 16 trained from scratch, classified from the
last token; segments of 8 tokens are the rows of the image. Blocks alone see the last row only;
Combiner reads the same block and seven summaries; dense attention reads everything.

Text: byte models of two layers of width 64, trained for as many steps on 1,024 bytes of Python's
own source each, segments of 32, scored on 32 held-out windows. Positions begin alike in every
segment. Blocks alone see 16 bytes in the mean. One seed for all, as it takes most of the time; the
other variants, two to twenty times as slow to train here, are left out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.attention import SparseSelfAttention
from aerogel.attention.combiner_layer import CombinerAttention
from aerogel.attention.summaries import run_plan
from aerogel.data import recall
from aerogel.data.source_text import load_source_text
from aerogel.models.combiner import CombinerLM
from aerogel.report.evidence import Claim, Result, as_script, mean
from digit_tokens import WIDTH, accuracy
from short_text import VOCAB, nats, train

SLUG = "combiner"
SEEDS = (0, 1, 2)
HEADS, SEGMENT, EPOCHS = 4, 8, 25
BYTES, BYTE_SEGMENT, DEPTH, STEPS, RATE, SCORED = 1024, 32, 2, 1200, 4e-3, 32
BYTE_WAYS = ("blocks", "fixed")


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
    metrics |= _bits()
    notes = (
        f"Test accuracy in % after {EPOCHS} epochs.",
        f"Bits a byte after {STEPS} steps on {BYTES} bytes each, one seed for all.",
    )
    return Result(SLUG, seed, metrics, time.perf_counter() - started, notes)


def claims(results: Sequence[Result]) -> list[Claim]:
    """The thresholds, on the means over seeds."""
    found = [
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
    return [
        *found,
        Claim(
            text="text: fixed blocks and summaries, 0.02 below the blocks alone",
            ours=mean(results, "text, fixed, bits a byte"),
            baseline=mean(results, "text, blocks, bits a byte"),
            threshold=0.02,
            paper="Wiki-40B, perplexity: 17.70 against 18.04 of fixed blocks alone",
            unit="bits a byte",
            higher_is_better=False,
        ),
    ]


def _blocks(q: Tensor, k: Tensor, size: int = SEGMENT, **_: Any) -> Any:
    return run_plan(k.shape[2], size, k.device)


@lru_cache(maxsize=1)
def _bits() -> dict[str, float]:
    text = load_source_text()
    ids = recall.draw_windows(text.held_out, SCORED, BYTES, torch.Generator().manual_seed(1))

    def batch(draw: torch.Generator) -> recall.Weighted:
        return recall.weigh(recall.draw_windows(text.train, 1, BYTES, draw), None, 1.0, 1.0)

    found = {}
    for way in BYTE_WAYS:
        model = train(_byte_model(way), batch, STEPS, RATE, 0)
        found[f"text, {way}, bits a byte"] = float(nats(model, ids).mean()) / math.log(2)
    return found


def _byte_model(way: str) -> nn.Module:
    torch.manual_seed(0)
    variant: Any = "fixed" if way == "blocks" else way
    model = CombinerLM(VOCAB, WIDTH, DEPTH, BYTES, HEADS, variant=variant, seg_len=BYTE_SEGMENT)
    with torch.no_grad():  # where in its segment a byte is, and a little of which segment
        inside, segment = (
            torch.randn(BYTE_SEGMENT, WIDTH),
            torch.randn(BYTES // BYTE_SEGMENT, WIDTH),
        )
        model.place.weight.copy_((inside + 0.1 * segment[:, None]).flatten(0, 1))
    if way == "blocks":
        own = partial(_blocks, size=BYTE_SEGMENT)
        for block in model.blocks:
            block.attention = SparseSelfAttention(WIDTH, HEADS, selector=own)
    return model


if __name__ == "__main__":
    as_script(run, claims, SEEDS, threads=1)
