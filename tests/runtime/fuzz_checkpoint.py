"""Damaged checkpoints with packed weights, in a process of its own with little memory.

`python tests/runtime/fuzz_checkpoint.py COUNT SEED` prints how many copies were refused and how
many were read. It ends with an error at the first one that does worse, and a crash is seen by who
started it. What is read as packed is multiplied: a kernel must be able to trust it.
"""

from __future__ import annotations

import random
import resource
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from test_checkpoint_damage import mutations, reseal, sparse, two_of_four, unpack
from torch import Tensor

from aerogel.kernels import BlockRowWeight, gemv, spmm
from aerogel.runtime.checkpoint import CheckpointError, inspect, load, load_packed, save

SPARE_BYTES = 512 << 20  # of address space, beyond what the process has when it begins


def state() -> dict[str, Tensor | BlockRowWeight]:
    """Every layout, and packed weights of every dtype and block."""
    torch.manual_seed(0)
    blocks = sparse(8, 128).repeat_interleave(4, 0)
    return {
        "wide.weight": sparse(8, 256),
        "conv.weight": sparse(16, 16, 1, 1),
        "nm.weight": two_of_four(16, 32),
        "bias": torch.randn(8),
        "full": BlockRowWeight.pack(sparse(32, 96), 1),
        "half": BlockRowWeight.pack(sparse(32, 96), 1, dtype=torch.bfloat16),
        "byte": BlockRowWeight.pack(sparse(32, 96), 1, dtype=torch.int8),
        "blocks": BlockRowWeight.pack(blocks, 4),
        "byte_blocks": BlockRowWeight.pack(blocks, 4, dtype=torch.int8),
    }


def mended(path: Path, blob: bytes, count: int, seed: int) -> Iterator[None]:
    """Leave copies with changed entries and descriptions whose checksum is right."""
    rng = random.Random(seed)
    path.write_bytes(blob)
    entries, metadata = load_file(path), unpack(path)[0]["__metadata__"]
    for _ in range(count):
        parts = {key: value.clone() for key, value in entries.items()}
        for key in rng.sample(sorted(parts), 2):
            flat = parts[key].reshape(-1).view(torch.uint8)
            flat[rng.randrange(len(flat))] = rng.getrandbits(8)
        text = list(metadata["aerogel"])
        if rng.random() < 0.5:
            text[rng.randrange(len(text))] = rng.choice('0123456789[]{}",:-e')
        reseal(path, parts, {**metadata, "aerogel": "".join(text)})
        yield


def spoiled(path: Path, blob: bytes, count: int, seed: int) -> Iterator[None]:
    for copy in mutations(blob, count, seed):
        path.write_bytes(copy)
        yield


def multiply(weight: BlockRowWeight) -> None:
    x = torch.ones(weight.shape[1])
    gemv(x, weight)
    if weight.values.dtype == torch.float32:
        spmm(x.reshape(1, -1, 1), weight)


def read(path: Path) -> str:
    """ "refused" if no reader takes the file, else "read"."""
    outcome = "refused"
    for reader in (load, inspect, load_packed):
        try:
            found = reader(path)
        except CheckpointError:
            continue
        outcome = "read"
        if reader is load_packed:
            for weight in found.values():
                if isinstance(weight, BlockRowWeight) and 0 not in weight.shape:
                    multiply(weight)
    return outcome


def limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main(count: int, seed: int) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save(state(), path)
        ours = path.read_bytes()
        save_file(load_file(path), path)  # without a checksum there is nothing but the checks
        foreign = path.read_bytes()
        read(path)
        if sys.platform == "linux":
            limit_memory()
        share = -(-count // 3)
        for name, copies in {
            "ours": spoiled(path, ours, share, 3 * seed),
            "foreign": spoiled(path, foreign, share, 3 * seed + 1),
            "mended": mended(path, ours, share, 3 * seed + 2),
        }.items():
            outcomes = Counter(read(path) for _ in copies)
            print(f"{name}: {outcomes['refused']} refused, {outcomes['read']} read", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
