"""Scatterbrain on a sentence encoder's attention, and its time on long random sequences.

Estimates: queries and keys of all-MiniLM-L6-v2 (layers 1, 3 and 5, 4 heads each) on 512 tokens of
Python's documentation (`pydoc_data.topics`), centred and of length 1; the matrix is
exp(beta * cosine). Relative Frobenius error of three estimates of like cost: 64 features and the 64
largest keys of a row, the 128 largest keys, 128 features. The same 64 features alone, and clusters
by hashing as the support, stand beside them. A seed draws the text and the features, eight times
anew for each matrix.

Training: digits of 64 tokens, two bidirectional layers of 4 heads of 16 trained from scratch,
classified from the mean token: 16 features and a window of 16 tokens, and either alone.

Speed: 8,192 tokens, 4 heads of 64, 64 features, a window of 128, one thread, against torch's
attention, interleaved.
"""

from __future__ import annotations

import pydoc_data.topics
import time
from collections.abc import Sequence
from functools import lru_cache, partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from aerogel import data, models
from aerogel.attention import (
    AttentionShape,
    LocalSupport,
    PositiveRandomFeatures,
    ScatterbrainAttention,
    SmyrfClusters,
    TopKSupport,
    scatterbrain_attention,
)
from aerogel.report.evidence import Claim, Result, as_script, mean
from digit_tokens import WIDTH, accuracy

SLUG = "scatterbrain"
SEEDS = (0, 1, 2, 3, 4)

TOKENS, CHOSEN_LAYERS, CHOSEN_HEADS = 512, (1, 3, 5), 4
BETAS = (0.5, 1.0, 1.5, 2.0, 4.0)
MODERATE = 1.5
FEATURES, KEYS, ALONE, DRAWS = 64, 64, 128, 8
DIGIT_HEADS, DIGIT_FEATURES, DIGIT_WINDOW, DIGIT_LAYERS, EPOCHS = 4, 16, 16, 2, 8
LENGTH, HEADS, DIM, TIMED_WINDOW, ROUNDS = 8192, 4, 64, 128, 3


def run(seed: int) -> Result:
    """Errors of the estimates, accuracy of three readers of digits, and times."""
    started = time.perf_counter()
    metrics = _errors(seed) | _digits(seed) | _times()
    notes = (
        "Errors are means of relative Frobenius errors over 12 matrices and 8 draws.",
        "With sharp attention (beta of 2 and more) sparse attention alone has the smaller error.",
    )
    return Result(SLUG, seed, metrics, time.perf_counter() - started, notes)


def claims(results: Sequence[Result]) -> list[Claim]:
    """The thresholds, on the means over seeds."""
    paper = "2.1 times less error than the better of sparse and low-rank on BigGAN and T2T-ViT"

    def error(beta: float, name: str) -> float:
        return mean(results, f"error at beta {beta:g}, {name}")

    lowest = min(error(1.5, "128 keys"), error(1.5, "128 features"))
    both = "64 features + 64 keys"
    found = [
        Claim(
            "beta 1.5: error against the better of 128 keys and 128 features",
            error(1.5, both), lowest, 0.0, paper, "", False,
        ),
        Claim(
            "beta 1.5: error in units of the better baseline's",
            error(1.5, both) / lowest, 0.8, 0.0, paper, "x", False,
        ),
        Claim(
            "beta 0.5: error in units of 128 features'",
            error(0.5, both) / error(0.5, "128 features"), 1.1, 0.0, "", "x", False,
        ),
    ]  # fmt: skip
    found += [
        Claim(
            f"beta {beta:g}: error against 128 keys",
            error(beta, both), error(beta, "128 keys"), 0.0, "", "", False,
        )
        for beta in BETAS
        if beta <= MODERATE
    ]  # fmt: skip
    found += [
        Claim(
            f"beta {beta:g}: error against the same 64 features alone",
            error(beta, both), error(beta, "64 features"), 0.0, "", "", False,
        )
        for beta in BETAS
    ]  # fmt: skip
    return [
        *found,
        Claim(
            "digits: 16 features and a window of 16, against the better of either alone",
            mean(results, "digits, both, %"),
            max(mean(results, f"digits, {name}, %") for name in ("window", "features")),
            -0.5,
            "Long Range Arena: up to 5 points above either alone",
            "%",
        ),
    ]


