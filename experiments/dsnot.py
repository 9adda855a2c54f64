"""DSnoT on top of magnitude and Wanda, beside SparseGPT: a sentence encoder and a language model.

Nothing is trained. Part one: all-MiniLM-L6-v2 (6 BERT blocks, 36 linear layers) is pruned with 96
calibration sentences and its embeddings of 200 other sentences are compared with the dense
network's. The sentences come from Python's own documentation (`pydoc_data.topics`). A seed draws
the calibration sentences; those that are scored are always the same.

Part two: SmolLM2-135M-Instruct (30 Llama blocks, 210 linear layers; stored in 4 bits, here
dequantised) is pruned with 12 sequences of 128 tokens of the Brown corpus and scored by its
perplexity on 512 tokens of other documents. It is pruned with one draw of sequences, which all
seeds share. The papers calibrate with 128 sequences of 2,048 tokens and score hundreds of thousands
of them; these sizes are chosen so that all of it takes six minutes on one core.
"""

from __future__ import annotations

import copy
import pydoc_data.topics
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from aerogel import data, models
from aerogel.pruning import dsnot_, magnitude_, sparsegpt_, wanda_
from aerogel.report.evidence import Claim, Result, as_script, mean
from aerogel.sparsity.blocks import find_blocks
from aerogel.train import perplexity

SLUG = "dsnot"
SEEDS = (0, 1)

CALIBRATION_SENTENCES, SCORED_SENTENCES, SENTENCE_BATCH = 96, 200, 32
CALIBRATION_WINDOWS, SCORED_WINDOWS, WINDOW = 12, 4, 128
CALIBRATION_DOCUMENTS = 24
# One document of each of these genres: press, religion, learned prose, adventure.
SCORED_DOCUMENTS = ("ca01", "cd01", "cj01", "cn01")

Batches = list[dict[str, Tensor]]
Prune = Callable[[nn.Module, Batches, float], object]

METHODS: dict[str, Prune] = {
    "magnitude": lambda model, batches, sparsity: magnitude_(
        model, sparsity, scope="row", include=[f"{find_blocks(model)[0]}.*"]
    ),
    "magnitude + DSnoT": lambda model, batches, sparsity: dsnot_(
        model, batches, sparsity, start="magnitude"
    ),
    "Wanda": lambda model, batches, sparsity: wanda_(model, batches, sparsity),
    "Wanda + DSnoT": lambda model, batches, sparsity: dsnot_(model, batches, sparsity),
    "Wanda + DSnoT, attention only": lambda model, batches, sparsity: dsnot_(
        model, batches, sparsity, skip="mlp"
    ),
    "SparseGPT": lambda model, batches, sparsity: sparsegpt_(model, batches, sparsity),
}
ENCODER_RUNS = (
    *(("Wanda", 0.5), ("Wanda + DSnoT", 0.5)),
    *((method, 0.6) for method in METHODS),
    *(("magnitude", 0.7), ("magnitude + DSnoT", 0.7), ("Wanda", 0.7), ("Wanda + DSnoT", 0.7)),
)
LANGUAGE_RUNS = (
    *((method, 0.5) for method in ("magnitude", "Wanda", "Wanda + DSnoT", "SparseGPT")),
    *((method, 0.6) for method in METHODS),
)


def run(seed: int) -> Result:
    """Prune both models with every method and compare them with the dense ones."""
    started = time.perf_counter()
    metrics: dict[str, float] = {}
    metrics.update(_sentence_encoder(seed))
    metrics.update(_language_model())
    notes = (
        "Cosine: mean over 200 sentences of the cosine between dense and pruned embeddings, times "
        "100. Correlation: of the 19,900 pairwise similarities, times 100.",
        f"Perplexity: SmolLM2-135M-Instruct (from 4 bits) on {SCORED_WINDOWS * WINDOW} tokens of "
        f"the Brown corpus in windows of {WINDOW}; calibrated on {CALIBRATION_WINDOWS} x {WINDOW} "
        "others, one draw that all seeds share.",
        "Attention only is the default of the paper's code (its skip_type mlp); ours refines all "
        "layers. The claim on the language model with Wanda is judged with our default.",
        "That claim fails, also with 32 calibration sequences (perplexity 160, Wanda 142). Leaving "
        "the first token of each window out of the statistics does not mend it (8 sequences: 154, "
        "158 with it, Wanda 136). Fewer swaps come nearer to Wanda: 140 with the sign of the error "
        "kept, 144 with a threshold of 1.0. One draw each, run by hand.",
    )
    return Result(SLUG, seed, metrics, time.perf_counter() - started, notes)


