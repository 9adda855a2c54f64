"""Reading ONNX files: protobuf and numbers, nothing that could run, nothing outside the folder.

A file is taken apart into plain nodes and tensors here. Weights in other files ("external data")
are read from the file's own folder only. Every size is checked against the bytes that are there
before memory is set aside for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import onnx

STANDARD = ("", "ai.onnx")
# What the operators here were written against; older ones had other attributes.
OLDEST_OPSET = 7


class OnnxError(ValueError):
    """A file that cannot be used; the message names it, the place in it and the reason."""


@dataclass(frozen=True)
class OnnxInput:
    """An input or output as the file declares it.

    Attributes:
        name: In the file.
        dtype: NumPy's name of the element type.
        shape: Sizes; text where the file has a symbol, None where it says nothing; None for an
            unknown rank.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True, eq=False)
class RawNode:
    """A node as it stands in the file."""

    op: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    metadata: dict[str, str]

    def __str__(self) -> str:
        kind = self.op if self.domain in STANDARD else f"{self.domain}::{self.op}"
        return f"node {self.name or self.outputs[0]!r} ({kind})"


@dataclass(eq=False)
class OnnxGraph:
    """A file's network: nodes in order, and all tensors that stand in the file."""

    path: Path
    name: str
    opset: int
    inputs: list[OnnxInput]
    outputs: list[OnnxInput]
    nodes: list[RawNode]
    tensors: dict[str, Tensor] = field(default_factory=dict)


