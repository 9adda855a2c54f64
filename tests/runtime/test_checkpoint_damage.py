"""Damaged and hostile files: a clear error, never a crash, code, or an allocation they ask for.

`make fuzz` goes on for longer: AEROGEL_FUZZ (default 100,000) copies of either kind.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aerogel.runtime import container
from aerogel.runtime.checkpoint import CheckpointError, inspect, load, load_masks, save

QUICK, SLOW = 3_000, int(os.environ.get("AEROGEL_FUZZ", 100_000))


def sparse(*shape: int) -> Tensor:
    return torch.where(torch.rand(*shape) < 0.9, torch.zeros(()), torch.randn(*shape))


def two_of_four(rows: int, columns: int) -> Tensor:
    keep = torch.tensor([True, False, False, True]).repeat(rows, columns // 4)
    return torch.where(keep, torch.randn(rows, columns), torch.zeros(()))


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A small file with every layout, a shared tensor, a scalar and an empty one."""
    torch.manual_seed(0)
    state = {
        "wide.weight": sparse(8, 1024),
        "conv.weight": sparse(64, 32, 1, 1),
        "nm.weight": two_of_four(32, 64),
        "bias": torch.randn(8),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 4),
    }
    state["tied.weight"] = state["wide.weight"]
    save(state, tmp_path / "good.safetensors", metadata={"note": "fine"})
    layouts = {row.layout for row in inspect(tmp_path / "good.safetensors").tensors}
    assert layouts == {"dense", "sparse-bitmask", "flat-bitmask", "sparse-24-bitmask"}
    return tmp_path / "good.safetensors"


def unpack(path: Path) -> tuple[dict[str, Any], bytes]:
    blob = path.read_bytes()
    (length,) = struct.unpack("<Q", blob[:8])
    return json.loads(blob[8 : 8 + length]), blob[8 + length :]


def pack(path: Path, header: Any, data: bytes) -> None:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit_info(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the description and keep the checksum right: the work of someone who means harm."""
    header, _ = unpack(path)
    metadata = header["__metadata__"]
    info = json.loads(metadata["aerogel"])
    change(info)
    metadata["aerogel"] = json.dumps(info)
    reseal(path, load_file(path), metadata)


def edit_parts(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the entries and keep the checksum right."""
    header, _ = unpack(path)
    parts = {key: value.clone() for key, value in load_file(path).items()}
    change(parts)
    reseal(path, parts, header["__metadata__"])


def reseal(path: Path, parts: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata[container.DIGEST] = container.digest(metadata, parts)
    container.write(parts, metadata, path)


def test_every_truncation_is_refused(good: Path) -> None:
    blob = good.read_bytes()
    cuts = sorted({*range(64), *range(64, len(blob), 97), len(blob) - 1})
    for cut in cuts:
        good.write_bytes(blob[:cut])
        with pytest.raises(CheckpointError, match=r"good\.safetensors"):
            load(good)


def test_every_flipped_byte_of_the_data_is_noticed(good: Path) -> None:
    header, data = unpack(good)
    for at in range(0, len(data), 131):
        spoiled = bytearray(data)
        spoiled[at] ^= 0x10
        pack(good, header, bytes(spoiled))
        with pytest.raises(CheckpointError, match="damaged"):
            load(good)


@pytest.mark.parametrize("bad", [
    {"note": "changed"}, {"aerogel.sha256": "0" * 64}, {"aerogel.sha256": None},
])  # fmt: skip
def test_changed_metadata_is_noticed(good: Path, bad: dict[str, Any]) -> None:
    header, data = unpack(good)
    header["__metadata__"].update(bad)
    header["__metadata__"] = {k: v for k, v in header["__metadata__"].items() if v is not None}
    pack(good, header, data)
    with pytest.raises(CheckpointError, match="damaged"):
        load(good)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Bomb()))
    torch.save({"w": torch.ones(2), "b": Bomb()}, tmp_path / "zip.pt")
    torch.save(Bomb(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("plain.pkl", "zip.pt", "old.pt"):
        for read in (load, inspect, load_masks):
            with pytest.raises(CheckpointError, match="pickle"):
                read(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_things_that_are_no_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="folder"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "missing")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):
        load(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    with pytest.raises(CheckpointError, match="empty or truncated"):
        load(tmp_path / "empty")


HEADERS: dict[str, Any] = {
    "not json": b"{]",
    "not text": b"\xff\xfe\x00{",
    "a list": [1, 2],
    "deeply nested": b"[" * 200_000,
    "null entry": {"w": None},
    "lying shape": {"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 16]}},
    "overflowing shape": {
        "w": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 16]}
    },
    "negative shape": {"w": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}},
    "float shape": {"w": {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]}},
    "beyond the end": {"w": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}},
    "backwards": {"w": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}},
    "unknown dtype": {"w": {"dtype": "PICKLE", "shape": [4], "data_offsets": [0, 16]}},
    "overlapping": {
        "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "b": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
    },
    "gap": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}},
    "metadata of numbers": {"__metadata__": {"aerogel": 3}},
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS.keys())
def test_hostile_headers_are_refused(tmp_path: Path, header: Any) -> None:
    pack(tmp_path / "m", header, bytes(16))
    for read in (load, inspect):
        with pytest.raises(CheckpointError):
            read(tmp_path / "m")


