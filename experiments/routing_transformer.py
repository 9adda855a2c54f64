"""Routing Transformer: clusters of queries and keys find the far pairs that attention reads.

First part, no training: queries and keys of all 72 heads of MiniLM-L6 on windows of 512 tokens of
Python's documentation, normalised, clustered by ten steps of k-means on both together (16 clusters
of 32). Counted is the share of the dense attention's weight on keys more than 32 positions away
that the routed pairs hold, against random balanced clusters of the same size. A seed draws the
window and the starts.

Second part: digits of 64 tokens, one bidirectional layer of 4 heads trained from scratch,
classified from the mean token: 8 clusters of 16 against blocks of 16 tokens. The logits of routing
heads are unscaled, as the authors' code has them.

Third part: byte models of two layers of 4 heads and width 64, trained for as many steps on 512
bytes each whose last 64 to 128 repeat an earlier passage, of Python's own source. All heads read
the 33 to 64 last bytes, or two of each layer route among 8 clusters, as many pairs in all. Scored
on held-out text, on the repeated part, and before it.
"""

from __future__ import annotations

import pydoc_data.topics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from aerogel import data, models
from aerogel.attention import (
    AttentionContext,
    AttentionShape,
    BlockPlan,
    GroupPlan,
    SparseSelfAttention,
)
from aerogel.attention.routing_layer import RoutingAttention
from aerogel.attention.routing_transformer import RoutingSelector
from aerogel.data import recall
from aerogel.data.source_text import load_source_text
from aerogel.models.routing_transformer import RoutingTransformerLM
from aerogel.report.evidence import Claim, Result, as_script, mean
from digit_tokens import WIDTH, accuracy
from short_text import VOCAB, nats, train

SLUG = "routing-transformer"
SEEDS = (0, 1, 2)

LENGTH, CLUSTERS, WINDOW, FAR = 512, 16, 32, 32
DIGIT_CLUSTERS, DIGIT_WINDOW, HEADS, EPOCHS = 8, 16, 4, 25
BYTES, PASSAGE, DEPTH, BYTE_CLUSTERS, STEPS, RATE, BATCH, SCORED = (
    512, (64, 128), 2, 8, 300, 5e-3, 2, 32,
)  # fmt: skip
LOCAL_BLOCK, BYTE_WINDOW = 32, 76  # 24 and 23 thousand pairs a head


def run(seed: int) -> Result:
    """Count the far weight that routing finds; train two readers of digits."""
    started = time.perf_counter()
    metrics = _far_weight(seed)
    routing = partial(
        RoutingAttention, WIDTH, HEADS, 0, DIGIT_CLUSTERS, DIGIT_WINDOW, causal=False,
        rel_pos="none", scale=1.0,
    )  # fmt: skip
    local = partial(SparseSelfAttention, WIDTH, HEADS, selector=_blocks, causal=False)
    metrics["digits, routing, %"] = accuracy(routing, "mean", EPOCHS, seed)
    metrics["digits, blocks, %"] = accuracy(local, "mean", EPOCHS, seed)
    metrics |= _text(seed)
    notes = (
        f"Far: keys more than {FAR} positions away. All layers and heads of one window a seed.",
        f"Text: nats a byte after {STEPS} steps of {BATCH} sequences.",
    )
    return Result(SLUG, seed, metrics, time.perf_counter() - started, notes)


def claims(results: Sequence[Result]) -> list[Claim]:
    """The thresholds, on the means over seeds."""
    routed, drawn = mean(results, "far weight, routing"), mean(results, "far weight, random")
    return [
        Claim(
            text="far attention weight in routed pairs, against three times random clusters",
            ours=routed,
            baseline=3 * drawn,
            threshold=0.0,
            unit="share",
        ),
        Claim(
            text="digits: accuracy of routing heads, against blocks of 16",
            ours=mean(results, "digits, routing, %"),
            baseline=mean(results, "digits, blocks, %"),
            threshold=0.0,
            paper="ImageNet-64: 3.43 bits a dimension against 3.44",
            unit="%",
        ),
        Claim(
            text="text: nats on a repeated passage, routing heads 0.1 below local heads alone",
            ours=mean(results, "text, routing, repeat"),
            baseline=mean(results, "text, local, repeat"),
            threshold=0.1,
            paper="WikiText-103: perplexity 15.8 against 18.3",
            unit="nats",
            higher_is_better=False,
        ),
    ]


