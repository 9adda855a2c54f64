"""S2-Attention trained from scratch and continued: shards that differ between heads see more.

Digits: scikit-learn's 8x8 images as 64 tokens, one causal layer of width 48 and 4 heads, read from
the last token, which must see the whole picture. Blocks of 4 tokens; window of one block and every
4th block, shifted from head to head (heterogeneous) or not (homogeneous); a window of 4 blocks; all
keys. 20 epochs of AdamW, learning rate 3e-3. Clothes: the same with Fashion-MNIST's pictures as 256
tokens and blocks of 16, on 6,000 of them; fewer epochs, one seed.

Language: the small byte model (experiments/tiny_lm.py, trained densely), with a key head for each
of its 4 query heads, goes on training on text of 512 bytes whose end repeats an earlier passage,
with all keys, with S2 (blocks of 16, window 4, stride 4: its heads see everything between them), or
with a window of as many pairs; equal steps and batches. One seed.

Time: 4 heads of 64, window 512, stride 16, against torch's causal attention, one thread,
interleaved; left out where the kernels are not built.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    adaptive_avg_pool2d,
    cross_entropy,
    scaled_dot_product_attention,
)

import tiny_lm
from aerogel import data
from aerogel.attention import (
    AttentionContext,
    AttentionShape,
    Plan,
    S2Selector,
    Selector,
    SpanPlan,
    SparseSelfAttention,
    attach,
    attend,
    detach,
)
from aerogel.data import recall
from aerogel.data.source_text import load_source_text
from aerogel.kernels import native_available
from aerogel.report.evidence import Claim, Result, as_script, mean

SLUG = "s2-attention"
SEEDS = (0, 1, 2)

WIDTH, HEADS, EPOCHS, BATCH, LR = 48, 4, 20, 64, 3e-3
BLOCK, STRIDE, WINDOW = 4, 4, 4
MIXED, SAME, LOCAL, DENSE = "heterogeneous", "homogeneous", "window", "dense"

SIDE, PICTURES, PICTURE_EPOCHS = 16, 6_000, 6

LM_HEADS, LM_LENGTH, LM_STEPS, LM_BATCH, LM_LR, LM_SCORED = 4, 512, 80, 8, 5e-4, 24
LM_SHARDS: dict[str, Any] = {"block": 16, "local_blocks": 4, "stride": 4}

TIMED, TIMED_HEADS, HEAD_DIM, ROUNDS = (2048, 4096, 8192, 16384), 4, 64, 3
TIMED_SHARDS: dict[str, Any] = {"block": 64, "local_blocks": 8, "stride": 16}


def run(seed: int) -> Result:
    """Train every pattern; continue the language model; time both directions."""
    started = time.perf_counter()
    metrics: dict[str, float] = {}
    for name, selector in _picture_selectors(BLOCK).items():
        metrics[f"digits, {name}"] = _read(seed, selector, _digits(), EPOCHS)
    metrics.update(_clothes())
    metrics.update(_language())
    if native_available():
        metrics.update(_times())
    notes = (
        "Digits, clothes: % test accuracy after the last epoch. Language: bits a byte on the plain "
        "part and on the repeat, of held-out text. Clothes and language: one seed, the same in "
        "every row. Kept: share of the causal pairs.",
    )
    return Result(SLUG, seed, metrics, time.perf_counter() - started, notes)


def claims(results: Sequence[Result]) -> list[Claim]:
    """The thresholds, on the means over seeds."""
    paper = "heterogeneous shards match dense quality in pre-training, homogeneous ones do not"
    found = [
        Claim(
            text=f"digits: {MIXED} shards against {other}",
            ours=mean(results, f"digits, {MIXED}"),
            baseline=mean(results, f"digits, {other}"),
            threshold=threshold,
            unit="% test accuracy",
            paper=paper,
        )
        for other, threshold in ((SAME, 6.0), (LOCAL, 15.0), (DENSE, -4.0))
    ]
    for part, other, threshold in (("plain", DENSE, -0.03), ("repeat", LOCAL, 0.0)):
        found.append(
            Claim(
                text=f"language, continued: {MIXED} shards against {other} on the {part}",
                ours=mean(results, f"language, {MIXED}, {part}"),
                baseline=mean(results, f"language, {other}, {part}"),
                threshold=threshold,
                unit="bits a byte",
                paper=paper,
                higher_is_better=False,
            )
        )
    return found


def _picture_selectors(block: int) -> dict[str, Any]:
    shards: dict[str, Any] = {"block": block, "local_blocks": 1, "stride": STRIDE}
    return {
        MIXED: S2Selector(**shards),
        SAME: S2Selector(**shards, homo_head=True),
        LOCAL: _Window(block, WINDOW),
        DENSE: None,
    }


class _Window(Selector):
    """The last blocks, for every head."""

    slug = "window"

    def __init__(self, block: int, blocks: int) -> None:
        super().__init__()
        self.span = SpanPlan.uniform(0, blocks, block=block, granularity="block")

    def plan_prefill(self, ctx: AttentionContext) -> Plan:
        return self.span


class _Reader(nn.Module):
    """One causal layer that must tell the picture's class at its last token."""

    def __init__(self, selector: Selector | None, tokens: int) -> None:
        super().__init__()
        self.pixel = nn.Linear(1, WIDTH)
        self.position = nn.Parameter(torch.randn(tokens, WIDTH) * 0.02)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.attention = SparseSelfAttention(WIDTH, HEADS, selector=selector)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.pixel(images.flatten(1)[..., None]) + self.position
        x = (x + self.attention(self.norms[0](x)))[:, -1]
        x = x + self.mlp(self.norms[1](x))
        return self.head(self.norms[2](x))


