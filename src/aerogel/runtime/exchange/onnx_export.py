"""To an ONNX file: the network as it is, dense, with its zeros in the weights, checked.

ONNX has no sparse layers that engines run, so the file is a plain dense one: as large as the dense
network's, read by everything, with every zero exactly where it was. `from_onnx` finds them again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ShapesCollection
from torch.utils import _pytree as pytree

from aerogel.atomic import write_atomic
from aerogel.runtime.calls import normalize_example, run_example
from aerogel.runtime.capture import frozen_copy
from aerogel.runtime.compiled import CompiledModule
from aerogel.runtime.exchange.onnx_file import OnnxError
from aerogel.runtime.strategies import deviation

# Protobuf's limit for one file.
_MAX_BYTES = (1 << 31) - 1


@dataclass(frozen=True)
class OnnxExport:
    """What was written.

    Attributes:
        path: The file.
        size: Its bytes.
        opset: Version of the standard operators.
        deviation: Largest difference between ONNX Runtime's outputs and torch's, relative to the
            output's largest magnitude.
        any_batch: Whether the file takes other batch sizes than the example's.
        sparsity: Fraction of zeros in the weights of two and more dimensions.
    """

    path: Path
    size: int
    opset: int
    deviation: float
    any_batch: bool
    sparsity: float


def export_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    opset: int | None = None,
    tolerance: float = 1e-4,
) -> OnnxExport:
    """Write a model as an ONNX file that ONNX Runtime runs with the same outputs.

    The file is a plain dense one with the zeros baked in: masks are applied, nothing is compressed.
    It takes any batch size (the first dimension of every input) where `torch.export` can follow
    that, else the example's. It is written only after ONNX Runtime gave torch's outputs for it, in
    one rename.

    Args:
        model: Any module on the CPU, or a compiled one (its original is written). Left alone.
        example_inputs: One tensor, a tuple of positional inputs, or a dict of keyword inputs.
        path: Of the file.
        opset: Version of the standard operators, 18 or newer; by default the exporter's own.
        tolerance: Largest deviation of any output, relative to its largest magnitude.

    Returns:
        What was written and how closely it agrees.

    Raises:
        ValueError: The example does not fit, the model cannot be exported, the file would be
            larger than 2 GB, or its outputs deviate. Nothing is written then.
        OSError: The file cannot be written.
    """
    _require_packages()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    args, kwargs = normalize_example(example_inputs)
    plain = frozen_copy(model.original if isinstance(model, CompiledModule) else model)
    run_example(plain, args, kwargs)  # a clear error if the example does not fit
    reasons = []
    for wanted in (True, False):
        try:
            content, version = _written(plain, args, kwargs, wanted, opset)
            off, any_batch = _check(plain, args, kwargs, content, tolerance)
        except Exception as error:  # exporters and engines raise what they like
            reasons.append(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            continue
        write_atomic(Path(path), content)
        return OnnxExport(Path(path), len(content), version, off, any_batch, _sparsity(plain))
    raise OnnxError(f"{type(model).__name__} cannot be exported: {reasons[-1]}")


def _require_packages() -> None:
    try:
        import onnx
        import onnxruntime
        import onnxscript
    except ImportError:
        raise OnnxError("writing ONNX files needs: pip install 'aerogel[onnx]'") from None
    del onnx, onnxruntime, onnxscript


def _twice(value: Any) -> Any:
    """Twice the batch."""
    return torch.cat([value, value]) if isinstance(value, Tensor) and value.dim() else value


def _several(value: Any) -> Any:
    """A batch of at least two: the exporter takes sizes of one for constants."""
    one = isinstance(value, Tensor) and value.dim() and value.shape[0] == 1
    return _twice(value) if one else value


def _written(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    any_batch: bool,
    opset: int | None,
) -> tuple[bytes, int]:
    """The file's content, and its opset."""
    shapes = ShapesCollection()
    if any_batch:
        args, kwargs = pytree.tree_map(_several, (args, kwargs))
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.dim():
                shapes[leaf] = {0: Dim.AUTO}
    dynamic = shapes.dynamic_shapes(model, args, kwargs) if any_batch else None
    with _quiet(), torch.no_grad(), tempfile.TemporaryDirectory(prefix="aerogel-onnx-") as folder:
        program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic, strict=False)
        written = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=opset)
        assert written is not None
        size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
        if size > _MAX_BYTES:
            raise OnnxError(f"{size} bytes of weights are more than one ONNX file can hold")
        file = Path(folder) / "model.onnx"
        written.save(str(file), external_data=False)
        versions = [v for domain, v in written.model.opset_imports.items() if domain == ""]
        if opset not in (None, versions[0]):
            raise OnnxError(f"opset = {opset}: the exporter knows no such file, only {versions[0]}")
        return file.read_bytes(), int(versions[0])


def _check(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    content: bytes,
    tolerance: float,
) -> tuple[float, bool]:
    """The largest deviation of ONNX Runtime's outputs, and whether the file takes any batch.

    Where it says so, it is held to that on twice the example.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    declared = [each.shape for each in session.get_inputs() if each.shape]
    any_batch = bool(declared) and not any(isinstance(shape[0], int) for shape in declared)
    examples = [(args, kwargs)]
    if any_batch:
        examples.append(pytree.tree_map(_twice, (args, kwargs)))
    worst = 0.0
    for some_args, some_kwargs in examples:
        with torch.no_grad():
            expected = model(*some_args, **some_kwargs)
        outputs = session.run(None, _feed(session, some_args, some_kwargs))
        wanted = [leaf for leaf in pytree.tree_leaves(_plain(expected)) if isinstance(leaf, Tensor)]
        worst = max(worst, deviation([torch.from_numpy(each) for each in outputs], wanted))
    if not worst <= tolerance:
        raise OnnxError(f"ONNX Runtime's outputs deviate by {worst:.1e}, more than {tolerance:g}")
    return worst, any_batch


def _plain(outputs: Any) -> Any:
    """Outputs of transformers' models as tuples."""
    return outputs.to_tuple() if hasattr(outputs, "to_tuple") else outputs


def _feed(session: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The file's inputs by name, or in order where the exporter has renamed them."""
    names = [each.name for each in session.get_inputs()]
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if set(names) <= set(kwargs):
        return {name: kwargs[name].numpy() for name in names}
    if len(names) != len(tensors):
        raise OnnxError(f"the file takes {len(names)} inputs, the model {len(tensors)}")
    return {name: each.contiguous().numpy() for name, each in zip(names, tensors, strict=True)}


def _sparsity(model: nn.Module) -> float:
    weights = [value for value in model.parameters() if value.dim() > 1]
    total = sum(value.numel() for value in weights)
    return 1.0 - sum(int(value.count_nonzero()) for value in weights) / total if total else 0.0


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter talks a lot about things that are no news to the user."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