def _blocks(q: Tensor, k: Tensor, **_: Any) -> BlockPlan:
    blocks = torch.eye(q.shape[2] // DIGIT_WINDOW, dtype=torch.bool)
    return BlockPlan.from_mask(blocks[None, None], DIGIT_WINDOW, DIGIT_WINDOW)


def _text(seed: int) -> dict[str, float]:
    text = load_source_text()

    def passages(source: Tensor, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        return recall.repeat_passage(recall.draw_windows(source, count, BYTES, draw), PASSAGE, draw)

    def batch(draw: torch.Generator) -> recall.Weighted:
        return recall.weigh(*passages(text.train, BATCH, draw), 2.0, 1.0)

    ids, repeated = passages(text.held_out, SCORED, torch.Generator().manual_seed(1))
    found = {}
    for name, local in (("local", HEADS), ("routing", HEADS // 2)):
        torch.manual_seed(seed)
        model = RoutingTransformerLM(
            VOCAB, WIDTH, DEPTH, BYTES, HEADS, local, BYTE_CLUSTERS, BYTE_WINDOW,
            local_window=LOCAL_BLOCK,
        )  # fmt: skip
        losses = nats(train(model, batch, STEPS, RATE, seed), ids)
        found[f"text, {name}, repeat"] = float(losses[repeated[:, 1:]].mean())
        found[f"text, {name}, plain"] = float(losses[~repeated[:, 1:]].mean())
    return found


@torch.no_grad()
def _far_weight(seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    place = torch.arange(LENGTH)
    far = (place[:, None] - place).abs() > FAR
    found: dict[str, list[float]] = {"routing": [], "random": []}
    for q, k in _queries_and_keys(seed):
        heads, dim = q.shape[1], q.shape[3]
        weight = (q @ k.transpose(-1, -2) * dim**-0.5).softmax(-1) * far
        shape = AttentionShape(1, heads, heads, LENGTH, LENGTH)
        ctx = AttentionContext(*(layer_norm(t, (dim,)) for t in (q, k)), k, shape, dim**-0.5)
        selector = RoutingSelector(heads, CLUSTERS, dim, WINDOW, share_qk=False).train()
        selector.kmeans(torch.cat([ctx.q, ctx.k], 2), True)
        drawn = torch.stack([torch.randperm(LENGTH) for _ in range(heads)])
        index = drawn.view(1, heads, CLUSTERS, WINDOW).sort(-1).values.int()
        for name, plan in (
            ("routing", selector.plan_prefill(ctx)),
            ("random", GroupPlan(index, index, reduce="mean")),
        ):
            kept = (weight * plan.to_dense_mask(shape)).sum() / weight.sum()
            found[name].append(float(kept))
    return {f"far weight, {name}": sum(v) / len(v) for name, v in found.items()}


def _queries_and_keys(seed: int) -> list[tuple[Tensor, Tensor]]:
    """(1, 12, 512, 32) each, of every layer, for one window of text."""
    folder = data.fetch_checkpoint("minilm")
    model: Any = models.create_model("minilm", checkpoint_path=folder).eval()
    tokenizer = data.load_tokenizer(folder / "tokenizer.json")
    topics = pydoc_data.topics.topics
    windows = data.token_windows(tokenizer, [topics[name] for name in sorted(topics)], LENGTH)
    number = int(torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[0])
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        kept.append(output.unflatten(-1, (12, -1)).transpose(1, 2))

    for layer in model.encoder.encoder.layer:
        layer.attention.self.query.register_forward_hook(keep)
        layer.attention.self.key.register_forward_hook(keep)
    ids = windows[number][None]
    model(ids, torch.ones_like(ids))
    return list(zip(kept[::2], kept[1::2], strict=True))


if __name__ == "__main__":
    as_script(run, claims, SEEDS, threads=1)
