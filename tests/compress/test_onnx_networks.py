"""ONNX files as networks: compressed by a recipe, measured by bench, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import aerogel
from aerogel import compress, data, runtime, train
from aerogel.compress import load_recipe
from aerogel.compress.loading import load_model, starts_trained
from aerogel.compress.networks import plain_network, random_networks
from aerogel.compress.recipe import ModelSpec

pytest.importorskip("onnx")


class Net(nn.Module):
    """Images of 8 x 8 to ten classes."""

    def __init__(self, flat: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 8, 3, 2, 1)
        self.hidden, self.head = nn.Linear(8 * 16, 32), nn.Linear(32, 10)
        self.flat = flat

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        # The batch as a number of the file, as many exporters write it.
        x = x.flatten(1) if self.flat else x.reshape(2, 8 * 16)
        return self.head(torch.relu(self.hidden(x)))


def trained(folder: Path) -> tuple[Path, float]:
    """The file of a network that knows digits, and how well it does."""
    model, dataset = Net(), data.load("digits")
    train.fit(model, dataset, train.TrainConfig(epochs=6, batch_size=32, lr=0.05))
    path = folder / "digits.onnx"
    aerogel.export_onnx(model.eval(), torch.randn(2, 1, 8, 8), path)
    return path, train.evaluate(model, dataset)["accuracy"]


def test_a_trained_file_is_compressed_and_its_run_loads_again(
    tiny_recipe: Path, tmp_path: Path
) -> None:
    file, accuracy = trained(tmp_path)
    spec = ModelSpec(name=str(file))
    assert starts_trained(spec)
    flags = {"model": {"name": str(file)}, "dense.epochs": 0, "prune.epochs": 2, "sparsity": 0.8}
    results = compress.run(load_recipe(tiny_recipe, flags), tmp_path / "run")
    assert results is not None
    dense = results.quality[0].dense
    assert dense == pytest.approx(accuracy, abs=1e-6)
    assert dense > 0.85
    assert (results.quality[0].sparse or 0) > dense - 0.1
    state = runtime.load(tmp_path / "run" / "model.safetensors")
    zeros = [float((w == 0).float().mean()) for w in state.values() if w.dim() > 1]
    assert len(zeros) == 3
    assert zeros == pytest.approx([0.8] * 3, abs=0.02)
    again = load_model(ModelSpec(name=str(tmp_path / "run")), None).eval()
    pair, example = compress.load_run(tmp_path / "run")
    with torch.no_grad():
        torch.testing.assert_close(again(*example(3)), pair.sparse(*example(3)))


def test_bench_takes_its_inputs_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    model = Net().eval()
    aerogel.export_onnx(model, torch.randn(2, 1, 8, 8), path)
    loaded, example = plain_network(str(path))
    (x,) = example(3)
    assert x.shape == (3, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)
    pair, _ = random_networks(str(path), 0.75)
    found = [w for w in pair.sparse.state_dict().values() if w.dim() > 1]
    assert [float((w == 0).float().mean()) for w in found] == pytest.approx([0.75] * 3, abs=0.01)


def test_a_file_of_one_batch_size_alone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fixed.onnx"
    aerogel.export_onnx(Net(flat=False).eval(), torch.randn(2, 1, 8, 8), path)
    with pytest.raises(ValueError, match="exported with a fixed batch of 2"):
        load_model(ModelSpec(name=str(path)), None)


@pytest.mark.parametrize("content", [b"", b"no network at all", b"\x08\x09\x12\x00"])
def test_what_is_no_onnx_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "odd.onnx"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="odd"):
        load_model(ModelSpec(name=str(path)), None)
