"""The Brown corpus: a million words of American English prose of 1961, as plain text.

Francis and Kučera, "A Standard Corpus of Present-Day Edited American English", Brown University,
1964. 500 documents of about 2,000 words in 15 genres. The package tags every word with its part of
speech; the tags are left out here and the text is set as it was printed, as far as the corpus
tells.
"""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

from aerogel.data.fetching import FetchError, Progress, fetch
from aerogel.data.sources import ASSETS

DOCUMENTS = 500
_NAME = re.compile(r"package/(c[a-r]\d\d)")
# No document is larger than 100 kB; a damaged archive must not fill the memory.
_MAX_BYTES = 1 << 18


def load_brown(
    *, cache_dir: str | Path | None = None, on_progress: Progress | None = None
) -> dict[str, str]:
    """The documents of the Brown corpus, by name (genre letter and number: "ca01" is press).

    Args:
        cache_dir: cache folder; default `AEROGEL_CACHE` or `~/.cache/aerogel`.
        on_progress: called as `(what, bytes_done, bytes_total)` while bytes arrive.

    Returns:
        500 texts, one paragraph or sentence a line, in the order of their names.

    Raises:
        FetchError: no origin delivered the corpus, or the archive does not hold it.
    """
    asset = ASSETS["brown"]
    folder = fetch(asset.name, cache_dir=cache_dir, on_progress=on_progress)
    path = folder / asset.files[0].name
    texts: dict[str, str] = {}
    with tarfile.open(path, "r:gz") as archive:
        for member in archive:
            match = _NAME.fullmatch(member.name)
            stream = archive.extractfile(member) if match and member.size <= _MAX_BYTES else None
            if match and stream is not None:
                texts[match[1]] = plain_text(stream.read().decode("utf-8"))
    if len(texts) != DOCUMENTS:
        raise FetchError(f"{path} holds {len(texts)} documents, expected {DOCUMENTS}")
    return dict(sorted(texts.items()))


def plain_text(tagged: str) -> str:
    """The sentence that ``word/tag word/tag ...`` lines spell, with printed spacing and quotes."""
    lines = []
    for line in tagged.splitlines():
        words = [token.rpartition("/")[0] or token for token in line.split()]
        if words:
            lines.append(_as_printed(" ".join(words)))
    return "\n".join(lines)


def _as_printed(text: str) -> str:
    text = re.sub(r"`` ?", '"', text)
    text = re.sub(r" ?''", '"', text)
    text = re.sub(r" ([,.;:?!)\]])", r"\1", text)
    text = re.sub(r"([(\[]) ", r"\1", text)
    # The corpus repeats a mark that ends a sentence: "?" is written "? ?".
    return re.sub(r"([?!;])\1", r"\1", text)
