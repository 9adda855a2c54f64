"""The chain local cache -> package -> own address, and what a kill or a bad byte does to it."""

from __future__ import annotations

import gzip
import hashlib
import threading
from pathlib import Path

import pytest

from aerogel.data import fetching as fetch_module
from aerogel.data import packages
from aerogel.data.fetching import FetchError, fetch
from aerogel.data.sources import ASSETS, Asset, File, Package

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Asset:
    """An asset of two files whose package client is out of order, served from a folder."""
    digest = hashlib.sha256(CONTENT).hexdigest()
    files = (File("plain.bin", digest, len(CONTENT)), File("zip.bin", digest, len(CONTENT), True))
    package = Package("npm", "toy", "1", "0" * 64, 10, "toy")
    home = tmp_path / "home"
    home.mkdir()
    (home / "plain.bin").write_bytes(CONTENT)
    (home / "zip.bin.gz").write_bytes(gzip.compress(CONTENT))
    asset = Asset("toy", "a toy", "none", files, (package,), home.as_uri() + "/")
    monkeypatch.setitem(ASSETS, "toy", asset)
    monkeypatch.setattr(fetch_module, "BACKOFF", 0.0)

    def broken(package, folder, on_bytes):
        raise packages.PackageError("the client is out of order")

    monkeypatch.setattr(packages, "download", broken)
    return asset


def test_the_own_address_serves_when_the_package_does_not(toy: Asset, tmp_path: Path):
    seen: list[tuple[str, int, int]] = []
    folder = fetch("toy", cache_dir=tmp_path / "cache", on_progress=lambda *a: seen.append(a))
    assert (folder / "plain.bin").read_bytes() == CONTENT
    assert (folder / "zip.bin").read_bytes() == CONTENT
    assert seen[-1][1] > 0


def test_a_cached_asset_asks_nobody(toy: Asset, tmp_path: Path, monkeypatch):
    fetch("toy", cache_dir=tmp_path)
    monkeypatch.setattr(fetch_module, "_fill", lambda *a: pytest.fail("asked again"))
    fetch("toy", cache_dir=tmp_path)


def test_a_damaged_file_is_fetched_again(toy: Asset, tmp_path: Path):
    folder = fetch("toy", cache_dir=tmp_path)
    (folder / "plain.bin").write_bytes(CONTENT[:-1] + b"x")
    assert (fetch("toy", cache_dir=tmp_path) / "plain.bin").read_bytes() == CONTENT


def test_wrong_bytes_never_enter_the_cache(toy: Asset, tmp_path: Path):
    (tmp_path / "home" / "plain.bin").write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(FetchError, match="SHA-256"):
        fetch("toy", cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache" / "toy").iterdir())


def test_an_endless_answer_is_cut_off(toy: Asset, tmp_path: Path):
    (tmp_path / "home" / "plain.bin").write_bytes(CONTENT * 100)
    with pytest.raises(FetchError, match="more than"):
        fetch("toy", cache_dir=tmp_path / "cache")


def test_a_gzip_bomb_is_cut_off(toy: Asset, tmp_path: Path):
    (tmp_path / "home" / "zip.bin.gz").write_bytes(gzip.compress(bytes(len(CONTENT) * 1000))[:9000])
    with pytest.raises(FetchError, match=r"SHA-256|damaged"):
        fetch("toy", cache_dir=tmp_path / "cache")


def test_a_failure_lists_everything_that_was_tried(toy: Asset, tmp_path: Path):
    (tmp_path / "home" / "plain.bin").unlink()
    with pytest.raises(FetchError) as caught:
        fetch("toy", cache_dir=tmp_path / "cache")
    message = str(caught.value)
    assert "cache" in message
    assert "npm package toy 1: the client is out of order" in message
    assert "its own address" in message


def test_a_kill_between_write_and_rename_leaves_nothing(toy: Asset, tmp_path: Path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch_module.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        fetch("toy", cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache" / "toy").iterdir())


def test_runs_side_by_side_fetch_once(toy: Asset, tmp_path: Path, monkeypatch):
    calls: list[int] = []
    original = fetch_module._from_address

    def counted(*args):
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(fetch_module, "_from_address", counted)
    threads = [threading.Thread(target=fetch, args=("toy",), kwargs={"cache_dir": tmp_path})]
    threads += [
        threading.Thread(target=fetch, args=("toy",), kwargs={"cache_dir": tmp_path})
        for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_an_unusable_cache_folder_says_what_to_set(toy: Asset, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FetchError, match="AEROGEL_CACHE"):
        fetch("toy", cache_dir=tmp_path / "file")


def test_the_cache_follows_the_environment(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("AEROGEL_CACHE", str(tmp_path))
    assert fetch_module.cache_root() == tmp_path
    assert fetch_module.cache_root(tmp_path / "x") == tmp_path / "x"


def test_an_unknown_asset_lists_the_nearest():
    with pytest.raises(ValueError, match="fashion-mnist"):
        fetch("fashion-mnits")


def test_every_pin_is_a_whole_digest():
    for asset in ASSETS.values():
        pins = [p.sha256 for p in asset.packages] + [f.sha256 for f in asset.files]
        assert all(len(pin) == 64 and int(pin, 16) >= 0 for pin in pins)
        assert asset.packages