def import_onnx() -> Any:
    """The `onnx` package.

    Raises:
        OnnxError: It is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise OnnxError("ONNX files need: pip install 'aerogel[onnx]'") from None
    return onnx


def read_onnx(path: Path, supported: set[str]) -> OnnxGraph:
    """Read and check a file.

    Args:
        path: The .onnx file; its external data lies in the same folder.
        supported: Operators of the standard domain. Others are replaced by their definition where
            the standard or the file gives one.

    Raises:
        OnnxError: Not an ONNX file, truncated, too old, or with tensors that do not fit.
        OSError: It cannot be read.
    """
    model = _parse(path)
    opset = _opset(model, path)
    if opset < OLDEST_OPSET:
        raise OnnxError(f"{path}: opset {opset} is older than {OLDEST_OPSET}; export it anew")
    model = _inlined(model, supported, opset, path)
    graph = model.graph
    reader = _Tensors(path)
    tensors = {each.name: reader.read(each) for each in graph.initializer}
    if graph.sparse_initializer:
        raise OnnxError(f"{path}: sparse_initializer is not supported; store the tensors dense")
    inputs = [_declared(each, path) for each in graph.input if each.name not in tensors]
    outputs = [_declared(each, path) for each in graph.output]
    nodes = [_raw(each, reader, path) for each in graph.node]
    return OnnxGraph(path, graph.name, opset, inputs, outputs, nodes, tensors)


def _parse(path: Path) -> onnx.ModelProto:
    onnx = import_onnx()
    content = path.read_bytes()
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except Exception as error:  # protobuf's own, from a package that has no types
        raise OnnxError(f"{path} is not an ONNX file, or is truncated ({error})") from None
    if not model.HasField("graph") or not model.graph.output:
        raise OnnxError(f"{path} is not an ONNX file, or is truncated: it holds no network")
    return model


def _opset(model: onnx.ModelProto, path: Path) -> int:
    versions = [int(each.version) for each in model.opset_import if each.domain in STANDARD]
    if not versions:
        raise OnnxError(f"{path} does not say which opset it is of")
    return versions[0]


def _inlined(
    model: onnx.ModelProto, supported: set[str], opset: int, path: Path
) -> onnx.ModelProto:
    """With functions of the file, and operators that only their definition covers, spelled out."""
    onnx = import_onnx()
    from onnx import defs, inliner

    foreign = {
        ("", node.op_type)
        for node in model.graph.node
        if node.domain in STANDARD and node.op_type not in supported
        if _is_function(defs, node.op_type, opset)
    }
    try:
        if model.functions:
            model = inliner.inline_local_functions(model)
        if foreign:
            model = _inline_standard(onnx, inliner, model, foreign)
    except Exception as error:  # the inliner is C++ and raises what it likes
        raise OnnxError(f"{path}: its functions cannot be expanded: {error}") from None
    return model


def _is_function(defs: Any, op: str, opset: int) -> bool:
    if not defs.has(op, opset, ""):
        return False
    schema = defs.get_schema(op, opset, "")
    return bool(schema.has_function or schema.has_context_dependent_function)


def _inline_standard(onnx: Any, inliner: Any, model: Any, wanted: set[tuple[str, str]]) -> Any:
    """Only nodes and shapes go through the inliner: weights may be larger than it can take."""
    light = onnx.ModelProto()
    light.CopyFrom(model)
    del light.graph.initializer[:]
    for node in light.graph.node:
        if ("", node.op_type) in wanted:
            _state_defaults(onnx, node, _opset(model, Path()))
    known = {each.name for each in light.graph.input}
    for tensor in model.graph.initializer:
        if tensor.name not in known:
            shape = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            light.graph.input.append(shape)
    light = onnx.shape_inference.infer_shapes(light)
    light = inliner.inline_selected_functions(light, sorted(wanted), inline_schema_functions=True)
    light.graph.initializer.extend(model.graph.initializer)
    return light


def _state_defaults(onnx: Any, node: onnx.NodeProto, opset: int) -> None:
    """Write attributes out that the node leaves at their default: the inliner would lose them."""
    given = {each.name for each in node.attribute}
    for name, attribute in onnx.defs.get_schema(node.op_type, opset, "").attributes.items():
        if name not in given and attribute.default_value.name:
            node.attribute.append(attribute.default_value)


class _Tensors:
    """Decodes tensors, external ones from the folder of the file."""

    def __init__(self, path: Path) -> None:
        self._path, self._folder = path, path.parent

    def read(self, proto: onnx.TensorProto) -> Tensor:
        """The tensor.

        Raises:
            OnnxError: An unknown type, or other bytes than its shape needs.
        """
        onnx = import_onnx()
        from onnx import numpy_helper

        what = f"{self._path}: tensor {proto.name!r}"
        if any(size < 0 for size in proto.dims):
            raise OnnxError(f"{what} has the shape {list(proto.dims)}")
        if proto.data_type in (onnx.TensorProto.STRING, onnx.TensorProto.UNDEFINED):
            raise OnnxError(f"{what} holds no numbers")
        try:
            if proto.data_location == onnx.TensorProto.EXTERNAL:
                proto = self._with_external(proto, what)
            self._check_count(proto, what)
            return _to_torch(numpy_helper.to_array(proto))
        except OnnxError:
            raise
        except (ValueError, TypeError, KeyError, OverflowError, MemoryError) as error:
            raise OnnxError(f"{what} of shape {list(proto.dims)}: {error}") from None

    @staticmethod
    def _check_count(proto: onnx.TensorProto, what: str) -> None:
        """NumPy would broadcast one number to any shape; a file's tensor is written out in full."""
        held = max(
            len(proto.raw_data) * 2,  # two 4-bit numbers to a byte
            *(len(getattr(proto, name)) * 2 for name in
              ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")),
        )  # fmt: skip
        if math.prod(proto.dims) > held:
            raise OnnxError(f"{what} of shape {list(proto.dims)} is not all there: truncated")

    def _with_external(self, proto: onnx.TensorProto, what: str) -> onnx.TensorProto:
        onnx = import_onnx()
        entries = {entry.key: entry.value for entry in proto.external_data}
        path = self._resolve(entries.get("location", ""), what)
        offset, available = _whole(entries.get("offset", "0"), what), path.stat().st_size
        length = _whole(entries.get("length", str(max(available - offset, 0))), what)
        if offset + length > available:
            raise OnnxError(
                f"{what} needs {length} bytes from {offset} on of {path.name}, which has "
                f"{available}: truncated"
            )
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read(length)
        return onnx.TensorProto(
            name=proto.name, data_type=proto.data_type, dims=proto.dims, raw_data=content
        )

    def _resolve(self, location: str, what: str) -> Path:
        """The file of external data, which must be a plain file inside the model's folder."""
        parts = PurePosixPath(location).parts
        outside = not location or location.startswith(("/", "\\")) or ".." in parts
        outside |= "\0" in location or bool(PureWindowsPath(location).drive) or "\\" in location
        path = self._folder / location if not outside else self._folder
        folder = self._folder.resolve()
        if outside or not path.resolve().is_relative_to(folder):
            raise OnnxError(f"{what} is stored in {location!r}, outside the folder of the file")
        if not path.is_file():
            raise OnnxError(f"{what} is stored in {location!r}, which is not there")
        return path


def _whole(text: str, what: str) -> int:
    if not text.isdecimal() or len(text) > 18:
        raise OnnxError(f"{what}: its external data names {text[:40]!r}, expected a number")
    return int(text)


def _to_torch(array: np.ndarray) -> Tensor:
    """A writable tensor of its own; types that only `ml_dtypes` knows by their bits or values."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    if array.dtype.kind in "biuf" and array.dtype.isnative and array.dtype.itemsize <= 8:
        return torch.from_numpy(np.array(array))
    if array.dtype.name in ("int4", "int2"):
        return torch.from_numpy(array.astype(np.int8))
    if array.dtype.name in ("uint4", "uint2"):
        return torch.from_numpy(array.astype(np.uint8))
    raise ValueError(f"the element type {array.dtype.name} is not supported")


def _declared(value: onnx.ValueInfoProto, path: Path) -> OnnxInput:
    onnx = import_onnx()
    kind = value.type.WhichOneof("value")
    if kind not in (None, "tensor_type"):
        raise OnnxError(f"{path}: {value.name!r} is a {kind}, expected a tensor")
    declared = value.type.tensor_type
    try:
        dtype = str(onnx.helper.tensor_dtype_to_np_dtype(declared.elem_type))
    except KeyError:
        dtype = "float32"
    if not declared.HasField("shape"):
        return OnnxInput(value.name, dtype, None)
    sizes = [each.dim_param or (each.dim_value if each.dim_value > 0 else None)
             for each in declared.shape.dim]  # fmt: skip
    return OnnxInput(value.name, dtype, tuple(sizes))


def _raw(node: onnx.NodeProto, reader: _Tensors, path: Path) -> RawNode:
    attributes = {each.name: _attribute(each, reader) for each in node.attribute}
    metadata = {entry.key: entry.value for entry in node.metadata_props}
    if not node.output:
        raise OnnxError(f"{path}: node {node.name!r} ({node.op_type}) has no output")
    return RawNode(node.op_type, node.domain, node.name, tuple(node.input), tuple(node.output),
                   attributes, metadata)  # fmt: skip


def _attribute(proto: onnx.AttributeProto, reader: _Tensors) -> Any:
    onnx = import_onnx()
    kind = onnx.AttributeProto
    if proto.type == kind.FLOAT:
        return float(proto.f)
    if proto.type == kind.INT:
        return int(proto.i)
    if proto.type == kind.STRING:
        return proto.s.decode("utf-8", "replace")
    if proto.type == kind.TENSOR:
        return reader.read(proto.t)
    if proto.type == kind.FLOATS:
        return [float(each) for each in proto.floats]
    if proto.type == kind.INTS:
        return [int(each) for each in proto.ints]
    return f"a value of type {kind.AttributeType.Name(proto.type)}"