def test_a_header_of_claimed_exabytes_is_refused(tmp_path: Path) -> None:
    for length in (2**63, 2**64 - 1, 10**9, 17):
        (tmp_path / "m").write_bytes(struct.pack("<Q", length) + b"{}" + bytes(6))
        with pytest.raises(CheckpointError):
            load(tmp_path / "m")


def _part(key: str, value: Tensor) -> Callable[[dict[str, Tensor]], Any]:
    return lambda parts: parts.update({key: value})


PARTS = {
    "one bit more": lambda p: p["wide.bitmask"][0, 0:1].bitwise_xor_(1),
    "all ones": lambda p: p["wide.bitmask"].fill_(255),
    "huge shape": _part("wide.shape", torch.tensor([1 << 40, 1 << 40])),
    "overflowing shape": _part("wide.shape", torch.tensor([1 << 62, 4])),
    "negative shape": _part("wide.shape", torch.tensor([-8, 1024])),
    "negative pair": _part("wide.shape", torch.tensor([-8, -1024])),
    "float shape": _part("wide.shape", torch.tensor([8.0, 1024.0])),
    "no shape": _part("wide.shape", torch.empty(0, dtype=torch.int64)),
    "shape of 65": _part("wide.shape", torch.ones(65, dtype=torch.int64)),
    "other shape": _part("wide.shape", torch.tensor([1024, 8])),
    "short bitmask": lambda p: p.update({"wide.bitmask": p["wide.bitmask"][:, :-1].clone()}),
    "float bitmask": lambda p: p.update({"wide.bitmask": p["wide.bitmask"].float()}),
    "int8 bitmask": lambda p: p.update({"wide.bitmask": p["wide.bitmask"].to(torch.int8)}),
    "fewer values": lambda p: p.update({"wide.compressed": p["wide.compressed"][:-1].clone()}),
    "other dtype": lambda p: p.update({"wide.compressed": p["wide.compressed"].half()}),
    "wrong offsets": lambda p: p["wide.row_offsets"].add_(1),
    "float offsets": lambda p: p.update({"wide.row_offsets": p["wide.row_offsets"].float()}),
    "flat, huge": _part("conv.weight.shape", torch.tensor([1 << 50])),
    "flat, other": _part("conv.weight.shape", torch.tensor([32, 64, 1, 1])),
    "2:4, other": _part("nm.shape", torch.tensor([[16], [128]])),
    "dense, other": _part("bias", torch.ones(9)),
    "missing part": lambda p: p.pop("wide.row_offsets"),
    "extra part": _part("intruder", torch.ones(1)),
}


@pytest.mark.parametrize("change", PARTS.values(), ids=PARTS.keys())
def test_lying_parts_with_a_right_checksum_are_refused(good: Path, change: Any) -> None:
    edit_parts(good, change)
    tracemalloc.start()
    with pytest.raises(CheckpointError):
        load(good)
    assert tracemalloc.get_traced_memory()[1] < 50e6  # numpy reports to tracemalloc, torch does not
    tracemalloc.stop()


