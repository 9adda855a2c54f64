"""Save and load networks with their zeros as bits: safetensors, nothing that could run code.

    save(model, "model.safetensors")            # masks are baked in, keys are the dense model's
    load("model.safetensors", model)            # or load(path) -> dict of plain dense tensors
    print(inspect("model.safetensors"))         # what is in there, without reading the values
    save({"fc.weight": packed}, path)           # a kernels.BlockRowWeight, int8 with its scales
    load_packed(path)["fc.weight"]              # and back, instead of dense tensors

`formats` says how one tensor is laid out. The file's `__metadata__` holds

- `aerogel`: JSON with `format_version`, and for each tensor its layout, shape, dtype, number of
  kept elements and pattern; `shared` maps the other names of tied tensors to the one stored.
- `aerogel.sha256`: over the rest of the metadata and every entry (key, dtype, shape, bytes).
- `format: pt` and the caller's own strings.

Files of the `compressed-tensors` project (`sparse-bitmask`, `sparse-24-bitmask`) and plain
safetensors files load too. Ours load there when they were saved with `format="sparse-bitmask"` or
`"sparse-24-bitmask"`, which keeps every other tensor dense.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np
import torch
from torch import Tensor, nn

from aerogel.runtime import formats
from aerogel.runtime.container import DIGEST, STORABLE, Container, digest, write
from aerogel.runtime.contents import (
    FORMAT_VERSION,
    INFO,
    CheckpointInfo,
    TensorInfo,
    entries_of,
    ours,
    tensor_info,
)
from aerogel.runtime.detect import detect_zeros
from aerogel.runtime.formats import CheckpointError
from aerogel.runtime.module_state import dense_state, fill, memory_of
from aerogel.runtime.shards import open_parts

if TYPE_CHECKING:
    from aerogel.kernels import BlockRowWeight

__all__ = [
    "FORMATS",
    "CheckpointError",
    "CheckpointInfo",
    "TensorInfo",
    "inspect",
    "load",
    "load_masks",
    "load_packed",
    "save",
]

FORMATS = ("auto", *formats.LAYOUTS)
_RESERVED = ("format", INFO, DIGEST)

Model = TypeVar("Model", bound=nn.Module)


def _checked_state(obj: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    if isinstance(obj, nn.Module):
        state, masks = dense_state(obj)
    elif isinstance(obj, Mapping):
        state, masks = _spread(obj)
    else:
        raise TypeError(f"obj must be a module or a dict of tensors, got {type(obj).__name__}")
    for key, value in state.items():
        if not isinstance(key, str) or not key or key == "__metadata__":
            raise ValueError(f"obj has the key {key!r}; tensor names must be non-empty strings")
        if not isinstance(value, Tensor):
            raise ValueError(f"obj[{key!r}] is a {type(value).__name__}; only tensors can be saved")
        if value.is_meta or value.layout != torch.strided:
            what = "on the meta device" if value.is_meta else f"in layout {value.layout}"
            raise ValueError(f"obj[{key!r}] is {what}; save plain dense tensors")
        if value.dtype not in STORABLE:
            raise ValueError(f"obj[{key!r}] is {value.dtype}, which safetensors cannot hold")
    return state, masks


def _spread(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The state as tensors, and the masks of the weights that were packed."""
    if all(isinstance(value, Tensor) for value in state.values()):
        return dict(state), {}
    from aerogel.runtime.packed_state import spread_packed  # plain checkpoints need no kernels

    return spread_packed(state)


