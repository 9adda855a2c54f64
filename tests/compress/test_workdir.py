"""The output folder: locked, checked, atomic, and never mistaken for another run's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from aerogel.atomic import write_atomic
from aerogel.compress import FolderError, load_recipe, workdir
from aerogel.compress.workdir import RunFolder

RECIPE = load_recipe("digits")


def test_finished_stage_is_found_only_under_its_key_and_with_its_files(tmp_path: Path) -> None:
    with RunFolder.opened(tmp_path, RECIPE) as folder:
        (tmp_path / "model.safetensors").write_bytes(b"weights")
        folder.finish("prune", "key", ["model.safetensors"], {"a": 1.5}, 2.0)
        marker = folder.finished("prune", "key")
        assert marker is not None
        assert marker.result == {"a": 1.5}
        assert folder.finished("prune", "other") is None
        (tmp_path / "model.safetensors").write_bytes(b"WEIGHTS")
        assert folder.finished("prune", "key") is None
        (tmp_path / "model.safetensors").unlink()
        assert folder.finished("prune", "key") is None


def test_damaged_marker_means_the_stage_is_done_again(tmp_path: Path) -> None:
    with RunFolder.opened(tmp_path, RECIPE) as folder:
        folder.finish("dense", "key", [], {}, 0.0)
        path = tmp_path / ".aerogel" / "stages" / "dense.json"
        for content in (b"", b"{", b"[]", b"\xff", b'{"key": "key"}', b'{"key": "key", "x": 1}'):
            path.write_bytes(content)
            assert folder.finished("dense", "key") is None


def test_changed_recipe_is_refused_with_the_changed_keys(tmp_path: Path) -> None:
    with RunFolder.opened(tmp_path, RECIPE):
        pass
    changed = load_recipe("digits", {"sparsity": 0.5, "prune.epochs": 1})
    with pytest.raises(FolderError) as caught, RunFolder.opened(tmp_path, changed):
        pass
    said = str(caught.value)
    assert "sparsity was 0.9, now 0.5" in said
    assert "prune.epochs was 10.0, now 1.0" in said
    with RunFolder.opened(tmp_path, changed, restart=True):
        pass
    with RunFolder.opened(tmp_path, changed):
        pass


def test_restart_throws_away_the_run_and_nothing_else(tmp_path: Path) -> None:
    with RunFolder.opened(tmp_path, RECIPE) as folder:
        (tmp_path / "model.safetensors").write_bytes(b"ours")
        (tmp_path / "notes.txt").write_text("theirs")
        folder.finish("prune", "key", ["model.safetensors"], {}, 0.0)
    with RunFolder.opened(tmp_path, RECIPE, restart=True) as folder:
        assert folder.finished("prune", "key") is None
    assert not (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "notes.txt").read_text() == "theirs"


def test_files_of_others_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    for restart in (False, True):
        with (
            pytest.raises(FolderError, match=r"holds model\.safetensors that no run"),
            RunFolder.opened(tmp_path, RECIPE, restart=restart),
        ):
            pass
    assert (tmp_path / "model.safetensors").read_bytes() == b"precious"


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from aerogel.compress.workdir import RunFolder; from aerogel.compress import load_recipe\n"
        "try:\n"
        "    with RunFolder.opened(Path(sys.argv[1]), load_recipe('digits')): print('got it')\n"
        "except ValueError as error: print(error)\n"
    )
    with RunFolder.opened(tmp_path, RECIPE):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
        )
    assert "is in use by another run" in done.stdout
    with RunFolder.opened(tmp_path, RECIPE):
        pass


def test_file_in_the_way_and_unwritable_folders_are_bad_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with (
            pytest.raises(FolderError, match="a file stands in the way"),
            RunFolder.opened(path, RECIPE),
        ):
            pass
    with (
        pytest.raises(FolderError, match="cannot be written"),
        RunFolder.opened(Path("/proc/aerogel"), RECIPE),
    ):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into read-only folders")
def test_read_only_folder_is_bad_input(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with (
            pytest.raises(FolderError, match="Permission denied"),
            RunFolder.opened(tmp_path / "out", RECIPE),
        ):
            pass
    finally:
        tmp_path.chmod(0o700)


def test_full_disk_is_told_before_work_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 10 << 20})
    monkeypatch.setattr(workdir.shutil, "disk_usage", lambda path: usage)
    with (
        pytest.raises(FolderError, match=r"10 MB free, this run needs about 50 MB"),
        RunFolder.opened(tmp_path, RECIPE),
    ):
        pass


def test_failed_write_leaves_the_old_file_and_no_trash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_that_cannot_be_written_is_named_as_it_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "nowhere" / "results.json", tmp_path / "folder"):
        with pytest.raises(OSError) as caught:
            write_atomic(path, "new")
        assert caught.value.filename == str(path)
    assert os.listdir(tmp_path) == ["folder"]