def claims(results: Sequence[Result]) -> list[Claim]:
    """The thresholds, on the means over seeds."""
    wanted = [
        ("cosine", "60%", "magnitude", 8.0, "perplexity 560 -> 66.7 (LLaMA-7B, WikiText-2)"),
        ("cosine", "60%", "Wanda", 2.0, "perplexity 10.69 -> 10.22 (LLaMA-7B)"),
        ("correlation", "60%", "magnitude", 0.0, ""),
        ("correlation", "60%", "Wanda", 0.0, ""),
        ("cosine", "50%", "Wanda", -0.3, ""),
        ("cosine", "70%", "Wanda", 3.0, "perplexity 26.79 better (LLaMA-7B, abstract)"),
    ]
    found = [
        Claim(
            text=f"{start} + DSnoT against {start}, {zeros} zeros: {figure}",
            ours=mean(results, f"{figure}, {start} + DSnoT {zeros}"),
            baseline=mean(results, f"{figure}, {start} {zeros}"),
            threshold=threshold,
            paper=paper,
            unit="x100",
        )
        for figure, zeros, start, threshold, paper in wanted
    ]
    found.append(
        Claim(
            text="SparseGPT against Wanda, 60% zeros: cosine",
            ours=mean(results, "cosine, SparseGPT 60%"),
            baseline=mean(results, "cosine, Wanda 60%"),
            threshold=0.0,
            paper="perplexity 10.41 against 10.69 (LLaMA-7B)",
            unit="x100",
        )
    )
    for start, paper in (
        ("magnitude", "560 -> 66.7 (LLaMA-7B, WikiText-2)"),
        ("Wanda", "10.69 -> 10.22 (LLaMA-7B, WikiText-2)"),
    ):
        found.append(
            Claim(
                text=f"{start} + DSnoT against {start}, 60% zeros: language model",
                ours=mean(results, f"perplexity, {start} + DSnoT 60%"),
                baseline=mean(results, f"perplexity, {start} 60%"),
                threshold=0.0,
                paper=paper,
                unit="perplexity",
                higher_is_better=False,
            )
        )
    found.append(
        Claim(
            text="Wanda + DSnoT on all 36 layers of the encoder, against a limit of 20 s",
            ours=mean(results, "seconds, Wanda + DSnoT 60%"),
            baseline=20.0,
            threshold=0.0,
            paper="LLaMA-7B: about 5 s, SparseGPT about 150 s (read off a plot)",
            unit="s",
            higher_is_better=False,
        )
    )
    return found


def _sentence_encoder(seed: int) -> dict[str, float]:
    model, tokenizer, scored, rest = _encoder()
    dense = copy.deepcopy(model.state_dict())
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed)).tolist()
    batches = _batches(tokenizer, [rest[i] for i in order[:CALIBRATION_SENTENCES]])
    scored_batches = _batches(tokenizer, scored)
    wanted = _embed(model, scored_batches)
    metrics = {}
    for method, sparsity in ENCODER_RUNS:
        begin = time.perf_counter()
        METHODS[method](model, batches, sparsity)
        seconds = time.perf_counter() - begin
        found = _embed(model, scored_batches)
        model.load_state_dict(dense)
        name = f"{method} {sparsity:.0%}"
        metrics[f"cosine, {name}"] = 100.0 * (wanted * found).sum(1).mean().item()
        metrics[f"correlation, {name}"] = 100.0 * _correlation(wanted, found)
        metrics[f"seconds, {name}"] = seconds
    return metrics


