"""What a checkpoint says it holds: one entry for each tensor, from either program's files."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aerogel.runtime import formats
from aerogel.runtime.container import DIGEST, Container
from aerogel.runtime.formats import CheckpointError

FORMAT_VERSION = 1
INFO = "aerogel"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint. `sparsity` is None where only reading the values would tell."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    pattern: str | None
    sparsity: float | None
    stored_bytes: int
    dense_bytes: int

    @property
    def elements(self) -> int:
        """How many numbers the tensor has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint holds."""

    path: str
    format_version: int | None  # None: not written by aerogel
    file_bytes: int
    tensors: list[TensorInfo]
    shared: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    sha256: str | None = None

    @property
    def dense_bytes(self) -> int:
        """What the tensors take with every zero written out."""
        return sum(t.dense_bytes for t in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "dense_bytes": self.dense_bytes}

    def __str__(self) -> str:
        rows = [("tensor", "shape", "dtype", "layout", "pattern", "sparsity", "bytes")]
        for t in self.tensors:
            sparsity = "?" if t.sparsity is None else f"{t.sparsity:.1%}"
            shape = "x".join(map(str, t.shape)) or "scalar"
            rows.append(
                (
                    t.name,
                    shape,
                    t.dtype,
                    t.layout,
                    t.pattern or "-",
                    sparsity,
                    f"{t.stored_bytes:,}",
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        table = "\n".join(
            "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows
        )
        table += "".join(f"\n{alias} = {name}" for alias, name in self.shared.items())
        share = self.file_bytes / self.dense_bytes if self.dense_bytes else 1.0
        return f"{table}\n{self.file_bytes:,} bytes on disk, {share:.1%} of dense"


@dataclass(frozen=True)
class Entry:
    """One tensor of an open file: where its parts are and what is claimed about it."""

    name: str
    layout: str
    keys: dict[str, str]
    shape: tuple[int, ...]
    dtype: str | None = None
    kept: int | None = None
    pattern: str | None = None

    def read(self, file: Container) -> tuple[Tensor, np.ndarray | None]:
        """The dense tensor, and its mask (True = kept) where it is stored as bits."""
        parts = {part: file.get(key) for part, key in self.keys.items()}
        where = f"{file.path}: tensor {self.name!r}"
        with file.reading():
            if self.layout == formats.DENSE:
                # A copy: what is returned must not change or fault when the file does.
                tensor, kept = parts[""].clone(), None
            else:
                tensor, kept = formats.decode(parts, self.layout, where)
        dtype = str(tensor.dtype).removeprefix("torch.")
        if tuple(tensor.shape) != self.shape or self.dtype not in (None, dtype):
            raise CheckpointError(
                f"{where} is {dtype} {tuple(tensor.shape)}, "
                f"but the metadata says {self.dtype} {self.shape}"
            )
        return tensor, kept


def _described(file: Container) -> tuple[list[Entry], dict[str, str]]:
    """The entries and shared names of a file that aerogel wrote."""
    with file.reading():
        info = json.loads(file.metadata[INFO])
        version = info["format_version"]
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{file.path} has format version {version!r}, this aerogel reads {FORMAT_VERSION}"
            )
        entries = [_described_entry(file, name, row) for name, row in info["tensors"].items()]
        shared = {str(alias): str(name) for alias, name in info["shared"].items()}
    names = {entry.name for entry in entries}
    used = [key for entry in entries for key in entry.keys.values()]
    if sorted(used) != sorted(file.entries):
        odd = sorted(set(used) ^ set(file.entries))[:4] or "one used twice"
        raise CheckpointError(f"{file.path}: entries and their description differ: {odd}")
    if not names.issuperset(shared.values()) or not names.isdisjoint(shared):
        raise CheckpointError(f"{file.path}: its shared tensors name something it does not hold")
    return entries, shared


def _described_entry(file: Container, name: str, row: Any) -> Entry:
    layout, shape, kept, pattern = row["layout"], row["shape"], row["kept"], row.get("pattern")
    ints = [*shape, kept]
    if layout not in formats.LAYOUTS or not all(type(v) is int and v >= 0 for v in ints):
        raise CheckpointError(f"{file.path}: tensor {name!r} is described as {row!r:.200}")
    checked = formats.checked_shape(shape, f"{file.path}: tensor {name!r}")
    return Entry(
        name,
        layout,
        formats.part_keys(name, layout),
        checked,
        str(row["dtype"]),
        kept,
        None if pattern is None else str(pattern),
    )


def _foreign(file: Container) -> list[Entry]:
    """The entries of a compressed-tensors or plain safetensors file."""
    entries: list[Entry] = []
    used: set[str] = set()
    for key in file.entries:
        prefix, _, part = key.rpartition(".")
        names = {p: f"{prefix}.{p}" for p in formats.PARTS[formats.BITMASK]}
        present = {p: k for p, k in names.items() if k in file}
        if part != "bitmask" or not {"compressed", "bitmask", "shape"} <= present.keys():
            continue
        shape = file.get(present["shape"])
        layout = formats.layout_of(present, shape)
        # aerogel's own layout, but another program has dropped the metadata that names it.
        name = prefix if layout == formats.FLAT else f"{prefix}.weight"
        with file.reading():
            dense = formats.sparse_shape(shape, f"{file.path}: tensor {name!r}")
        kept = math.prod(file.shape(present["compressed"]))
        pattern = "2:4" if layout == formats.BITMASK_24 else "unstructured"
        entries.append(Entry(name, layout, present, dense, None, kept, pattern))
        used.update(present.values())
    plain = [
        Entry(key, formats.DENSE, {"": key}, file.shape(key))
        for key in file.entries
        if key not in used
    ]
    names_seen = [entry.name for entry in entries + plain]
    if len(set(names_seen)) != len(names_seen):
        raise CheckpointError(f"{file.path} holds a tensor both sparse and dense")
    return entries + plain


def entries_of(file: Container) -> tuple[list[Entry], dict[str, str]]:
    """The entries of a file, and the other names of tied tensors with the one stored."""
    return _described(file) if ours(file) else (_foreign(file), {})


def ours(file: Container) -> bool:
    """Whether aerogel wrote the file. One of its two marks is enough, so losing one is noticed."""
    return INFO in file.metadata or DIGEST in file.metadata


def tensor_info(file: Container, entry: Entry) -> TensorInfo:
    """What an entry says of itself, without reading its values."""
    values = entry.keys[""] if entry.layout == formats.DENSE else entry.keys["compressed"]
    numel, held = math.prod(entry.shape), math.prod(file.shape(values))
    item = file.stored_bytes(values) // held if held else 0
    if not item and entry.dtype and hasattr(torch, entry.dtype):
        item = getattr(torch, entry.dtype).itemsize
    return TensorInfo(
        name=entry.name,
        shape=entry.shape,
        dtype=entry.dtype or str(file.entries[values]["dtype"]).lower(),
        layout=entry.layout,
        pattern=entry.pattern,
        sparsity=None if entry.kept is None or not numel else 1 - entry.kept / numel,
        stored_bytes=sum(file.stored_bytes(key) for key in entry.keys.values()),
        dense_bytes=numel * item,
    )
