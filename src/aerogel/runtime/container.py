"""The safetensors file itself: opening it with suspicion, its checksum, and writing it at once.

`formats` knows what the entries mean, `checkpoint` what a network is; this only knows files.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from aerogel.runtime.formats import CheckpointError, raw

DIGEST = "aerogel.sha256"
_LENGTH_BYTES = 8  # a safetensors file begins with its header's length, a little-endian uint64
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
STORABLE = frozenset(_DTYPE_NAMES)
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class Container:
    """A safetensors file, opened and checked; entries are read when asked for.

    The `safetensors` library refuses headers that are no JSON or too long, entries that overlap,
    leave gaps or reach beyond the file, and shapes that do not fit their bytes. So nothing read
    from here is larger than the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.file_bytes = self._checked_size()
        with self.reading():
            self._file = safe_open(self.path, framework="pt")
            header = self._header()
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self.entries: dict[str, dict[str, Any]] = header

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Whatever the libraries below say about bad bytes becomes a `CheckpointError`."""
        try:
            yield
        except CheckpointError:
            raise
        except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RuntimeError,
                OverflowError) as error:  # fmt: skip
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise CheckpointError(f"{self.path} is not a readable checkpoint: {reason}") from error

    def _checked_size(self) -> int:
        status = self.path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise CheckpointError(f"{self.path} is {kind}; expected a safetensors file")
        with self.path.open("rb") as file:
            start = file.read(_LENGTH_BYTES + 1)
        if start.startswith(_PICKLE_STARTS) and start[_LENGTH_BYTES:] != b"{":
            raise CheckpointError(
                f"{self.path} looks like a pickle or torch.save file; aerogel never unpickles. "
                "Load it yourself with torch.load(..., weights_only=True) and aerogel.save it"
            )
        if len(start) < _LENGTH_BYTES:
            raise CheckpointError(f"{self.path} has {len(start)} bytes: it is empty or truncated")
        return status.st_size

    def _header(self) -> dict[str, Any]:
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            header = json.loads(file.read(min(length, self.file_bytes)))
        assert isinstance(header, dict)
        return header

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def stored_bytes(self, key: str) -> int:
        """Bytes of one entry's values."""
        begin, end = self.entries[key]["data_offsets"]
        return int(end - begin)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one entry, from the header."""
        return tuple(self.entries[key]["shape"])

    def get(self, key: str) -> Tensor:
        """Read one entry; its memory may still be the file's."""
        with self.reading():
            tensor: Tensor = self._file.get_tensor(key)
            # A bool that is neither 0 nor 1 would be a trap for everything that trusts bools.
            return raw_bool(tensor) if tensor.dtype == torch.bool else tensor


def raw_bool(tensor: Tensor) -> Tensor:
    """A bool tensor whose bytes are all 0 or 1."""
    return tensor.view(torch.uint8) != 0


def digest(metadata: Mapping[str, str], parts: Mapping[str, Tensor]) -> str:
    """SHA-256, as hex, over the metadata except itself, and over every entry in name order."""
    sha = hashlib.sha256()
    rest = {key: value for key, value in metadata.items() if key != DIGEST}
    sha.update(json.dumps(rest, sort_keys=True).encode())
    for key in sorted(parts):
        part = parts[key]
        sha.update(json.dumps([key, str(part.dtype), list(part.shape)]).encode())
        if part.numel():
            sha.update(raw(part).reshape(-1).data)
    return sha.hexdigest()


def write(parts: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
    """Write entries to `path`: the whole file at once, or no change at all.

    Written here and not by the `safetensors` library, because that keeps its metadata in an order
    that changes from run to run, and its errors do not carry the system's error number.

    Args:
        parts: contiguous CPU tensors by key.
        metadata: strings for the header.
        path: the file; equal arguments give equal bytes.

    Raises:
        OSError: with the reason of the system, e.g. ENOSPC; the temporary file is gone then.
    """
    # Widest first, as the library does it: so every entry is aligned to its own width.
    order = sorted(parts, key=lambda key: (-parts[key].element_size(), key))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for key in order:
        begin, end = end, end + parts[key].numel() * parts[key].element_size()
        header[key] = {
            "dtype": _DTYPE_NAMES[parts[key].dtype],
            "shape": list(parts[key].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    with replacing(path) as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        for key in order:
            if parts[key].numel():
                file.write(raw(parts[key]).reshape(-1).data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file in `path`'s folder to write to; on success it takes `path`'s place durably."""
    path = Path(os.path.realpath(path))  # a link stays a link, its target is replaced
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "cannot write a checkpoint over a folder", str(path))
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno:
            reason = f"cannot write the checkpoint: {error.strerror}"
            raise OSError(error.errno, reason, str(path)) from error
        raise
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network and virtual file systems cannot sync a folder; the file itself is safe.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)
