"""Packed weights in checkpoints: small on disk, named as other tools name them, and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aerogel.kernels import BlockRowWeight, gemv
from aerogel.runtime import inspect, load, load_packed, save


def sparse(rows: int, cols: int, sparsity: float = 0.9) -> Tensor:
    torch.manual_seed(rows)
    return torch.randn(rows, cols) * (torch.rand(rows, cols) >= sparsity)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("format", ["auto", "sparse-bitmask"])
def test_packed_weights_come_back(tmp_path, dtype, block, format) -> None:
    dense = sparse(64, 130)
    if block > 1:
        dense = sparse(16, 130).repeat_interleave(4, 0)
    packed = BlockRowWeight.pack(dense, block, dtype=dtype)
    save({"fc.weight": packed, "fc.bias": torch.ones(64)}, tmp_path / "m", format=format)
    loaded = load_packed(tmp_path / "m")
    assert loaded.keys() == {"fc.weight", "fc.bias"}
    again = loaded["fc.weight"]
    assert isinstance(again, BlockRowWeight)
    assert again.values.dtype == dtype
    assert again.block == block
    assert torch.equal(again.unpack(), packed.unpack())
    assert torch.equal(again.stored()[1], packed.stored()[1])
    x = torch.randn(130)
    assert torch.equal(gemv(x, again), gemv(x, packed))


def test_int8_weights_have_the_names_of_compressed_tensors(tmp_path) -> None:
    packed = BlockRowWeight.pack(sparse(64, 130), 1, dtype=torch.int8)
    save({"fc.weight": packed}, tmp_path / "m", format="sparse-bitmask")
    state = load(tmp_path / "m")
    assert state.keys() == {"fc.weight", "fc.weight_scale"}
    assert state["fc.weight"].dtype == torch.int8
    assert state["fc.weight_scale"].shape == (64, 1)
    dequantized = state["fc.weight"].float() * state["fc.weight_scale"]
    assert torch.equal(dequantized, packed.unpack())
    (weight,) = (t for t in inspect(tmp_path / "m").tensors if t.name == "fc.weight")
    assert weight.layout == "sparse-bitmask"


def test_values_that_are_zero_stay_stored(tmp_path) -> None:
    dense = torch.zeros(8, 40)
    dense[:, 3], dense[:, 20] = 1.0, 1e-6  # the second rounds to zero
    packed = BlockRowWeight.pack(dense, 1, dtype=torch.int8)
    save({"w": packed}, tmp_path / "m")
    assert torch.equal(load_packed(tmp_path / "m")["w"].stored()[1], dense != 0)


def test_small_values_make_small_files(tmp_path) -> None:
    dense = sparse(512, 1024)
    sizes = []
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        save({"fc.weight": BlockRowWeight.pack(dense, 1, dtype=dtype)}, tmp_path / "m")
        sizes.append((tmp_path / "m").stat().st_size)
    full, half, byte = sizes
    assert half < 0.65 * full
    assert byte < 0.45 * full


def test_what_is_no_sparse_matrix_stays_a_tensor(tmp_path) -> None:
    kernel = torch.randn(8, 8, 3, 3) * (torch.rand(8, 8, 3, 3) > 0.9)
    levels = (sparse(64, 64) * 10).to(torch.int8)  # no scales
    state = {"conv.weight": kernel, "fc.weight": levels, "dense": torch.randn(4, 4)}
    save(state, tmp_path / "m")
    loaded = load_packed(tmp_path / "m")
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor)


def test_a_taken_name_is_an_error(tmp_path) -> None:
    packed = BlockRowWeight.pack(sparse(8, 8), 1, dtype=torch.int8)
    with pytest.raises(ValueError, match="'w_scale', which 'w' needs"):
        save({"w": packed, "w_scale": torch.ones(1)}, tmp_path / "m")
    with pytest.raises(ValueError, match=r"obj\['w'\] is a list"):
        save({"w": [1.0]}, tmp_path / "m")