@torch.no_grad()
def _errors(seed: int) -> dict[str, float]:
    q, k = _vectors(seed)
    shape = AttentionShape.of(q, k)
    metrics: dict[str, float] = {}
    for beta in BETAS:
        a, b = q * beta**0.5, k * beta**0.5
        exact = torch.exp(a @ b.transpose(-1, -2))
        some = TopKSupport(KEYS).plan(a, b, shape).to_dense_mask(shape)
        more = TopKSupport(ALONE).plan(a, b, shape).to_dense_mask(shape)
        errors: dict[str, list[float]] = {"128 keys": [_error(exact * more, exact)]}
        draw = torch.Generator().manual_seed(seed)
        for number in range(DRAWS):
            few, many = (_estimate(a, b, n, draw) for n in (FEATURES, ALONE))
            clusters = SmyrfClusters(2, 32, seed=number).plan(a, b, shape)
            hashed = clusters.to_dense_mask(shape)
            for name, matrix in (
                ("64 features + 64 keys", torch.where(some, exact, few)),
                ("64 features + clusters", torch.where(hashed, exact, few)),
                ("64 features", few),
                ("128 features", many),
            ):
                errors.setdefault(name, []).append(_error(matrix, exact))
        for name, values in errors.items():
            metrics[f"error at beta {beta:g}, {name}"] = sum(values) / len(values)
    return metrics


def _digits(seed: int) -> dict[str, float]:
    metrics = {}
    for name, features, support in (
        ("both", DIGIT_FEATURES, "local"),
        ("window", 0, "local"),
        ("features", DIGIT_FEATURES, None),
    ):  # fmt: skip
        layer = partial(
            ScatterbrainAttention, WIDTH, DIGIT_HEADS, features, support, window=DIGIT_WINDOW
        )
        found = accuracy(layer, "mean", EPOCHS, seed, DIGIT_LAYERS)
        metrics[f"digits, {name}, %"] = found
    return metrics


def _error(matrix: Tensor, exact: Tensor) -> float:
    """Relative Frobenius error, mean over heads."""
    off = (matrix - exact).flatten(2).norm(dim=-1) / exact.flatten(2).norm(dim=-1)
    return float(off.mean())


def _estimate(q: Tensor, k: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """exp(q.k) from features, drawn anew for each of the 12 matrices."""
    rows = []
    for head in range(q.shape[1]):
        features = PositiveRandomFeatures(q.shape[-1], count, softmax_scale=1.0, generator=draw)
        (a, ca), (b, cb) = features.queries(q[:, head]), features.keys(k[:, head])
        rows.append((a * ca.exp()) @ (b * cb.exp()).transpose(-1, -2))
    return torch.stack(rows, 1)


@torch.no_grad()
def _vectors(seed: int) -> tuple[Tensor, Tensor]:
    """Queries and keys (1, 12, 512, 32) of one text, centred, of length 1."""
    model, windows = _encoder()
    found: list[tuple[str, Tensor]] = []
    handles = []
    layers = model.encoder.encoder.layer
    for index in CHOSEN_LAYERS:
        for name in ("query", "key"):
            linear = getattr(layers[index].attention.self, name)
            handles.append(
                linear.register_forward_hook(lambda _m, _i, y, n=name: found.append((n, y)))
            )
    draw = torch.Generator().manual_seed(seed)
    ids = windows[torch.randperm(len(windows), generator=draw)[:1]]
    model(ids, torch.ones_like(ids))
    for handle in handles:
        handle.remove()
    parts = []
    for wanted in ("query", "key"):
        x = torch.cat([y for name, y in found if name == wanted])  # [layers, 512, 384]
        x = x.unflatten(-1, (12, -1)).transpose(1, 2)[:, :CHOSEN_HEADS].flatten(0, 1)
        parts.append(normalize(x - x.mean(1, keepdim=True), dim=-1)[None])
    return parts[0], parts[1]


@lru_cache(maxsize=1)
def _encoder() -> tuple[Any, Tensor]:
    folder = data.fetch_checkpoint("minilm")
    model = models.create_model("minilm", checkpoint_path=folder).eval()
    tokenizer = data.load_tokenizer(folder / "tokenizer.json")
    topics = pydoc_data.topics.topics
    return model, data.token_windows(tokenizer, [topics[n] for n in sorted(topics)], TOKENS)


@lru_cache(maxsize=1)
@torch.no_grad()
def _times() -> dict[str, float]:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, LENGTH, DIM, generator=draw) for _ in range(3))
    features = PositiveRandomFeatures(DIM, FEATURES, generator=draw)
    support = LocalSupport(TIMED_WINDOW)
    metrics = {}
    for name, causal in (("", False), ("causal ", True)):
        times: dict[str, list[float]] = {"dense": [], "ours": []}
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            scaled_dot_product_attention(q, k, v, is_causal=causal)
            middle = time.perf_counter()
            scatterbrain_attention(q, k, v, features, support, causal=causal)
            times["ours"].append(time.perf_counter() - middle)
            times["dense"].append(middle - begin)
        metrics[f"{name}speed-up at {LENGTH}"] = median(times["dense"]) / median(times["ours"])
    return metrics


if __name__ == "__main__":
    as_script(run, claims, SEEDS, threads=1)