def _row(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda info: info["tensors"]["wide.weight"].update(changes)


INFOS = {
    "future version": lambda i: i.update(format_version=2),
    "no version": lambda i: i.pop("format_version"),
    "no tensors": lambda i: i.pop("tensors"),
    "tensors as list": lambda i: i.update(tensors=[1, 2]),
    "row as text": lambda i: i["tensors"].update({"wide.weight": "x"}),
    "unknown layout": _row(layout="pickle"),
    "layout as list": _row(layout=[]),
    "other layout": _row(layout="sparse-24-bitmask"),
    "dense layout": _row(layout="dense"),
    "lying shape": _row(shape=[8, 1023]),
    "huge shape": _row(shape=[1 << 60, 1 << 60]),
    "shape of bools": _row(shape=[True, True]),
    "shape as text": _row(shape="ab"),
    "negative kept": _row(kept=-1),
    "other dtype": _row(dtype="float64"),
    "shared to nothing": lambda i: i["shared"].update({"x": "nothing"}),
    "shared over a tensor": lambda i: i["shared"].update({"bias": "scalar"}),
    "shared as list": lambda i: i.update(shared=["x"]),
    "forgotten tensor": lambda i: i["tensors"].pop("bias"),
    "invented tensor": lambda i: i["tensors"].update({"y": i["tensors"]["bias"]}),
}


@pytest.mark.parametrize("change", INFOS.values(), ids=INFOS.keys())
def test_lying_descriptions_with_a_right_checksum_are_refused(good: Path, change: Any) -> None:
    edit_info(good, change)
    with pytest.raises(CheckpointError):
        load(good)
    with contextlib.suppress(CheckpointError):
        str(inspect(good))


def test_a_small_file_cannot_ask_for_much_memory(tmp_path: Path) -> None:
    """The dense size is bounded by the bits that are really in the file."""
    parts = {"w.compressed": torch.empty(0), "w.bitmask": torch.zeros(4, dtype=torch.uint8)}
    for shape in ([1 << 33], [1 << 20, 1 << 20], [0, 1 << 62], [1 << 54, 0]):
        save_file({**parts, "w.shape": torch.tensor(shape)}, tmp_path / "m")
        with pytest.raises(CheckpointError, match=r"bitmask|elements"):
            load(tmp_path / "m")


def test_bools_that_are_neither_are_made_bools(tmp_path: Path) -> None:
    header = {"b": {"dtype": "BOOL", "shape": [4], "data_offsets": [0, 4]}}
    pack(tmp_path / "m", header, bytes([0, 1, 2, 255]))
    assert load(tmp_path / "m")["b"].view(torch.uint8).tolist() == [0, 1, 1, 1]


def mutations(blob: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Spoiled copies: bits, bytes, numbers, digits of the header, cuts, repeats and splices."""
    rng = random.Random(seed)
    (length,) = struct.unpack("<Q", blob[:8])
    digits = [i for i in range(8, 8 + length) if chr(blob[i]).isdigit()]
    for _ in range(count):
        out = bytearray(blob)
        for _ in range(rng.choice((1, 1, 2, 5))):
            # Half of the damage where it can do most: in the header.
            at = rng.randrange(8 + length) if rng.random() < 0.5 else rng.randrange(len(blob))
            kind = rng.randrange(8)
            if kind == 0 and at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            elif kind == 1 and at < len(out):
                out[at] = rng.choice(b'\x00\xff{}[]":,019-eE.')
            elif kind == 2 and len(out) > 8 + length:
                out[digits[rng.randrange(len(digits))]] = rng.choice(b"0123456789")
            elif kind == 3:
                out[:8] = struct.pack("<Q", rng.choice((length + rng.randint(-9, 9), 2**63, 0)))
            elif kind == 4:
                del out[at:]
            elif kind == 5:
                del out[at : at + rng.randint(1, 16)]
            elif kind == 6:
                out[at:at] = out[at : at + rng.randint(1, 16)]
            else:
                out[at : at + 8] = struct.pack(
                    "<q", rng.choice((-1, 2**62, 2**31, rng.getrandbits(40)))
                )
        yield bytes(out)


def fuzz(path: Path, original: dict[str, Tensor], count: int, seed: int) -> None:
    """Every spoiled copy is refused, or was not spoiled where it matters."""
    blob = path.read_bytes()
    for spoiled in mutations(blob, count, seed):
        path.write_bytes(spoiled)
        for read in (load, inspect):
            try:
                found = read(path)
            except CheckpointError:
                continue
            # Several hits may turn a file into a plain one that never promised anything.
            if read is load and original and b'"aerogel' in spoiled:
                assert found.keys() == original.keys()
                assert all(torch.equal(found[name], original[name]) for name in original)


def test_no_mutation_of_our_files_crashes_or_passes_for_another(good: Path) -> None:
    fuzz(good, load(good), QUICK, seed=1)


def test_no_mutation_of_foreign_files_crashes(good: Path) -> None:
    save_file(load_file(good), good)  # without a checksum there is nothing but the checks
    fuzz(good, {}, QUICK, seed=2)


def test_no_mutation_with_a_mended_checksum_crashes(good: Path) -> None:
    rng = random.Random(3)
    header, _ = unpack(good)
    entries, metadata = load_file(good), header["__metadata__"]
    for _ in range(500):
        parts = {key: value.clone() for key, value in entries.items()}
        for key in rng.sample(sorted(parts), 2):
            flat = parts[key].reshape(-1).view(torch.uint8)
            if len(flat):
                flat[rng.randrange(len(flat))] = rng.getrandbits(8)
        text = list(metadata["aerogel"])
        text[rng.randrange(len(text))] = rng.choice('0123456789[]{}",:-e')
        reseal(good, parts, {**metadata, "aerogel": "".join(text)})
        for read in (load, inspect):
            with contextlib.suppress(CheckpointError):
                read(good)


def fuzz_packed(count: int, seed: int) -> None:
    """In another process, whose crash is an exit code, with little memory to ask for."""
    script = Path(__file__).with_name("fuzz_checkpoint.py")
    done = subprocess.run(
        [sys.executable, script, str(count), str(seed)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_mutation_of_packed_weights_crashes_a_process_with_little_memory() -> None:
    fuzz_packed(600, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 12))
def test_no_mutation_of_packed_weights_crashes_however_long_one_tries(seed: int) -> None:
    fuzz_packed(SLOW // 10, seed)


@pytest.mark.slow
def test_no_mutation_crashes_however_long_one_tries(good: Path) -> None:
    blob = good.read_bytes()
    fuzz(good, load(good), SLOW // 2, seed=4)
    good.write_bytes(blob)
    save_file(load_file(good), good)
    fuzz(good, {}, SLOW // 2, seed=5)


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    """A file size limit makes the system refuse to write on, as a full disk does."""
    save({"w": torch.ones(4)}, tmp_path / "m")
    before = (tmp_path / "m").read_bytes()
    script = (
        "import resource, signal, sys, torch\n"
        "from aerogel.runtime.checkpoint import save\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        "    save({'w': torch.randn(1_000_000)}, sys.argv[1])\n"
        "except OSError as error:\n"
        "    print(error.errno, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "m")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith(f"{errno.EFBIG} ")
    assert "cannot write the checkpoint" in done.stdout
    assert (tmp_path / "m").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("step", ["os.fsync", "os.replace"])
def test_a_failure_at_any_step_leaves_the_old_file_and_no_other(
    tmp_path, monkeypatch, step
) -> None:
    save({"w": torch.ones(4)}, tmp_path / "m")
    before = (tmp_path / "m").read_bytes()

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(container.os, step.removeprefix("os."), fail)
    with pytest.raises(OSError, match="No space left") as caught:
        save({"w": torch.zeros(9)}, tmp_path / "m")
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_an_interrupt_leaves_nothing_behind(tmp_path, monkeypatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(container.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save({"w": torch.zeros(9)}, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def as_ordinary_user() -> Iterator[None]:
    """Root may write anywhere, so root steps down to see what others see."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_read_only_folder_is_named() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        with as_ordinary_user(), pytest.raises(PermissionError, match="cannot write"):
            save({"w": torch.ones(4)}, folder / "m")
        assert list(folder.iterdir()) == []
        folder.chmod(0o755)


def test_missing_folder_and_folder_in_the_way_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="cannot write"):
        save({"w": torch.ones(4)}, tmp_path / "none" / "m")
    (tmp_path / "dir").mkdir()
    with pytest.raises(IsADirectoryError):
        save({"w": torch.ones(4)}, tmp_path / "dir")
    assert [p.name for p in tmp_path.iterdir()] == ["dir"]


def test_a_link_stays_a_link_and_the_mode_is_the_users(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    before = os.umask(0o027)
    try:
        save(nn.Linear(4, 4), tmp_path / "link")
    finally:
        os.umask(before)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o640
