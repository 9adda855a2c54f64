"""The small language model that the experiments on attention share: trained once, then cached.

Text alone teaches a model of this size no copying from far back in any affordable time (2,300
steps: a repeated passage costs as much as new text). Three phases do: plain text; short sequences
of random symbols with a period, where copying is all there is to learn; text whose end repeats an
earlier passage. About 1,000 seconds on one core.

    python experiments/tiny_lm.py        # trains if the cache has no such model, and prints scores
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from aerogel import data, models
from aerogel.atomic import write_atomic
from aerogel.data import recall
from aerogel.data.fetching import locked
from aerogel.data.source_text import SourceText, load_source_text
from aerogel.insight import PassageNats, passage_nats

VERSION = 1  # of what the recipe below does not say
BETAS, CLIP, WEIGHT_DECAY, WARMUP = (0.9, 0.95), 1.0, 0.1, 50
LAST_LR = 0.1  # of a phase's largest
LENGTH, REPEAT, SCORED = 256, 64, 48
WEIGHTS, REPORTED = "model.safetensors", 100
REQUIRED_GAIN = 0.3  # nats a byte, of a repeated passage over plain text


@dataclass(frozen=True)
class Phase:
    """Steps on batches of one mixture.

    Attributes:
        steps, length, lr: of the phase; the rate falls as a cosine.
        symbols, passages, texts: sequences of each kind in a batch.
        period: of the symbols.
        symbol_weight, symbol_rest: of targets after and in the first period.
    """

    steps: int
    length: int
    lr: float
    texts: int
    symbols: int = 0
    passages: int = 0
    period: tuple[int, int] = (8, 55)
    symbol_weight: float = 2.0
    symbol_rest: float = 0.1

    def batch(self, text: Tensor, generator: torch.Generator) -> recall.Weighted:
        """The next batch."""
        parts = []
        if self.symbols:
            ids, repeated = recall.repeat_symbols(self.symbols, self.length, self.period, generator)
            parts.append(recall.weigh(ids, repeated, self.symbol_weight, self.symbol_rest))
        if self.passages:
            windows = recall.draw_windows(text, self.passages, self.length, generator)
            ids, repeated = recall.repeat_passage(windows, (32, 79), generator)
            parts.append(recall.weigh(ids, repeated, 2.0, 1.0))
        windows = recall.draw_windows(text, self.texts, self.length, generator)
        return recall.joined([*parts, recall.weigh(windows, None, 1.0, 1.0)])


PHASES = (
    Phase(1500, 384, 3e-3, texts=6),
    Phase(1700, 128, 2e-3, texts=6, symbols=10),
    Phase(1500, 256, 1.5e-3, texts=2, symbols=2, passages=4, period=(8, 119), symbol_weight=3.0),
)

OnStep = Callable[[int, int, float], None]


def train(
    seed: int,
    text: Tensor,
    phases: Sequence[Phase],
    *,
    on_step: OnStep | None = None,
) -> nn.Module:
    """Train from random weights.

    Args:
        seed: of the weights and of the batches.
        text: (n,) bytes to train on.
        phases: the curriculum.
        on_step: called as (steps_done, steps_total, loss).
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = models.create_model("tiny_lm")
    done, total = 0, sum(phase.steps for phase in phases)
    for phase in phases:
        optimizer = torch.optim.AdamW(
            model.parameters(), phase.lr, betas=BETAS, weight_decay=WEIGHT_DECAY
        )
        for step in range(phase.steps):
            optimizer.param_groups[0]["lr"] = phase.lr * _rate(step, phase.steps)
            loss = _loss(model, phase.batch(text, generator))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            done += 1
            if on_step is not None:
                on_step(done, total, loss.item())
    return model.eval()


def _rate(step: int, steps: int) -> float:
    falling = LAST_LR + (1 - LAST_LR) * (1 + math.cos(math.pi * step / steps)) / 2
    return min(1.0, (step + 1) / WARMUP) * falling


