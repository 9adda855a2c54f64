"""Networks from ONNX files: right outputs, real layers, usable names, ready for compile."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fakes import build_with
from torch import Tensor, nn

import aerogel
from networks import mobile_network, sparsify_

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
transformers = pytest.importorskip("transformers")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402


class Net(nn.Module):
    """What older exporters take apart: GELU, SiLU, hard swish, layer norm, attention, biases."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.first = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 8, 8) -> (B, 5)."""
        x = F.hardswish(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        parts = (layer(x).unflatten(2, (2, 4)).transpose(1, 2)
                 for layer in (self.query, self.key, self.value))  # fmt: skip
        y = F.scaled_dot_product_attention(*parts)
        x = self.first(x + y.transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(x))) * self.scale
        return self.head(F.silu(x).mean(1))


@pytest.fixture(scope="module")
def net() -> Net:
    """With statistics that folding could get wrong, and zeros."""
    torch.manual_seed(0)
    model = Net()
    model(torch.randn(32, 3, 8, 8))
    return sparsify_(model, 0.5).eval()


def export(model: nn.Module, path: Path, opset: int) -> Path:
    """By the older exporter, which takes most apart, or from opset 18 on by the newer."""
    x = torch.randn(2, 3, 8, 8)
    if opset < 18:
        torch.onnx.export(
            model, (x,), str(path), dynamo=False, opset_version=opset,
            input_names=["pixels"], dynamic_axes={"pixels": {0: "batch"}},
        )  # fmt: skip
    else:
        torch.onnx.export(
            model, (x,), str(path), dynamo=True, opset_version=opset, verbose=False,
            dynamic_shapes=({0: torch.export.Dim.AUTO},),
        )  # fmt: skip
    return path


@pytest.fixture(scope="module", params=[14, 17, 18, 20])
def file(request: pytest.FixtureRequest, net: Net, tmp_path_factory) -> Path:
    """The network exported for several opsets."""
    folder = tmp_path_factory.mktemp(f"opset{request.param}")
    return export(net, folder / "net.onnx", request.param)


def called(module: Any) -> list[str]:
    """What the imported graph calls, by name."""
    kinds = [type(module.get_submodule(node.target)).__name__
             for node in module.graph.nodes if node.op == "call_module"]  # fmt: skip
    return kinds + [node.target.__name__ for node in module.graph.nodes
                    if node.op == "call_function"]  # fmt: skip


def agree(ours: nn.Module, theirs: nn.Module, *inputs: Tensor) -> None:
    """Both give the same."""
    with torch.no_grad():
        torch.testing.assert_close(ours(*inputs), theirs(*inputs), rtol=1e-4, atol=1e-5)


def test_outputs_are_the_original_s_for_any_batch(file: Path, net: Net) -> None:
    module = aerogel.from_onnx(file)
    assert not module.training
    for batch in (1, 2, 7):
        agree(module, net, torch.randn(batch, 3, 8, 8))


def test_layers_come_back_as_layers_with_their_names_and_zeros(file: Path, net: Net) -> None:
    module = aerogel.from_onnx(file)
    state = module.state_dict()
    for name in ("query", "key", "value", "up", "down", "head"):
        assert isinstance(module.get_submodule(name), nn.Linear)
        assert torch.equal(state[f"{name}.weight"], net.state_dict()[f"{name}.weight"]), name
        assert torch.equal(state[f"{name}.bias"], net.state_dict()[f"{name}.bias"]), name
    assert isinstance(module.conv, nn.Conv2d)
    assert torch.equal(state["scale"], net.scale)


def test_what_exporters_take_apart_is_whole_again(file: Path) -> None:
    names = called(aerogel.from_onnx(file))
    for whole in ("LayerNorm", "gelu", "silu", "hardswish", "scaled_dot_product_attention"):
        assert names.count(whole) == 1, (whole, names)
    assert not {"erf", "softmax", "sigmoid"} & set(names)


def test_it_trains(file: Path, net: Net) -> None:
    module = aerogel.from_onnx(file).train()
    module(torch.randn(4, 3, 8, 8)).square().sum().backward()
    assert [name for name, p in module.named_parameters() if p.grad is None] == []
    twin = copy.deepcopy(module)
    twin.load_state_dict(module.state_dict())


def test_compile_takes_the_path_and_finds_the_zeros(file: Path, net: Net) -> None:
    x = torch.randn(3, 3, 8, 8)
    compiled = aerogel.compile(str(file), x, threads=1, cache=False)
    agree(compiled, net, x)
    agree(compiled, net, torch.randn(2, 3, 8, 8))
    sparsity = {row.layer: row.sparsity for row in compiled.explain().rows}
    assert sparsity["up"] == pytest.approx(0.5, abs=0.1)