Pictures = tuple[Tensor, Tensor, Tensor, Tensor]


def _read(seed: int, selector: Selector | None, pictures: Pictures, epochs: int) -> float:
    """% test accuracy."""
    images, labels, test_images, test_labels = pictures
    torch.manual_seed(seed)
    model = _Reader(selector, images[0].numel())
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels)).split(BATCH):
            optimizer.zero_grad()
            cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
    with torch.no_grad():
        found = [model(part).argmax(-1) for part in test_images.split(500)]
    return 100 * float((torch.cat(found) == test_labels).float().mean())


@lru_cache(maxsize=1)
def _digits() -> Pictures:
    digits = data.digits.load()
    parts = []
    for split in (digits.train, digits.test):
        parts += [split.images.float() / 255, split.labels]
    return parts[0], parts[1], parts[2], parts[3]


@lru_cache(maxsize=1)
def _clothes() -> dict[str, float]:
    dataset = data.load("fashion-mnist")
    parts = []
    for split, count in ((dataset.train, PICTURES), (dataset.test, PICTURES // 3)):
        small = adaptive_avg_pool2d(split.images[:count].float() / 255, SIDE)
        parts += [small, split.labels[:count]]
    pictures = (parts[0], parts[1], parts[2], parts[3])
    return {
        f"clothes, {name}": _read(0, selector, pictures, PICTURE_EPOCHS)
        for name, selector in _picture_selectors(SIDE).items()
    }


@lru_cache(maxsize=1)
def _language() -> dict[str, float]:
    metrics: dict[str, float] = {}
    base = _with_all_key_heads(tiny_lm.load())
    shards = S2Selector(**LM_SHARDS)
    shape = AttentionShape(1, LM_HEADS, LM_HEADS, LM_LENGTH, LM_LENGTH, causal=True)
    kept = shards.pattern(LM_HEADS, LM_HEADS).span().density(shape)
    windows = (_Window(LM_SHARDS["block"], n) for n in range(1, LM_LENGTH))
    window = next(w for w in windows if w.span.density(shape) >= kept)
    metrics[f"language, {MIXED}, kept %"] = 100 * kept
    metrics[f"language, {LOCAL}, kept %"] = 100 * window.span.density(shape)
    for name, selector in ((MIXED, shards), (LOCAL, window), (DENSE, None)):
        model = copy.deepcopy(base)
        if selector is not None:
            attach(model, selector)
        _continue(model)
        plain, repeat = _score(model)
        metrics[f"language, {name}, plain"] = plain
        metrics[f"language, {name}, repeat"] = repeat
        if selector is not None:
            detach(model)
    return metrics


def _with_all_key_heads(model: Any) -> nn.Module:
    """The same function with a key head for every query head: each one copied for its group."""
    config = copy.deepcopy(model.config)
    group = config.num_attention_heads // config.num_key_value_heads
    config.num_key_value_heads = config.num_attention_heads
    wide: nn.Module = type(model)(config)
    state = model.state_dict()
    for name, weight in state.items():
        if "k_proj" in name or "v_proj" in name:
            heads = weight.unflatten(0, (-1, config.head_dim))
            state[name] = heads.repeat_interleave(group, 0).flatten(0, 1)
    wide.load_state_dict(state)
    return wide


def _passages(text: Tensor, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    windows = recall.draw_windows(text, count, LM_LENGTH, draw)
    return recall.repeat_passage(windows, (32, 64), draw)


def _continue(model: nn.Module) -> None:
    draw = torch.Generator().manual_seed(0)
    text = load_source_text().train
    optimizer = torch.optim.AdamW(model.parameters(), LM_LR)
    model.train()
    for step in range(LM_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LM_LR * (1 - step / LM_STEPS)
        ids, repeated = _passages(text, LM_BATCH, draw)
        weights = torch.where(repeated, 2.0, 1.0)[:, 1:]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        losses = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        optimizer.zero_grad()
        ((losses * weights).sum() / weights.sum()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def _score(model: nn.Module) -> tuple[float, float]:
    """Bits a byte on the plain part and on the repeat but its first bytes."""
    model.eval()
    draw = torch.Generator().manual_seed(1)
    ids, repeated = _passages(load_source_text().held_out, LM_SCORED, draw)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none") / 0.6931
    settled = repeated[:, 1:] & repeated.roll(4, 1)[:, 1:]
    return float(losses[~repeated[:, 1:]].mean()), float(losses[settled].mean())


@lru_cache(maxsize=1)
def _times() -> dict[str, float]:
    metrics: dict[str, float] = {}
    pattern = S2Selector(**TIMED_SHARDS, dense_layers=(0,)).pattern(TIMED_HEADS, TIMED_HEADS)
    plan = pattern.span()
    for length in TIMED:
        draw = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, TIMED_HEADS, length, HEAD_DIM, generator=draw) for _ in range(3))
        times: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            for name, call in (("dense", _dense), ("sparse", lambda *t: _sparse(*t, plan))):
                _timed(times, name, call, (q, k, v))
        seconds = {name: median(values) for name, values in times.items()}
        for part in ("forward", "both"):
            ratio = seconds[f"dense, {part}"] / seconds[f"sparse, {part}"]
            metrics[f"speed-up at {length}, {part}"] = ratio
        shape = AttentionShape(1, TIMED_HEADS, TIMED_HEADS, length, length, causal=True)
        metrics[f"kept at {length}, %"] = 100 * plan.density(shape)
    return metrics


def _timed(
    times: dict[str, list[float]],
    name: str,
    call: Callable[..., Tensor],
    tensors: tuple[Tensor, ...],
) -> None:
    begin = time.perf_counter()
    with torch.no_grad():
        call(*tensors)
    times.setdefault(f"{name}, forward", []).append(time.perf_counter() - begin)
    inputs = [t.detach().requires_grad_() for t in tensors]
    begin = time.perf_counter()
    call(*inputs).sum().backward()
    times.setdefault(f"{name}, both", []).append(time.perf_counter() - begin)


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def _sparse(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    out = attend(q, k, v, plan=plan, causal=True, validate=False)
    assert isinstance(out, Tensor)
    return out


if __name__ == "__main__":
    as_script(run, claims, SEEDS, threads=1)
