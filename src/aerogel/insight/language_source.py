"""Language models and texts by name, as commands take them: models with their tokenizers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aerogel import data, models
from aerogel.data import Progress, load_tokenizer
from aerogel.data.source_text import load_source_text

_BYTES = 256  # vocabulary of models that read bytes


@dataclass(frozen=True)
class LanguageModel:
    """A causal model and the way from text to its tokens.

    Attributes:
        name: as it was asked for.
        model: a transformers causal model, in evaluation mode.
        encode: text to token ids, without special tokens.
    """

    name: str
    model: nn.Module
    encode: Callable[[str], list[int]]


def open_language_model(
    name: str, *, dtype: torch.dtype = torch.float32, on_progress: Progress | None = None
) -> LanguageModel:
    """A pretrained causal language model.

    Args:
        name: "smollm2", the folder of a transformers model, or its name on Hugging Face's hub. A
            model of 256 tokens without a tokenizer reads bytes.
        dtype: of the weights.
        on_progress: called as (what, done, total) while a file arrives.

    Raises:
        ValueError: there is no such model, or it has no tokenizer.
        ModuleNotFoundError: transformers is not installed.
    """
    place: str | Path = name
    if name == "smollm2":
        place = data.fetch_checkpoint(name, on_progress=on_progress)
    transformers = models.language_model.transformers_package()
    try:
        with _without_bar(transformers.utils.logging):
            model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=dtype).eval()
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model = {name!r}: expected smollm2, the folder of a transformers model or its name "
            f"on Hugging Face's hub ({reason})"
        ) from error
    return LanguageModel(name, model, _encoder(transformers, model, Path(place)))


@contextlib.contextmanager
def _without_bar(logging: Any) -> Iterator[None]:
    """Without transformers' own progress bar, which would tear ours."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _encoder(transformers: Any, model: Any, folder: Path) -> Callable[[str], list[int]]:
    if (folder / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(folder / "tokenizer.json")
        return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)
    if model.config.vocab_size == _BYTES:
        return lambda text: list(text.encode())
    try:
        slow = transformers.AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise ValueError(f"model = {str(folder)!r}: has no tokenizer") from error
    return lambda text: list(slow.encode(text, add_special_tokens=False))


def load_text(name: str, *, on_progress: Progress | None = None) -> str:
    """Running text.

    Args:
        name: "brown" (the Brown corpus, fetched once), "python" (the last part of the standard
            library's source), or a UTF-8 file.
        on_progress: called as (what, bytes_done, bytes_total) while bytes arrive.

    Raises:
        ValueError: there is no such text, or the file is not UTF-8.
        FetchError: the corpus could not be had.
    """
    if name == "brown":
        return "\n\n".join(data.load_brown(on_progress=on_progress).values())
    if name == "python":
        return bytes(load_source_text().held_out.tolist()).decode(errors="replace")
    if not Path(name).is_file():
        raise ValueError(f"text = {name!r}: expected brown, python or a file")
    try:
        return Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text = {name!r}: not UTF-8 ({error})") from error


def encode_at_least(
    encode: Callable[[str], list[int]],
    text: str,
    tokens: int,
    *,
    enough: int | None = None,
    chunk: int = 1 << 16,
) -> Tensor:
    """The first tokens of a text, of which no more is encoded than it takes.

    Args:
        encode: as of a `LanguageModel`.
        text: running text.
        tokens: wanted.
        enough: tokens that will do where the text has no more; default `tokens`.
        chunk: characters encoded at a time.

    Returns:
        (n,) int64.

    Raises:
        ValueError: the text has too few tokens.
    """
    ids: list[int] = []
    for start in range(0, len(text), chunk):
        ids += encode(text[start : start + chunk])
        if len(ids) >= tokens:
            break
    least = tokens if enough is None else enough
    if len(ids) < least:
        raise ValueError(f"text has {len(ids)} tokens, expected at least {least}")
    return torch.tensor(ids)