def _split_shared(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to store, and other name -> stored name for those that are the very same memory."""
    first: dict[Any, str] = {}
    unique: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    for name, tensor in state.items():
        same = memory_of(tensor)
        if tensor.numel() and same in first:
            shared[name] = first[same]
            continue
        first[same] = name
        unique[name] = tensor
    return unique, shared


def _checked_patterns(patterns: Any, names: Mapping[str, Tensor]) -> dict[str, str]:
    if patterns is None:
        return {}
    if not isinstance(patterns, Mapping):
        raise TypeError(f"patterns must map tensor names to patterns, got {patterns!r}")
    for name in patterns:
        if name not in names:
            close = get_close_matches(str(name), list(names), 3)
            raise ValueError(f"patterns names {name!r}, which is not saved; nearest: {close}")
    return {name: str(pattern) for name, pattern in patterns.items()}


def _checked_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"metadata must map strings to strings, got {key!r}: {value!r}")
        if key in _RESERVED:
            raise ValueError(f"metadata has the key {key!r}; {', '.join(_RESERVED)} are reserved")
    return dict(metadata or {})


def _encode(
    name: str, tensor: Tensor, mask: Tensor | None, format: str, taken: set[str]
) -> formats.Encoded:
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    kept = formats.nonzero(tensor)
    if mask is not None:
        kept |= mask.cpu().numpy()
    count = int(np.count_nonzero(kept))
    sizes = formats.candidates(name, tensor, kept, count)
    wanted = formats.choose(
        sizes, format, full_24=2 * count == tensor.numel(), masked=mask is not None
    )
    for layout in wanted:
        keys = formats.part_keys(name, layout).values()
        # A real tensor may have the name of a part; then another layout, at last dense, is free.
        if layout == formats.DENSE or taken.isdisjoint(keys):
            taken.update(keys)
            return formats.encode(tensor, kept, count, layout)
    return formats.encode(tensor, kept, count, formats.DENSE)


def _pattern_of(encoded: formats.Encoded, tensor: Tensor) -> str | None:
    if encoded.layout == formats.BITMASK_24:
        return "2:4"
    if encoded.kept == tensor.numel():
        return None
    return "unstructured" if tensor.dim() < 2 else detect_zeros(tensor).pattern


def save(
    obj: nn.Module | Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
    patterns: Mapping[str, Any] | None = None,
    format: str = "auto",
) -> None:
    """Write a network or a dict of tensors to a safetensors file, zeros as bits.

    Active parametrizations (masks) are baked: the file has the dense model's key names, and the
    masks live on in the bitmasks. Tied tensors are stored once. The file appears at once and whole
    or, on any error, not at all; an older file of that name then stays as it was.

    Args:
        obj: a module, or a dict from names to tensors on any device or packed weights
            (`kernels.BlockRowWeight`); scales of int8 values are stored as `<name>_scale`.
        path: the file to write; its folder must exist.
        metadata: the caller's own strings, returned by `inspect`.
        patterns: tensor name -> sparsity pattern to record, e.g. `{"fc.weight": "4x1"}`. Tensors
            not named are recorded as `detect_zeros` sees them.
        format: "auto" takes the smallest layout for each tensor; "dense", "sparse-bitmask",
            "sparse-24-bitmask" or "flat-bitmask" use that one wherever it is possible.

    Raises:
        ValueError: something in `obj` cannot be saved, or an argument is not understood.
        OSError: the file cannot be written (full disk, read-only or missing folder).
    """
    if format not in FORMATS:
        close = get_close_matches(str(format), FORMATS, 2)
        raise ValueError(f"format={format!r} is not one of {', '.join(FORMATS)}; nearest: {close}")
    state, masks = _checked_state(obj)
    user = _checked_metadata(metadata)
    named = _checked_patterns(patterns, state)
    parts, info = _lay_out(state, masks, named, format)
    header = {"format": "pt", INFO: json.dumps(info, separators=(",", ":")), **user}
    header[DIGEST] = digest(header, parts)
    write(parts, header, Path(path))


def _lay_out(
    state: dict[str, Tensor], masks: dict[str, Tensor], patterns: dict[str, str], format: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The file's entries, and the description of what they are."""
    unique, shared = _split_shared(state)
    parts: dict[str, Tensor] = {}
    described: dict[str, Any] = {}
    taken = set(state)
    for name, tensor in unique.items():
        encoded = _encode(name, tensor, masks.get(name), format, taken)
        keys = formats.part_keys(name, encoded.layout)
        parts.update({key: encoded.parts[part] for part, key in keys.items()})
        described[name] = {
            "layout": encoded.layout,
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "kept": encoded.kept,
        }
        pattern = patterns.get(name) or _pattern_of(encoded, tensor)
        if pattern:
            described[name]["pattern"] = pattern
    return parts, {"format_version": FORMAT_VERSION, "tensors": described, "shared": shared}


def _verify(file: Container) -> None:
    """Compare the checksum of a file that aerogel wrote."""
    if ours(file):
        found = digest(file.metadata, {key: file.get(key) for key in file.entries})
        if found != file.metadata.get(DIGEST):
            raise CheckpointError(
                f"{file.path} is damaged: its SHA-256 is {found[:12]}..., "
                f"but {file.metadata.get(DIGEST, 'none')[:12]}... was recorded"
            )


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    state: dict[str, Tensor] = {}
    masks: dict[str, np.ndarray] = {}
    for file in open_parts(path):
        entries, shared = entries_of(file)
        _verify(file)
        for entry in entries:
            if entry.name in state:
                raise CheckpointError(f"{file.path}: {entry.name!r} is in another file too")
            state[entry.name], kept = entry.read(file)
            if kept is not None:
                masks[entry.name] = kept
        for alias, name in shared.items():
            state[alias] = state[name]
            if name in masks:
                masks[alias] = masks[name]
    return state, masks


@overload
def load(
    path: str | os.PathLike[str], model: None = ..., strict: bool = ...
) -> dict[str, Tensor]: ...
@overload
def load(path: str | os.PathLike[str], model: Model, strict: bool = ...) -> Model: ...
def load(
    path: str | os.PathLike[str], model: Model | None = None, strict: bool = True
) -> dict[str, Tensor] | Model:
    """Read a checkpoint of aerogel or compressed-tensors, or a plain safetensors file.

    Everything is read and checked before the model is touched. Where the model has a mask
    (a parametrization with a bool buffer of the weight's shape), the mask becomes the file's, so
    zeros stay zero in further training.

    Args:
        path: the file; of a checkpoint in several files, its index (`.json`) or its folder.
        model: a module to load into; it keeps its devices and dtypes.
        strict: whether the file and the model must name the same tensors. Of tensors that the model
            ties together one is enough.

    Returns:
        The model, or without one a dict of dense CPU tensors; tied names share one tensor.

    Raises:
        CheckpointError: the file is damaged, hostile, or no safetensors file.
        ValueError: the file does not fit the model.
        OSError: the file cannot be opened.
    """
    state, masks = _read(path)
    if model is None:
        return state
    fill(model, state, masks, strict)
    return model


def load_masks(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The masks of a checkpoint: bool tensors, True = kept, of every tensor stored as bits.

    Args:
        path: a file written by `save`, or by compressed-tensors.

    Returns:
        Masks by tensor name. A kept weight whose value is zero is True here.

    Raises:
        CheckpointError: as `load`.
    """
    return {name: torch.from_numpy(kept) for name, kept in _read(path)[1].items()}


def load_packed(path: str | os.PathLike[str]) -> dict[str, Tensor | BlockRowWeight]:
    """Read a checkpoint with its sparse matrices packed, ready for the kernels.

    Args:
        path: a file written by `save`, or by compressed-tensors.

    Returns:
        Matrices that the file stores as bits as `kernels.BlockRowWeight`, int8 ones with their
        scales; all else as dense CPU tensors.

    Raises:
        CheckpointError: as `load`.
    """
    from aerogel.runtime.packed_state import gather_packed

    state, masks = _read(path)
    return gather_packed(state, {name: torch.from_numpy(kept) for name, kept in masks.items()})


def inspect(path: str | os.PathLike[str]) -> CheckpointInfo:
    """Describe a checkpoint from its header alone, without reading or verifying the values.

    Args:
        path: as in `load`.

    Returns:
        Its tensors with layout, pattern and sparsity, its metadata and its sizes; without a
        checksum if it is in several files.

    Raises:
        CheckpointError: the file is no safetensors file, or its description is contradictory.
        OSError: the file cannot be opened.
    """
    files = open_parts(path)
    found = [entries_of(file) for file in files]
    metadata = {key: value for file in files for key, value in file.metadata.items()}
    return CheckpointInfo(
        path=str(path),
        format_version=FORMAT_VERSION if all(map(ours, files)) else None,
        file_bytes=sum(file.file_bytes for file in files),
        tensors=[
            tensor_info(file, entry)
            for file, (entries, _) in zip(files, found, strict=True)
            for entry in entries
        ],
        shared={alias: name for _, shared in found for alias, name in shared.items()},
        metadata={key: value for key, value in metadata.items() if key not in _RESERVED},
        sha256=metadata.get(DIGEST) if len(files) == 1 else None,
    )
