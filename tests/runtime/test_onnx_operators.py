"""Imported operators against the standard's own examples, which the `onnx` package carries."""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
node_cases = pytest.importorskip("onnx.backend.test.case.node")

from aerogel.runtime import OnnxError, from_onnx  # noqa: E402
from aerogel.runtime.exchange import onnx_import  # noqa: E402, F401 (fills the table)
from aerogel.runtime.exchange.operators import OPERATORS  # noqa: E402

# Examples that ask for what is refused by design: other results than the first, training, types
# that torch cannot compute with. The message of the refusal is checked.
REFUSALS = (
    "is not supported",
    "older than",
    "expected a tensor",
    "holds no numbers",
    "say which opset",
    "functions cannot be expanded",
    "not supported",
)
# Examples whose numbers are not those of exact arithmetic.
INEXACT = ("bf16", "bfloat16", "fp16", "float16")
# amax over nothing is an error in torch; the second holds a type that NumPy cannot have.
LEFT_OUT = ("empty_set", "quantizelinear_blocked_symmetric")


def _modules() -> list[str]:
    """Example files of the operators that are imported; casts between exotic types take seconds."""
    wanted = [op.lower() for op in OPERATORS]
    names = [each.name for each in pkgutil.iter_modules(node_cases.__path__)]
    plain = {name: name.replace("_", "") for name in names if not name.startswith(("_", "cast"))}
    return [name for name, stem in plain.items() if any(op.startswith(stem) for op in wanted)]


@pytest.fixture(scope="module")
def examples() -> dict[str, list[Any]]:
    """The examples by operator."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        for name in _modules():
            importlib.import_module(f"{node_cases.__name__}.{name}")
    found: dict[str, list[Any]] = {}
    for case in node_cases._NodeTestCases:
        if case.data_sets is not None and not any(word in case.name for word in LEFT_OUT):
            found.setdefault(case.model.graph.node[0].op_type, []).append(case)
    return found


def _with_weights(case: Any, count: int) -> tuple[Any, list[Any]]:
    """The model with all inputs after the first few as initializers, as trained files have them."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    inputs = list(case.data_sets[0][0])
    for declared, value in list(zip(model.graph.input, inputs, strict=True))[count:]:
        tensor = onnx.numpy_helper.from_array(np.asarray(value), declared.name)
        model.graph.initializer.append(tensor)
    del model.graph.input[count:]
    return model, inputs[:count]


def _tensor(value: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(value))


def _check(case: Any, model: Any, inputs: list[Any], path: Path) -> bool:
    """Whether the example could be imported; if so its results are right."""
    path.write_bytes(model.SerializeToString())
    try:
        module = from_onnx(path)
        arguments = [_tensor(value) for value in inputs]
        with torch.no_grad():
            results = module(*arguments)
    except OnnxError as error:
        if any(words in str(error) for words in REFUSALS):
            return False
        raise
    except (TypeError, NotImplementedError) as error:  # a type that torch does not compute with
        if any(word in str(error).lower() for word in ("uint", "numpy", "implemented")):
            return False
        raise
    found = [results] if isinstance(results, torch.Tensor) else list(results)
    for ours, theirs in zip(found, case.data_sets[0][1], strict=True):
        wanted = _tensor(theirs)
        assert (ours.shape, ours.dtype) == (wanted.shape, wanted.dtype), case.name
        torch.testing.assert_close(
            ours, wanted, rtol=1e-3, atol=1e-5, equal_nan=True, msg=lambda m: f"{case.name}: {m}"
        )
    return True


@pytest.mark.filterwarnings("ignore")
def test_operators_agree_with_the_standards_examples(
    examples: dict[str, list[Any]], tmp_path: Path
) -> None:
    right: dict[str, int] = {}
    for op, cases in examples.items():
        for case in cases:
            if any(word in case.name for word in INEXACT):
                continue
            inputs = list(case.data_sets[0][0])
            given: list[tuple[Any, list[Any]]] = [(case.model, inputs)]
            # Examples with strings or sequences cannot be tensors of the file.
            with suppress(TypeError, ValueError, AttributeError, NotImplementedError):
                given.append(_with_weights(case, 1))
            for model, some in given:
                right[op] = right.get(op, 0) + _check(case, model, some, tmp_path / "case.onnx")
    assert sum(right.values()) > 1500
    never = {op for op, count in right.items() if op in OPERATORS and count == 0}
    never.discard("Not")  # its examples are of opset 1
    assert never == set(), f"no example of {sorted(never)} was imported"