def test_mobile_network_runs_as_a_native_plan(tmp_path: Path) -> None:
    model = mobile_network()
    x = torch.randn(2, 3, 20, 20)
    aerogel.export_onnx(model, x, tmp_path / "mobile.onnx")
    compiled = build_with(aerogel.from_onnx(tmp_path / "mobile.onnx"), x, strategy="native plans")
    agree(compiled, model, x)
    assert all("plan" in row.kernel for row in compiled.explain().rows)


def test_inputs_keep_order_and_names(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    inputs = {"input_ids": torch.randint(1, 50, (2, 6)), "attention_mask": torch.ones(2, 6).long()}
    inputs["attention_mask"][1, 4:] = 0
    done = aerogel.export_onnx(model, inputs, tmp_path / "bert.onnx")
    assert done.any_batch
    module = aerogel.from_onnx(done.path)
    with torch.no_grad():
        expected = model(**inputs)
        for outputs in (module(**inputs), module(*inputs.values())):
            torch.testing.assert_close(outputs[0], expected[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(outputs[1], expected[1], rtol=1e-4, atol=1e-5)
    names = dict(module.named_parameters())
    assert "encoder.layer.0.attention.self.query.weight" in names
    # Equal vectors are stored once; layers that start alike must not be tied.
    first = names["encoder.layer.0.attention.self.query.bias"]
    assert first is not names["encoder.layer.0.attention.self.key.bias"]


# Graphs by hand


def save(path: Path, nodes: list[Any], tensors: dict[str, np.ndarray], **kwargs: Any) -> Path:
    """A file with input x: float (batch, 4) and output y."""
    graph = helper.make_graph(
        nodes,
        kwargs.get("name", "net"),
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, kwargs.get("shape", ["b", 4]))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    opset = [helper.make_opsetid("", kwargs.get("opset", 17))]
    model = helper.make_model(graph, opset_imports=opset, ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def matrix(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Random weights."""
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


def test_names_that_no_module_can_have_are_made_usable(tmp_path: Path) -> None:
    hostile = 'a"]); import os; os.abort(); (["'
    names = (hostile, "forward.weight", "2.class.weight")
    tensors = {name: matrix(4, 4, seed) for seed, name in enumerate(names)}
    nodes = [
        helper.make_node("MatMul", ["x", hostile], ["import os"], name="self/training/__class__"),
        helper.make_node("MatMul", ["import os", "forward.weight"], ["lambda"]),
        helper.make_node("MatMul", ["lambda", "2.class.weight"], ["y"], name="/../../etc/passwd"),
    ]
    module = aerogel.from_onnx(save(tmp_path / "x.onnx", nodes, tensors, name="os.abort()"))
    x = torch.randn(2, 4)
    expected = x
    for value in tensors.values():
        expected = expected @ torch.from_numpy(value)
    torch.testing.assert_close(module(x), expected)
    assert all(part.isidentifier() or part.isdigit()
               for name, _ in module.named_parameters() for part in name.split("."))  # fmt: skip
    torch.export.export(module, (x,), strict=False)


def test_a_layer_called_twice_is_one_layer_and_tied_matrices_stay_tied(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w.weight"], ["a"], name="/w/MatMul"),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("MatMul", ["r", "w.weight"], ["c"], name="/w/MatMul_1"),
        helper.make_node("Gemm", ["c", "w.weight", "b.bias"], ["y"], name="/v/Gemm"),
    ]
    tensors = {"w.weight": matrix(4, 4), "b.bias": matrix(1, 4)[0]}
    module = aerogel.from_onnx(save(tmp_path / "x.onnx", nodes, tensors))
    weights = [p for p in module.parameters() if p.dim() == 2]
    assert len(weights) == 1
    x, w = torch.randn(3, 4), torch.from_numpy(tensors["w.weight"])
    expected = (x @ w).relu() @ w @ w + torch.from_numpy(tensors["b.bias"])
    torch.testing.assert_close(module(x), expected)


def test_quantised_weights_become_numbers(tmp_path: Path) -> None:
    whole = np.random.default_rng(0).integers(-127, 128, (4, 6)).astype(np.int8)
    tensors = {"q": whole, "s": np.full(6, 0.25, np.float32), "z": np.zeros(6, np.int8)}
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["fc.weight"], axis=1),
        helper.make_node("MatMul", ["x", "fc.weight"], ["y"]),
    ]
    module = aerogel.from_onnx(save(tmp_path / "x.onnx", nodes, tensors))
    assert torch.equal(module.fc.weight, torch.from_numpy(whole.T * np.float32(0.25)))


def test_functions_of_a_file_are_spelled_out(tmp_path: Path) -> None:
    path = save(tmp_path / "x.onnx", [helper.make_node("Twice", ["x"], ["y"], domain="mine")], {})
    model = onnx.load(path)
    body = [helper.make_node("Add", ["a", "a"], ["b"])]
    model.functions.append(
        helper.make_function("mine", "Twice", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
    )
    model.opset_import.append(helper.make_opsetid("mine", 1))
    path.write_bytes(model.SerializeToString())
    x = torch.randn(2, 4)
    torch.testing.assert_close(aerogel.from_onnx(path)(x), 2 * x)


def shapes_of_a_reshape() -> list[Any]:
    """(b, 4) -> (4, b) by the detour that exporters take."""

    def constant(name: str, value: Any) -> Any:
        return helper.make_node(
            "Constant", [], [name], value=numpy_helper.from_array(np.array(value, np.int64))
        )

    return [
        constant("zero", 0), constant("one", 1), constant("axis", [0]),
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["b"], axis=0),
        helper.make_node("Gather", ["s", "one"], ["c"], axis=0),
        helper.make_node("Mul", ["b", "one"], ["b1"]),
        helper.make_node("Unsqueeze", ["b1", "axis"], ["b2"]),
        helper.make_node("Unsqueeze", ["c", "axis"], ["c2"]),
        helper.make_node("Concat", ["c2", "b2"], ["t"], axis=0),
        helper.make_node("Cast", ["t"], ["t2"], to=TensorProto.INT64),
        helper.make_node("Reshape", ["x", "t2"], ["y"]),
    ]  # fmt: skip


def test_shapes_are_numbers_and_export_with_any_batch(tmp_path: Path) -> None:
    module = aerogel.from_onnx(save(tmp_path / "x.onnx", shapes_of_a_reshape(), {}))
    for batch in (1, 3):
        assert module(torch.randn(batch, 4)).shape == (4, batch)
    program = torch.export.export(
        module, (torch.randn(3, 4),), dynamic_shapes=({0: torch.export.Dim.AUTO},), strict=False
    )
    assert program.module()(torch.randn(5, 4)).shape == (4, 5)
    assert {str(node.target) for node in program.graph.nodes if node.op == "call_function"} <= {
        "aten.sym_size.int", "aten.reshape.default", "aten.view.default",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (["Div:two", "Erf", "Add:1.0", "Mul:x", "Mul:0.5"], F.gelu),
        (["Mul:third", "Erf", "Add:1.0", "Mul:half"], F.gelu),
        (["Sigmoid", "Mul:x"], F.silu),
        (["Add:3.0", "Clip", "Mul:x", "Div:6.0"], F.hardswish),
        (["Add:3.0", "Clip", "Div:6.0", "Mul:x"], F.hardswish),
        (["Add:3.0", "Clip", "Div:6.0"], F.hardsigmoid),
    ],
)
def test_spelled_out_activations_are_recognised(
    tmp_path: Path, build: list[str], expected: Callable[[Tensor], Tensor]
) -> None:
    numbers = {"two": 2**0.5, "third": 0.5**0.5, "0": 0.0, "6": 6.0}
    nodes, last = [helper.make_node("Mul", ["x", "0.5"], ["half"])], "x"
    for place, step in enumerate(build):
        op, _, operand = step.partition(":")
        inputs = {"Clip": [last, "0", "6"]}.get(op, [last, operand] if operand else [last])
        numbers |= {name: float(name) for name in inputs if name.replace(".", "").isdigit()}
        last = "y" if place == len(build) - 1 else f"v{place}"
        nodes.append(helper.make_node(op, inputs, [last]))
    numbers["0.5"] = 0.5
    tensors = {name: np.array(value, np.float32) for name, value in numbers.items()}
    module = aerogel.from_onnx(save(tmp_path / "x.onnx", nodes, tensors))
    assert called(module) == [expected.__name__]
    x = 3 * torch.randn(50, 4)
    torch.testing.assert_close(module(x), expected(x), rtol=1e-4, atol=1e-5)


def test_what_only_looks_like_an_activation_stays(tmp_path: Path) -> None:
    numbers = {"two": 2**0.5, "one": 1.0, "close": 0.45}
    nodes = [
        helper.make_node("Div", ["x", "two"], ["a"]),
        helper.make_node("Erf", ["a"], ["b"]),
        helper.make_node("Add", ["b", "one"], ["c"]),
        helper.make_node("Mul", ["c", "x"], ["d"]),
        helper.make_node("Mul", ["d", "close"], ["y"]),
    ]
    tensors = {name: np.array(value, np.float32) for name, value in numbers.items()}
    x = torch.randn(20, 4)
    module = aerogel.from_onnx(save(tmp_path / "x.onnx", nodes, tensors))
    torch.testing.assert_close(module(x), 0.9 * F.gelu(x), rtol=1e-4, atol=1e-5)
