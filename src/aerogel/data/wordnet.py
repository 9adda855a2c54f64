"""WordNet glosses: texts to distil a sentence encoder on, and held-out retrieval queries.

A gloss is a definition, often followed by quoted example sentences. For held-out synsets an example
sentence is the query and "lemmas: definition" the document to find; the texts of all other synsets
are the training set. A synset is in one part only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from aerogel.data.dataset import Dataset, fixed_subset
from aerogel.data.fetching import Progress, fetch
from aerogel.data.sources import ASSETS
from aerogel.data.text import RetrievalSplit, load_tokenizer, tokenize

MAX_TOKENS = 48  # 99 % of the texts are shorter
HELD_OUT = 2_000  # synsets whose examples are queries
MIN_QUERY_WORDS = 3  # shorter examples ("a nascent insurgency" has 3) say too little


class Synset(NamedTuple):
    """One entry: its words, its definition and its example sentences."""

    lemmas: tuple[str, ...]
    definition: str
    examples: tuple[str, ...]

    @property
    def document(self) -> str:
        """The text that retrieval has to find."""
        return f"{', '.join(self.lemmas)}: {self.definition}"


def load(
    cache_dir: str | Path | None = None,
    on_progress: Progress | None = None,
    limit: int | None = None,
) -> Dataset:
    """Fetch (once), tokenise for all-MiniLM-L6-v2 and split the WordNet glosses.

    Args:
        cache_dir: cache folder.
        on_progress: called as `(what, bytes_done, bytes_total)` while bytes arrive.
        limit: tokenise only so many training texts and queries (a fixed random choice).

    Raises:
        FetchError: WordNet or the tokenizer cannot be had from any origin.
        ModuleNotFoundError: the package `tokenizers` is not installed.
    """
    folder = fetch("wordnet", cache_dir=cache_dir, on_progress=on_progress)
    encoder = fetch("minilm", cache_dir=cache_dir, on_progress=on_progress)
    tokenizer = load_tokenizer(encoder / "tokenizer.json", MAX_TOKENS)
    train_texts, queries, documents = split_texts(list(read_synsets(folder)))
    if limit is not None:
        train_texts = [train_texts[i] for i in fixed_subset(len(train_texts), limit).tolist()]
        keep = fixed_subset(len(queries), limit).tolist()
        queries, documents = [queries[i] for i in keep], [documents[i] for i in keep]
    test = RetrievalSplit(
        tokenize(tokenizer, queries),
        tokenize(tokenizer, documents),
        torch.arange(len(queries)),
    )
    asset = ASSETS["wordnet"]
    return Dataset(
        name="wordnet-glosses",
        task="distillation",
        train=tokenize(tokenizer, train_texts),
        test=test,
        num_classes=0,
        class_names=(),
        input_shape=(MAX_TOKENS,),
        source=f"{asset.about}; {asset.packages[0]}",
        license=asset.license,
    )


def read_synsets(folder: Path) -> Iterator[Synset]:
    """Parse the four `data.*` files (format: wndb(5WN)); their preamble lines start with spaces."""
    for part in ("noun", "verb", "adj", "adv"):
        with (folder / f"data.{part}").open(encoding="utf-8") as lines:
            for line in lines:
                if not line.startswith(" "):
                    yield _parse(line)


def _parse(line: str) -> Synset:
    fields, _, gloss = line.partition(" | ")
    words = fields.split(" ")
    count = int(words[3], 16)
    lemmas = [re.sub(r"\(\w+\)$", "", words[4 + 2 * i]).replace("_", " ") for i in range(count)]
    examples = tuple(text.strip() for text in re.findall(r'"([^"]+)"', gloss))
    definition = gloss.partition('"')[0].strip(" ;\n")
    return Synset(tuple(lemmas), definition, examples)


def split_texts(synsets: list[Synset]) -> tuple[list[str], list[str], list[str]]:
    """Split into training texts, held-out queries and their documents (same order).

    No text is in two parts, and no two documents are alike: a few synsets share their wording.
    """
    first_of = {synset.document: i for i, synset in reversed(list(enumerate(synsets)))}
    eligible = [
        i
        for i, synset in enumerate(synsets)
        if synset.definition
        and first_of[synset.document] == i
        and any(_is_query(example) for example in synset.examples)
    ]
    order = torch.randperm(len(eligible), generator=torch.Generator().manual_seed(0))
    held = sorted(eligible[i] for i in order[:HELD_OUT].tolist())
    queries = [next(e for e in synsets[i].examples if _is_query(e)) for i in held]
    documents = [synsets[i].document for i in held]
    skip, secret = set(held), {*queries, *documents}
    texts = {
        text: None
        for i, synset in enumerate(synsets)
        if i not in skip
        for text in (synset.document, *synset.examples)
        if text not in secret
    }
    return list(texts), queries, documents


def _is_query(example: str) -> bool:
    return len(example.split()) >= MIN_QUERY_WORDS
