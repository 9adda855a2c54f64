"""Selector files: what a selector learned or measured on one model, in safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from aerogel.atomic import write_atomic
from aerogel.attention.selector import Selector, make_selector

FORMAT = "aerogel-selector-1"


def model_fingerprint(model: nn.Module) -> dict[str, Any]:
    """What a selector file must agree with: class, layers, heads, size of a head."""
    transformer: Any = model
    config = transformer.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    return {
        "class": type(model).__name__,
        "layers": config.num_hidden_layers,
        "q_heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
    }


def save_selector(selector: Selector, model: nn.Module, path: str | Path) -> None:
    """Writes a selector's options and tensors, and the model that they are for."""
    header = {
        "format": FORMAT,
        "slug": selector.slug,
        "options": json.dumps(selector.options()),
        "model": json.dumps(model_fingerprint(model)),
    }
    tensors = {name: t.detach().contiguous() for name, t in selector.state_dict().items()}
    write_atomic(Path(path), save(tensors, header))


def load_selector(path: str | Path, model: nn.Module) -> Selector:
    """Reads a selector for a model.

    Raises:
        ValueError: the file is no selector file, or is of another model.
        FileNotFoundError: there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"selector={str(path)!r}: expected a selector's name or its file")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: not a selector file ({error})") from error
    if header.get("format") != FORMAT:
        raise ValueError(f"{path}: format {header.get('format')!r}, expected {FORMAT!r}")
    known, found = json.loads(header["model"]), model_fingerprint(model)
    if known != found:
        wrong = {
            name: (known.get(name), found[name]) for name in found if known.get(name) != found[name]
        }
        raise ValueError(f"{path}: made for another model; (file, model): {wrong}")
    selector = make_selector(header["slug"], **json.loads(header["options"]))
    selector.load_state_dict(tensors)
    return selector