@lru_cache(maxsize=1)
def _language_model() -> dict[str, float]:
    model, windows, scored = _smollm()
    dense = copy.deepcopy(model.state_dict())
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    chosen = windows[order[:CALIBRATION_WINDOWS]]
    batches = [{"input_ids": ids} for ids in chosen.split(4)]
    metrics = {"perplexity, dense": perplexity(model, scored)}
    for method, sparsity in LANGUAGE_RUNS:
        begin = time.perf_counter()
        METHODS[method](model, batches, sparsity)
        seconds = time.perf_counter() - begin
        name = f"{method} {sparsity:.0%}"
        metrics[f"perplexity, {name}"] = perplexity(model, scored)
        metrics[f"seconds, language model, {name}"] = seconds
        model.load_state_dict(dense)
    return metrics


@lru_cache(maxsize=1)
def _encoder() -> tuple[nn.Module, object, list[str], list[str]]:
    """The dense encoder, its tokenizer, the sentences to score and those to calibrate with."""
    folder = data.fetch_checkpoint("minilm")
    model = models.create_model("minilm", checkpoint_path=folder).eval()
    tokenizer = data.load_tokenizer(folder / "tokenizer.json", max_length=128)
    sentences = list(dict.fromkeys(_sentences()))
    order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(1234)).tolist()
    shuffled = [sentences[i] for i in order]
    scored = sorted(shuffled[:SCORED_SENTENCES], key=len)  # batches then need little padding
    return model, tokenizer, scored, shuffled[SCORED_SENTENCES:]


def _sentences() -> Iterator[str]:
    """Sentences of prose in Python's documentation: no code, no tables, no headings."""
    for topic in pydoc_data.topics.topics.values():
        for paragraph in re.split(r"\n\s*\n", topic):
            text = " ".join(paragraph.split())
            for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", text):
                words = sentence.split()
                plain = sum(word.strip(".,;:()'\"").isalpha() for word in words)
                if 8 <= len(words) <= 24 and plain >= 0.8 * len(words) and sentence[-1] in ".!?":
                    yield sentence


def _batches(tokenizer: object, sentences: Sequence[str]) -> Batches:
    encoded = [e.ids for e in tokenizer.encode_batch(list(sentences))]  # type: ignore[attr-defined]
    batches = []
    for start in range(0, len(encoded), SENTENCE_BATCH):
        part = encoded[start : start + SENTENCE_BATCH]
        longest = max(map(len, part))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in part])
        lengths = torch.tensor([len(row) for row in part])
        mask = (torch.arange(longest) < lengths[:, None]).long()
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


@torch.no_grad()
def _embed(model: nn.Module, batches: Batches) -> Tensor:
    return torch.cat([model(**batch) for batch in batches])  # [sentences, 384], length 1


def _correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's, of the similarities of all pairs of sentences."""
    rows, columns = torch.triu_indices(len(a), len(a), offset=1)
    pairs = torch.stack([(x @ x.t())[rows, columns] for x in (a, b)])
    return float(torch.corrcoef(pairs)[0, 1])


@lru_cache(maxsize=1)
def _smollm() -> tuple[nn.Module, Tensor, Tensor]:
    """The dense language model, windows to calibrate with and windows to score."""
    folder = data.fetch_checkpoint("smollm2")
    model = models.create_model("smollm2", checkpoint_path=folder).eval()
    tokenizer = data.load_tokenizer(folder / "tokenizer.json")
    brown = data.load_brown()
    others = [name for name in brown if name not in SCORED_DOCUMENTS]
    step = len(others) // CALIBRATION_DOCUMENTS
    texts = [brown[name] for name in others[::step][:CALIBRATION_DOCUMENTS]]
    scored = torch.cat(
        [
            data.token_windows(tokenizer, [brown[name]], WINDOW)[: SCORED_WINDOWS // 4]
            for name in SCORED_DOCUMENTS
        ]
    )
    return model, data.token_windows(tokenizer, texts, WINDOW), scored


if __name__ == "__main__":
    as_script(run, claims, SEEDS)
