"""Networks to ONNX files: dense, with every zero, checked before they are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fakes import build_with
from torch import Tensor, nn
from torch.nn.utils import parametrize

import aerogel
from aerogel.runtime import OnnxError
from aerogel.runtime.exchange import onnx_export
from networks import mobile_network, perceptron

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


def run(path: Path, *inputs: Tensor) -> Tensor:
    """The file's first output in ONNX Runtime."""
    session = onnxruntime.InferenceSession(str(path))
    names = [each.name for each in session.get_inputs()]
    feed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


def test_file_gives_the_same_outputs_for_any_batch_and_keeps_the_zeros(tmp_path: Path) -> None:
    model = perceptron(sparsity=0.8)
    done = aerogel.export_onnx(model, torch.randn(1, 24), tmp_path / "net.onnx")
    assert done.any_batch
    assert done.deviation < 1e-5
    assert done.size == done.path.stat().st_size
    for batch in (1, 5):
        x = torch.randn(batch, 24)
        torch.testing.assert_close(run(done.path, x), model(x), rtol=1e-4, atol=1e-5)
    back = aerogel.from_onnx(done.path)
    weights = [(p == 0).sum() for p in model.parameters() if p.dim() > 1]
    again = [(p == 0).sum() for p in back.parameters() if p.dim() > 1]
    assert again == weights


def test_masks_are_baked_and_compiled_models_are_taken(tmp_path: Path) -> None:
    class Mask(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * (torch.arange(weight.numel()).view_as(weight) % 2)

    model = nn.Sequential(nn.Linear(6, 4)).eval()
    parametrize.register_parametrization(model[0], "weight", Mask())
    x = torch.randn(3, 6)
    done = aerogel.export_onnx(model, x, tmp_path / "masked.onnx")
    assert done.sparsity == 0.5
    assert parametrize.is_parametrized(model[0])
    compiled = build_with(mobile_network(), torch.randn(1, 3, 20, 20))
    done = aerogel.export_onnx(compiled, torch.randn(1, 3, 20, 20), tmp_path / "compiled.onnx")
    assert done.sparsity > 0.5


def test_fixed_batches_are_written_where_no_other_can_be_followed(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(3, 8).cumsum(0) if x.shape[0] == 3 else x.new_zeros(1)

    done = aerogel.export_onnx(Fixed(), torch.randn(3, 2, 4), tmp_path / "fixed.onnx")
    assert not done.any_batch


def test_nothing_is_written_where_outputs_deviate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"old")
    monkeypatch.setattr(onnx_export, "deviation", lambda ours, theirs: 0.01)
    with pytest.raises(OnnxError, match=r"deviate by 1\.0e-02, more than 0\.0001"):
        aerogel.export_onnx(perceptron(), torch.randn(2, 24), path)
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir() if each.is_file()] == ["net.onnx"]


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        aerogel.export_onnx("net", torch.randn(1), path)
    with pytest.raises(ValueError, match=r"fails on example_inputs .*\(2, 23\)"):
        aerogel.export_onnx(perceptron(), torch.randn(2, 23), path)
    with pytest.raises(OSError, match="nowhere"):
        aerogel.export_onnx(perceptron(), torch.randn(2, 24), tmp_path / "nowhere" / "net.onnx")
    with pytest.raises(ValueError, match="opset = 5: the exporter knows no such file, only 18"):
        aerogel.export_onnx(perceptron(), torch.randn(2, 24), path, opset=5)
    assert not path.exists()
