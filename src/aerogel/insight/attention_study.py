"""Sparse attentions on one language model and one text: quality, time, memory and density.

Quality is scored on sequences of text whose end repeats an earlier passage (nats of both parts) and
on retrieval probes. Times and memory are of whole prompts through the whole model, the cost of
selection included; methods take turns. Every part of the work is kept in a file of its own as soon
as it is done, and a repeated run only does the rest.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aerogel.atomic import write_atomic
from aerogel.attention.selector_file import model_fingerprint
from aerogel.data import recall
from aerogel.insight import retrieval
from aerogel.insight.attention_cost import Generation, counted, generate_timed, kept_share
from aerogel.insight.attention_methods import Method, attending, empty_cache
from aerogel.insight.language import passage_nats
from aerogel.insight.language_source import LanguageModel

SLOW_SECONDS = 20.0  # a prompt that takes longer is timed once
OnJob = Callable[[int, int, str], None]
"""Called as (parts done, parts in all, the next one's name)."""


@dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes:
        methods: the ways to attend.
        lengths: tokens of a prompt.
        sequences: of text, scored for each method and length; 0 for none.
        probes: of each kind, for each method and length; 0 for none.
        rounds: timed prompts for each method and length; 0 for none.
        seed: of windows and probes.
        chunk: tokens of a timed prompt at a time; None for all.
    """

    methods: tuple[Method, ...]
    lengths: tuple[int, ...]
    sequences: int = 4
    probes: int = 5
    rounds: int = 3
    seed: int = 0
    chunk: int | None = None

    def __post_init__(self) -> None:
        labels = [method.label for method in self.methods]
        if not labels or len(set(labels)) != len(labels):
            raise ValueError(f"methods = {labels}: expected at least one, and no two alike")
        if not self.lengths or min(self.lengths) < _SHORTEST:
            raise ValueError(f"lengths = {self.lengths}: expected some, from {_SHORTEST} tokens")
        if min(self.sequences, self.probes, self.rounds) < 0:
            raise ValueError("sequences, probes and rounds: expected no negative number")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk = {self.chunk}: expected at least one token")


_SHORTEST = 32
_WARMED = 16384  # longer prompts of dense attention need no run before the timed one


@dataclass
class Row:
    """What was found for one method and length; None where it was not asked for or could not be.

    Attributes:
        method, length: which.
        plain, repeat: nats a token, of text and of its repeated end.
        needle, needle_nats, pairs, pairs_nats: share of right answers and nats of an answer token,
            in a haystack and among keys and values.
        density, decode_density: kept share of the pairs in prefill and in decoding.
        prefill_seconds, decode_seconds: medians, of a prompt and of one token.
        peak_bytes, cache_bytes: memory of a prompt, and of its KV cache.
        missing: why something is not there.
    """

    method: str
    length: int
    plain: float | None = None
    repeat: float | None = None
    needle: float | None = None
    needle_nats: float | None = None
    pairs: float | None = None
    pairs_nats: float | None = None
    density: float | None = None
    decode_density: float | None = None
    prefill_seconds: float | None = None
    decode_seconds: float | None = None
    peak_bytes: int | None = None
    cache_bytes: int | None = None
    missing: str = ""

    @property
    def perplexity(self) -> float | None:
        """exp of the plain text's nats a token."""
        return None if self.plain is None else math.exp(self.plain)


Facts = dict[str, Any]


def run(
    study: Study,
    subject: LanguageModel,
    text: Tensor,
    folder: str | Path,
    *,
    on_job: OnJob | None = None,
) -> list[Row]:
    """Do what an earlier run did not do, and gather it all.

    Args:
        study: what to compare.
        subject: the language model; its attention is restored afterwards.
        text: (n,) token ids, more than the longest prompt.
        folder: for the parts and `rows.json`.
        on_job: progress.

    Returns:
        One row for each length and method. A method that fails has the reason in its row and stops
        no other.

    Raises:
        ValueError: the text is too short.
    """
    if len(text) <= max(study.lengths):
        raise ValueError(f"text has {len(text)} tokens, expected above {max(study.lengths)}")
    path = Path(folder)
    parts = path / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    common = {
        "model": model_fingerprint(subject.model),
        "weights": _digest_of_weights(subject),
        "text": hashlib.sha256(text.numpy().tobytes()).hexdigest(),
        "seed": study.seed,
    }
    jobs = list(_jobs(study, subject, text))
    found: list[tuple[str, int, Facts]] = []
    for done, (name, setting, work) in enumerate(jobs):
        if on_job is not None:
            on_job(done, len(jobs), name)
        key = json.dumps({**common, **setting}, sort_keys=True)
        place = parts / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        facts = _done(place)
        if facts is None:
            facts = work()
            if not all("missing" in f for f in facts.values()):  # what failed is tried again
                part = {"setting": json.loads(key), "found": facts}
                write_atomic(place, json.dumps(part, indent=1))
        found += [(label, setting["length"], of) for label, of in facts.items()]
    if on_job is not None:
        on_job(len(jobs), len(jobs), "")
    rows = [_gathered(m.label, n, found) for n in study.lengths for m in study.methods]
    write_atomic(path / "rows.json", json.dumps([asdict(row) for row in rows], indent=1))
    return rows


def _done(place: Path) -> dict[str, Facts] | None:
    try:
        return dict(json.loads(place.read_text())["found"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


Job = tuple[str, dict[str, Any], Callable[[], dict[str, Facts]]]


def _jobs(study: Study, subject: LanguageModel, text: Tensor) -> Iterator[Job]:
    """(name, what decides its outcome, the work) of every part, short prompts first."""
    for length in sorted(study.lengths):
        if study.rounds:
            setting = {
                "part": "cost",
                "length": length,
                "rounds": study.rounds,
                "methods": [method.identity() for method in study.methods],
                "chunk": study.chunk,
            }
            work = partial(_costs, study, subject, text, length)
            yield f"time and memory, {length} tokens", setting, work
        for method in study.methods:
            for part, count, ask in (
                ("passages", study.sequences, _passages),
                ("probes", study.probes, _probes),
            ):
                if not count:
                    continue
                setting = {
                    "part": part,
                    "length": length,
                    "count": count,
                    "method": method.identity(),
                }
                job = partial(ask, subject.encode, text, length, count, study.seed)
                alone = partial(_alone, subject, method, job)
                yield f"{method.label}: {part}, {length} tokens", setting, alone


def _alone(subject: LanguageModel, method: Method, job: Callable[[Any], Facts]) -> dict[str, Facts]:
    return {method.label: _tried(lambda: _with(subject, method, job))}


def _with(subject: LanguageModel, method: Method, job: Callable[[Any], Facts]) -> Facts:
    with attending(subject.model, method):
        return job(subject.model)


def _tried(work: Callable[[], Facts]) -> Facts:
    try:
        return work()
    except (ValueError, RuntimeError, NotImplementedError, ImportError, MemoryError) as error:
        return {"missing": (str(error).strip() or type(error).__name__).splitlines()[0]}


def _digest_of_weights(subject: LanguageModel) -> str:
    """Of a few values of each tensor: another training has others."""
    digest = hashlib.sha256()
    for name, tensor in sorted(subject.model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _passages(
    encode: retrieval.Encode, text: Tensor, length: int, count: int, seed: int, model: Any
) -> Facts:
    generator = torch.Generator().manual_seed(seed)
    windows = recall.draw_windows(text, count, length, generator)
    size = min(128, length // 4)
    nats = passage_nats(model, *recall.repeat_passage(windows, (size, size), generator))
    return nats._asdict()


def _probes(
    encode: retrieval.Encode, text: Tensor, length: int, count: int, seed: int, model: Any
) -> Facts:
    depths = [i / max(1, count - 1) for i in range(count)]
    hay = [retrieval.needle_probe(encode, text, length, d, seed + i) for i, d in enumerate(depths)]
    lines = [retrieval.key_value_probe(encode, length, d, seed + i) for i, d in enumerate(depths)]
    cache = partial(empty_cache, model)
    needle = retrieval.ask(model, hay, make_cache=cache)
    pairs = retrieval.ask(model, lines, make_cache=cache)
    return {
        "needle": needle.accuracy,
        "needle_nats": needle.nats,
        "pairs": pairs.accuracy,
        "pairs_nats": pairs.nats,
    }


def _costs(study: Study, subject: LanguageModel, text: Tensor, length: int) -> dict[str, Facts]:
    """Every method's times in turns, after one prompt that is not timed but counted."""
    prompt = text[:length]
    facts: dict[str, Facts] = {}
    taken: dict[str, list[Generation]] = {}
    for method in study.methods:
        facts[method.label] = _tried(partial(_densities, study, subject, method, prompt))
    for number in range(study.rounds):
        for method in study.methods:
            known, times = facts[method.label], taken.setdefault(method.label, [])
            slow = bool(times) and times[0].prefill_seconds > SLOW_SECONDS
            if "missing" in known or (number and slow):
                continue
            known |= _tried(partial(_timed, study, subject, method, prompt, times))
    for label, times in taken.items():
        if times:
            facts[label] |= {
                "prefill_seconds": statistics.median(t.prefill_seconds for t in times),
                "decode_seconds": statistics.median(t.decode_seconds for t in times),
                "peak_bytes": times[0].peak_bytes,
                "cache_bytes": times[0].cache_bytes,
            }
    return facts


def _timed(
    study: Study, subject: LanguageModel, method: Method, prompt: Tensor, times: list[Generation]
) -> Facts:
    with attending(subject.model, method):
        cache = empty_cache(subject.model)
        times.append(generate_timed(subject.model, prompt, cache=cache, chunk=study.chunk))
    return {}


def _densities(study: Study, subject: LanguageModel, method: Method, prompt: Tensor) -> Facts:
    with attending(subject.model, method) as selector:
        if selector is None:
            if len(prompt) <= _WARMED:
                generate_timed(subject.model, prompt, tokens=1, chunk=study.chunk)
            return {"density": 1.0, "decode_density": 1.0}
        with counted(selector) as found:
            cache = empty_cache(subject.model)
            generate_timed(subject.model, prompt, cache=cache, tokens=2, chunk=study.chunk)
            if not found.prefill:  # its cache attends by itself
                with torch.no_grad():
                    subject.model(input_ids=prompt[None], use_cache=False, logits_to_keep=1)
    return {
        "density": kept_share(found.prefill),
        "decode_density": kept_share(found.decode),
    }


def _gathered(label: str, length: int, found: list[tuple[str, int, Facts]]) -> Row:
    row = Row(label, length)
    for name, size, facts in found:
        if (name, size) == (label, length):
            for key, value in facts.items():
                setattr(row, key, value)
    return row
