"""ONNX files that are damaged, hostile or not supported: a clear error, never a crash, no code."""

from __future__ import annotations

import contextlib
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_onnx_import import matrix, save

import aerogel
from aerogel.runtime import OnnxError
from networks import mobile_network

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

FUZZ_SECONDS = 3.0


@pytest.fixture
def linear(tmp_path: Path) -> Path:
    """y = x @ w."""
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    return save(tmp_path / "net.onnx", [node], {"w": matrix(4, 3)})


def change(path: Path, edit: Any) -> Path:
    """Edit a file's protobuf."""
    model = onnx.load(path, load_external_data=False)
    edit(model)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x04\x95", b"not protobuf" * 50])
def test_other_files_are_told_apart(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    with pytest.raises(OnnxError, match="not an ONNX file"):
        aerogel.from_onnx(path)


def test_missing_files_and_other_suffixes_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        aerogel.from_onnx(tmp_path / "nowhere.onnx")
    with pytest.raises(ValueError, match=r"net\.pth.*\.onnx file"):
        aerogel.compile("net.pth", torch.randn(1))


def test_every_truncation_is_an_error(linear: Path) -> None:
    content = linear.read_bytes()
    for size in range(0, len(content), 3):
        linear.write_bytes(content[:size])
        with pytest.raises(OnnxError):
            aerogel.from_onnx(linear)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (("LSTM", {}), r"node 'thing' \(LSTM\) of opset 17 is not supported"),
        (("Fancy", {"domain": "com.acme"}), r"\(com.acme::Fancy\) of opset 17 is not supported"),
        (("Resize", {"mode": "area"}), r"\(Resize\).*not supported: mode = 'area'"),
        (("Transpose", {"perm": 3}), r"attribute perm = 3, expected whole numbers"),
        (("Gather", {"axis": "x"}), r"'thing' \(Gather\).*axis = 'x', expected a whole number"),
        (("AveragePool", {"kernel_shape": [-1, 2]}), r"kernel_shape = \[-1, 2\]"),
        (("ConvTranspose", {}), r"slides over 0 axes"),
    ],
)
def test_unsupported_nodes_are_named(tmp_path: Path, node: Any, message: str) -> None:
    op, attributes = node
    inputs = ["x", "w"] if op in ("ConvTranspose", "Gather") else ["x"]
    made = helper.make_node(op, inputs, ["y"], name="thing", **attributes)
    path = save(tmp_path / "net.onnx", [made], {"w": matrix(4, 3)})
    with pytest.raises(OnnxError, match=message):
        aerogel.from_onnx(path)


def test_old_opsets_and_dangling_inputs_are_refused(linear: Path) -> None:
    change(linear, lambda m: m.graph.node[0].input.__setitem__(0, "ghost"))
    with pytest.raises(OnnxError, match=r"input 'ghost' is computed by no earlier node"):
        aerogel.from_onnx(linear)
    change(linear, lambda m: setattr(m.opset_import[0], "version", 6))
    with pytest.raises(OnnxError, match="opset 6 is older than 7"):
        aerogel.from_onnx(linear)


def external(model: Any, **entries: str) -> None:
    """Say that the weight lies elsewhere."""
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)


def test_external_data_is_read_from_the_folder(linear: Path) -> None:
    weight = matrix(4, 3)
    (linear.parent / "w.bin").write_bytes(b"12345678" + weight.tobytes())
    change(linear, lambda m: external(m, location="w.bin", offset="8", length="48"))
    x = torch.randn(2, 4)
    torch.testing.assert_close(aerogel.from_onnx(linear)(x), x @ torch.from_numpy(weight))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"location": "/etc/passwd"}, "outside the folder"),
        ({"location": "../secret"}, "outside the folder"),
        ({"location": "a/../../secret"}, "outside the folder"),
        ({"location": "C:\\secret"}, "outside the folder"),
        ({"location": "link"}, "outside the folder"),
        ({"location": ""}, "outside the folder"),
        ({"location": "gone.bin"}, "which is not there"),
        ({"location": "w.bin", "offset": "-4"}, "expected a number"),
        ({"location": "w.bin", "length": "9" * 30}, "expected a number"),
        ({"location": "w.bin", "length": "4800"}, "truncated"),
        ({"location": "w.bin", "length": "40"}, r"tensor 'w' of shape \[4, 3\]"),
    ],
)
def test_external_data_elsewhere_is_refused(linear: Path, entries: Any, message: str) -> None:
    (linear.parent / "w.bin").write_bytes(bytes(48))
    outside = linear.parent.parent / "secret"
    outside.write_bytes(bytes(48))
    (linear.parent / "link").symlink_to(outside)
    change(linear, lambda m: external(m, **entries))
    with pytest.raises(OnnxError, match=message):
        aerogel.from_onnx(linear)


def test_tensors_that_are_not_all_there_take_no_memory(linear: Path) -> None:
    def enlarge(model: Any) -> None:
        model.graph.initializer[0].dims[:] = [1 << 40, 1 << 20]

    with pytest.raises(OnnxError, match=r"tensor 'w' .* truncated"):
        aerogel.from_onnx(change(linear, enlarge))


@pytest.mark.parametrize("op", ["ConstantOfShape", "Expand", "Tile", "Range"])
def test_huge_results_of_few_numbers_are_refused(tmp_path: Path, op: str) -> None:
    sizes = numpy_helper.from_array(np.array([1 << 31, 1 << 31], np.int64), "n")
    ones = numpy_helper.from_array(np.ones((1, 1), np.float32), "one")
    limits = [numpy_helper.from_array(np.array(v, np.int64), f"r{i}") for i, v in
              enumerate((0, 1 << 60, 1))]  # fmt: skip
    inputs = {"ConstantOfShape": ["n"], "Range": ["r0", "r1", "r2"]}.get(op, ["one", "n"])
    nodes = [helper.make_node(op, inputs, ["big"]), helper.make_node("Size", ["big"], ["y"])]
    path = save(tmp_path / "net.onnx", nodes, {})

    def give(model: Any) -> None:
        model.graph.initializer.extend([sizes, ones, *limits])

    with pytest.raises(OnnxError, match=r"result would have the shape"):
        aerogel.from_onnx(change(path, give))


def test_mutated_files_never_do_worse_than_an_error(tmp_path: Path) -> None:
    model = mobile_network()
    path = tmp_path / "net.onnx"
    torch.onnx.export(
        model, (torch.randn(1, 3, 20, 20),), str(path), dynamo=False, opset_version=13
    )
    content, mutated = path.read_bytes(), tmp_path / "mutated.onnx"
    generator, began, tried = random.Random(0), time.monotonic(), 0
    while time.monotonic() - began < FUZZ_SECONDS:
        damaged = bytearray(content)
        for _ in range(generator.choice((1, 1, 2, 8))):
            place = generator.randrange(len(damaged))
            damaged[place] = generator.choice((0, 0xFF, generator.randrange(256)))
        if generator.random() < 0.3:
            place = generator.randrange(len(damaged))
            del damaged[place : place + generator.randrange(1, 64)]
        mutated.write_bytes(bytes(damaged))
        with contextlib.suppress(OnnxError):
            aerogel.from_onnx(mutated)
        tried += 1
    assert tried > 20
