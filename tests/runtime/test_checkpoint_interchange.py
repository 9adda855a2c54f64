"""Files travel between aerogel and the `compressed-tensors` project.

That project has since dropped its sparse formats (0.13 had them), so the files here are built
element by element from its documented layout; where a version that has them is installed, its own
code is asked too (done with 0.9.4, 0.10.2, 0.12.2 and 0.13.0).
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aerogel.runtime.checkpoint import CheckpointError, inspect, load, save


def bitmask_by_hand(tensor: Tensor) -> Tensor:
    """One bit an element, the lowest first, every row padded to whole bytes."""
    *lead, width = tensor.shape
    packed = torch.zeros(*lead, math.ceil(width / 8), dtype=torch.uint8)
    for index in (tensor != 0).nonzero().tolist():
        *row, column = index
        packed[(*row, column // 8)] |= 1 << column % 8
    return packed


def sparse_bitmask_file(tensor: Tensor) -> dict[str, Tensor]:
    counts = (tensor != 0).sum(-1)
    return {
        "compressed": tensor[tensor != 0],
        "bitmask": bitmask_by_hand(tensor),
        "shape": torch.tensor(tensor.shape),
        "row_offsets": torch.cumsum(counts, 0) - counts,
    }


def sparse_24_file(tensor: Tensor) -> dict[str, Tensor]:
    return {
        "compressed": tensor[tensor != 0].reshape(tensor.shape[0], -1),
        "bitmask": bitmask_by_hand(tensor),
        "shape": torch.tensor(tensor.shape).reshape(-1, 1),
    }


def two_of_four(rows: int, columns: int) -> Tensor:
    order = torch.rand(rows * columns // 4, 4).argsort(1)
    values = torch.rand(rows * columns // 4, 4) + 0.1
    return torch.where(order < 2, values, torch.zeros(())).reshape(rows, columns)


def unstructured(*shape: int) -> Tensor:
    return torch.where(torch.rand(*shape) < 0.8, torch.zeros(()), torch.rand(*shape) + 0.1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", [(16, 40), (5, 13), (4, 3, 3, 3), (6, 5, 1, 1), (33,)])
def test_sparse_bitmask_files_of_compressed_tensors_load(tmp_path, dtype, shape) -> None:
    tensor = (unstructured(*shape) * 20).to(dtype)
    parts = {f"model.fc.{part}": t for part, t in sparse_bitmask_file(tensor).items()}
    save_file({**parts, "model.fc.bias": torch.ones(3)}, tmp_path / "m", metadata={"format": "pt"})
    loaded = load(tmp_path / "m")
    assert loaded.keys() == {"model.fc.weight", "model.fc.bias"}
    assert torch.equal(loaded["model.fc.weight"], tensor)
    rows = {row.name: row for row in inspect(tmp_path / "m").tensors}
    assert rows["model.fc.weight"].layout == "sparse-bitmask"
    assert rows["model.fc.weight"].dense_bytes == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("shape", [(16, 40), (8, 12)])
def test_sparse_24_files_of_compressed_tensors_load(tmp_path, shape) -> None:
    tensor = two_of_four(*shape)
    save_file({f"fc.{part}": t for part, t in sparse_24_file(tensor).items()}, tmp_path / "m")
    assert torch.equal(load(tmp_path / "m")["fc.weight"], tensor)
    info = inspect(tmp_path / "m").tensors[0]
    assert (info.layout, info.pattern, info.sparsity) == ("sparse-24-bitmask", "2:4", 0.5)


@pytest.mark.parametrize(
    ("format", "tensor", "by_hand"),
    [
        ("sparse-bitmask", unstructured(24, 50), sparse_bitmask_file),
        ("sparse-24-bitmask", two_of_four(24, 52), sparse_24_file),
    ],
)
def test_saved_entries_are_what_compressed_tensors_documents(tmp_path, format, tensor, by_hand):
    save({"fc.weight": tensor, "fc.bias": torch.zeros(24)}, tmp_path / "m", format=format)
    entries = load_file(tmp_path / "m")
    expected = {f"fc.{part}": value for part, value in by_hand(tensor).items()}
    if format == "sparse-24-bitmask":
        expected["fc.bias"] = torch.zeros(24)
    assert {key: entries[key].tolist() for key in expected} == {
        key: value.tolist() for key, value in expected.items()
    }
    assert all(entries[key].dtype == value.dtype for key, value in expected.items())


def test_groups_of_fewer_than_two_are_filled_up_for_24(tmp_path) -> None:
    tensor = two_of_four(8, 16)
    tensor[0, :8] = 0
    save({"fc.weight": tensor}, tmp_path / "m", format="sparse-24-bitmask")
    assert load_file(tmp_path / "m")["fc.compressed"].shape == (8, 8)
    assert torch.equal(load(tmp_path / "m")["fc.weight"], tensor)


def test_plain_safetensors_files_load(tmp_path) -> None:
    state = {"a.weight": torch.randn(4, 4), "a.shape": torch.ones(2), "s": torch.tensor(3)}
    save_file(state, tmp_path / "m")
    loaded = load(tmp_path / "m")
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert inspect(tmp_path / "m").format_version is None


def test_a_file_whose_metadata_was_dropped_still_loads(tmp_path) -> None:
    state = {"fc.weight": unstructured(64, 1024), "c.weight": unstructured(64, 64, 1, 1),
             "in_proj": unstructured(64, 64)}  # fmt: skip
    save(state, tmp_path / "m")
    save_file(load_file(tmp_path / "m"), tmp_path / "stripped")
    loaded = load(tmp_path / "stripped")
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_dense_files_open_everywhere(tmp_path) -> None:
    state = {"fc.weight": unstructured(64, 64), "s": torch.tensor(2.0), "e": torch.empty(0, 4)}
    save(state, tmp_path / "m", format="dense")
    loaded = load_file(tmp_path / "m")
    assert all(torch.equal(loaded[name], state[name]) for name in state)


@pytest.mark.parametrize("format", ["sparse-bitmask", "sparse-24-bitmask"])
def test_compressed_tensors_itself_agrees_both_ways(tmp_path, format) -> None:
    sparse_compressors = pytest.importorskip(
        "compressed_tensors.compressors.sparse_compressors",
        reason="the installed compressed-tensors has no sparse formats (0.13 had them)",
        exc_type=ImportError,
    )
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.config import SparsityCompressionConfig

    assert sparse_compressors
    config = SparsityCompressionConfig.load_from_registry(format)
    theirs = BaseCompressor.load_from_registry(format, config=config)
    make = two_of_four if format == "sparse-24-bitmask" else unstructured
    state = {"a.fc.weight": make(64, 1024), "b.weight": make(16, 40), "b.bias": torch.ones(3)}
    save_file(theirs.compress(state), tmp_path / "theirs.safetensors")
    save(state, tmp_path / "ours.safetensors", format=format)
    ours = load(tmp_path / "theirs.safetensors")
    back = dict(theirs.decompress(str(tmp_path / "ours.safetensors")))
    for name, value in state.items():
        assert torch.equal(ours[name], value)
        assert torch.equal(back[name], value)


def shards(folder: Path, parts: dict[str, dict[str, Tensor]], **claims: str) -> Path:
    """The parts as files, and their index, which claims also what is given."""
    for file, tensors in parts.items():
        save_file(tensors, folder / file)
    names = {name: file for file, tensors in parts.items() for name in tensors}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {**names, **claims}}))
    return index


def test_a_checkpoint_in_several_files_loads_by_its_index_or_folder(tmp_path: Path) -> None:
    weight, bias = unstructured(8, 16), torch.rand(8)
    index = shards(tmp_path, {"a.safetensors": {"weight": weight}, "b.safetensors": {"bias": bias}})
    for path in (index, tmp_path):
        model = load(path, nn.Linear(16, 8))
        assert torch.equal(model.weight, weight)
        assert torch.equal(model.bias, bias)
    found = inspect(index)
    assert {t.name: t.shape for t in found.tensors} == {"weight": (8, 16), "bias": (8,)}
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in "ab"]
    assert found.file_bytes == sum(sizes)
    save({"weight": weight, "bias": bias}, tmp_path / "model.safetensors")
    index.unlink()
    assert inspect(tmp_path).sha256


def test_an_index_that_lies_is_refused(tmp_path: Path) -> None:
    parts = {"a.safetensors": {"x": torch.ones(2)}, "b.safetensors": {"y": torch.ones(2)}}
    for name, file, message in (
        ("z", "a.safetensors", "a.safetensors holds 'z', which it does not"),
        ("z", "../a.safetensors", r"names '\.\./a.safetensors'; expected a file in its own folder"),
        ("z", str(tmp_path / "a.safetensors"), "expected a file in its own folder"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load(shards(tmp_path, parts, **{name: file}))
    with pytest.raises(FileNotFoundError):
        load(shards(tmp_path, parts, z="missing.safetensors"))
    twice = {
        "a.safetensors": {"x": torch.ones(2), "w": torch.ones(2)},
        "b.safetensors": {"x": torch.zeros(2)},
    }
    with pytest.raises(CheckpointError, match="'x' is in another file too"):
        load(shards(tmp_path, twice))
    for text in ("{]", "[]", '{"weight_map": {}}', '{"weight_map": {"x": 3}}', "[" * 100_000):
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(text)
        with pytest.raises(CheckpointError, match="is no index of a checkpoint"):
            load(index)


def test_of_tied_tensors_one_is_enough(tmp_path: Path) -> None:
    """transformers leaves out the head of a model whose head is its embedding."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
            self.head.weight = self.embedding.weight

    path = tmp_path / "tied.safetensors"
    weight = torch.rand(6, 4)
    save_file({"embedding.weight": weight}, path)
    model = load(path, Tied())
    assert torch.equal(model.head.weight, weight)
    model.head.weight = nn.Parameter(torch.zeros(6, 4))
    with pytest.raises(ValueError, match=r"1 missing \['head.weight'\]"):
        load(path, model)