def _loss(model: nn.Module, batch: recall.Weighted) -> Tensor:
    logits = model(batch.ids).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none")
    weights = batch.weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def held_out(
    count: int = SCORED, length: int = LENGTH, repeat: int = REPEAT
) -> tuple[Tensor, Tensor]:
    """Held-out sequences whose last `repeat` bytes repeat an earlier passage.

    Returns:
        (count, length) int64 bytes, the same in every call, and (count, length) bool: true in the
        repetition.
    """
    generator = torch.Generator().manual_seed(count * 1_000_003 + length)
    windows = recall.draw_windows(load_source_text().held_out, count, length, generator)
    return recall.repeat_passage(windows, (repeat, repeat), generator)


def score(model: nn.Module) -> PassageNats:
    """Nats a byte on the plain part of held-out sequences and on their repeated end."""
    return passage_nats(model, *held_out())


def load(seed: int = 0, *, on_step: OnStep | None = None) -> nn.Module:
    """The trained model, in evaluation mode; trains and caches it if need be.

    Args:
        seed: which of the models.
        on_step: called as (steps_done, steps_total, loss) while it trains.

    Raises:
        RuntimeError: the trained model copies no repeated passage.
    """
    text = load_source_text()
    folder = folder_of(seed, text)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent / f".{folder.name}.lock"):
        if not _is_whole(folder, seed, text):
            _train_into(folder, seed, text, on_step)
    return models.create_model("tiny_lm", checkpoint_path=folder).eval()


def folder_of(seed: int, text: SourceText) -> Path:
    """Where the cache holds the model of a seed; other recipes and texts have other folders."""
    digest = hashlib.sha256((_recipe() + text.sha256).encode()).hexdigest()
    return data.cache_root() / "tiny_lm" / f"seed{seed}-{digest[:8]}"


def _recipe() -> str:
    facts = {
        "version": VERSION,
        "optimizer": ["adamw", *BETAS, WEIGHT_DECAY, CLIP],
        "rate": [WARMUP, LAST_LR],
        "phases": [asdict(phase) for phase in PHASES],
    }
    return json.dumps(facts, sort_keys=True)


def _is_whole(folder: Path, seed: int, text: SourceText) -> bool:
    try:
        with safe_open(str(folder / WEIGHTS), framework="pt") as file:
            header = file.metadata() or {}
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, SafetensorError):
        return False
    wanted = {"seed": str(seed), "recipe": _recipe(), "text": text.sha256}
    return config["model_type"] == "llama" and all(header.get(k) == v for k, v in wanted.items())


def _train_into(folder: Path, seed: int, text: SourceText, on_step: OnStep | None) -> None:
    started = time.process_time()
    model = train(seed, text.train, PHASES, on_step=on_step)
    nats = score(model)
    if not nats.plain - nats.repeat >= REQUIRED_GAIN:
        raise RuntimeError(
            f"seed={seed}: the trained model needs {nats.repeat:.2f} nats a byte for a repeated "
            f"passage and {nats.plain:.2f} for plain text; expected {REQUIRED_GAIN} nats less"
        )
    header = {
        "format": "pt",
        "seed": str(seed),
        "recipe": _recipe(),
        "text": text.sha256,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "nats": json.dumps(nats._asdict()),
        "cpu_seconds": f"{time.process_time() - started:.0f}",
    }
    # The output layer is the embedding.
    state = {k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "config.json", model.config.to_json_string(), mode=0o644)
    write_atomic(folder / WEIGHTS, save(state, header), mode=0o644)


def main() -> None:
    """Train or load, and print the scores."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    started, sums = time.monotonic(), []

    def report(done: int, total: int, loss: float) -> None:
        sums.append(loss)
        if done % REPORTED == 0 or done == total:
            seconds = time.monotonic() - started
            mean = sum(sums) / len(sums)
            print(f"{done:5d}/{total} steps {seconds:6.0f} s  loss {mean:.3f}", flush=True)
            sums.clear()

    model = load(seed, on_step=report)
    nats = score(model)
    print(f"{folder_of(seed, load_source_text())}")
    print(f"plain text {nats.plain:.3f} nats a byte, repeated passage {nats.repeat:.3f}")


if __name__ == "__main__":
    main()
