"""SmolLM2-135M-Instruct, a small pretrained language model, as a folder transformers can read.

It comes as a 4-bit GGUF file; that is converted once, and the result kept in the cache beside it.
"""

from __future__ import annotations

import json
from pathlib import Path

from aerogel.atomic import write_atomic
from aerogel.data.fetching import Progress, cache_root, fetch, locked
from aerogel.data.gguf import CONVERSION_VERSION, STAMP, convert_llama
from aerogel.data.packages import file_sha256
from aerogel.data.sources import ASSETS

ASSET = "smollm2-gguf"
FOLDER = "smollm2"
FILES = ("config.json", "tokenizer.json", "model.safetensors")


def folder_of(cache_dir: str | Path | None = None, on_progress: Progress | None = None) -> Path:
    """The folder with config.json, tokenizer.json and model.safetensors (bfloat16, 269 MB).

    Args:
        cache_dir: cache folder; default `AEROGEL_CACHE` or `~/.cache/aerogel`.
        on_progress: called as (what, done, total) while bytes arrive and tensors are converted.

    Raises:
        FetchError: no origin delivered the GGUF file.
        ModuleNotFoundError: `gguf` or `tokenizers` is not installed.
    """
    folder = cache_root(cache_dir) / FOLDER
    if is_whole(folder):
        return folder
    source = fetch(ASSET, cache_dir=cache_dir, on_progress=on_progress)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent / f".{FOLDER}.lock"):
        if not is_whole(folder):  # another process may have been quicker
            convert_llama(source / ASSETS[ASSET].files[0].name, folder, on_progress)
            digests = {name: file_sha256(folder / name) for name in FILES}
            write_atomic(folder / STAMP, json.dumps({**_origin(), "files": digests}), mode=0o644)
    return folder


def is_whole(folder: Path) -> bool:
    """Whether the folder holds all files, undamaged, of this very conversion."""
    try:
        stamp = json.loads((folder / STAMP).read_text())
        digests = stamp.pop("files")
        return stamp == _origin() and all(
            file_sha256(folder / name) == digests[name] for name in FILES
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def _origin() -> dict[str, object]:
    return {"version": CONVERSION_VERSION, "source": ASSETS[ASSET].files[0].sha256}
