"""Networks from `torch.export` files (.pt2), turned back into layers that train and can be pruned.

`torch.export.load` falls back to unpickling and evaluates text from the file as expressions, either
of which can run code. So the archive is read here first: only the parts that a plain exported
network has are copied into a fresh archive, in forms that hold nothing but numbers and names, and
only that copy is loaded.
"""

from __future__ import annotations

import inspect
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

aten = torch.ops.aten

_WEIGHTS = re.compile(r"data/weights/(weight_\d+|model_weights_config\.json)")
_CONSTANTS = re.compile(r"data/constants/(tensor_\d+|model_constants_config\.json)")
_PLAIN = re.compile(r"models/model\.json|archive_format|archive_version|byteorder|\.data/[\w/]+")
_SAMPLES = "data/sample_inputs/model.pt"
# Shape expressions, as sympy spells them: symbols, numbers, and what torch builds from them.
_EXPRESSION = re.compile(r"(?:[\w\s()+\-*/,=<>]|'[su]\d+')*")
_EXPRESSION_WORD = re.compile(
    r"[su]\d+|Symbol|Integer|Rational|Add|Mul|Pow|Max|Min|Mod|PythonMod|FloorDiv|CeilDiv|CleanDiv"
    r"|TruncToInt|IntTrueDiv|FloatTrueDiv|positive|nonnegative|integer|real|True|False|None"
)
_CONVOLUTIONS: dict[Any, type[nn.Module]] = {
    aten.conv1d.default: nn.Conv1d,
    aten.conv2d.default: nn.Conv2d,
    aten.conv3d.default: nn.Conv3d,
}
_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def load_exported(path: Path) -> nn.Module:
    """Load a network saved with `torch.export.save`, in layers.

    Linear, convolution, batch-norm and dropout calls become modules again, so that the network can
    train, be pruned and be evaluated; everything else stays as the exported graph has it.

    Args:
        path: The .pt2 file. It must have been exported with a dynamic batch dimension.

    Returns:
        A module that takes the exported inputs by position.

    Raises:
        ValueError: Not such a file, one that would need unpickling, or a fixed batch size.
    """
    try:
        program = torch.export.load(_vetted(path))
    except (RuntimeError, KeyError, AssertionError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a usable torch.export file: {error}") from None
    module = _unlifted(program)
    assert isinstance(module, fx.GraphModule)
    _require_dynamic_batch(module.graph, path)
    return _layered(module, program.call_spec.out_spec)


def _unlifted(program: torch.export.ExportedProgram) -> nn.Module:
    # Guards compare inputs with the samples, which the vetted copy does not have.
    if "check_guards" in inspect.signature(program.module).parameters:
        return program.module(check_guards=False)
    return program.module()


def _vetted(path: Path) -> io.BytesIO:
    """A copy of the archive with only its harmless parts."""
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(copy, "w", zipfile.ZIP_STORED) as target:
        for entry in source.infolist():
            root, _, name = entry.filename.partition("/")
            if name == _SAMPLES:
                content = _no_samples()
            elif not any(known.fullmatch(name) for known in (_WEIGHTS, _CONSTANTS, _PLAIN)):
                raise ValueError(
                    f"{path} holds {entry.filename!r}, which could run code when loaded; load the "
                    "network yourself and give it as `import.path:callable`"
                )
            else:
                content = source.read(entry)
            if name.endswith(".json"):
                _check_json(json.loads(content), path)
            target.writestr(f"{root}/{name}", content)
    copy.seek(0)
    copy.name = str(path)  # torch.export tells archives from other files by their name
    return copy


def _no_samples() -> bytes:
    """Sample inputs are not needed, and are the part that torch may unpickle."""
    buffer = io.BytesIO()
    torch.save(((), {}), buffer)
    return buffer.getvalue()


def _check_json(value: Any, path: Path) -> None:
    for key, item in _pairs(value):
        if key == "use_pickle" and item:
            raise ValueError(f"{path} holds pickled weights, which are never opened")
        if key in ("expr_str", "as_expr") and isinstance(item, str):
            words = re.findall(r"[A-Za-z_]\w*", item)
            if not _EXPRESSION.fullmatch(item) or not all(map(_EXPRESSION_WORD.fullmatch, words)):
                raise ValueError(f"{path} holds the unexpected shape expression {item[:60]!r}")


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    stack = [value]
    while stack:
        current = stack.pop()
        if isinstance(current, dict):
            yield from current.items()
            stack.extend(current.values())
        elif isinstance(current, list):
            stack.extend(current)


def _require_dynamic_batch(graph: fx.Graph, path: Path) -> None:
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, Tensor):
            if value.dim() and isinstance(value.shape[0], int):
                raise ValueError(
                    f"{path}: input {node.name} was exported with a fixed batch of "
                    f"{value.shape[0]}; export it with dynamic_shapes and Dim.AUTO for dimension 0"
                )
            return


def _layered(source: fx.GraphModule, out_spec: Any) -> fx.GraphModule:
    graph = source.graph
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            graph.erase_node(node)
    made: dict[str, nn.Module] = {}
    for node in list(graph.nodes):
        if node.op == "call_function":
            _replace(graph, source, node, made)
    graph.set_codegen(fx.graph.CodeGen())
    if out_spec is not None and out_spec.num_leaves == 1:
        output = next(node for node in graph.nodes if node.op == "output")
        output.args = (_arguments(output)[0][0],)
    graph.eliminate_dead_code()
    result = fx.GraphModule(source, graph)
    result.delete_all_unused_submodules()
    return result


def _replace(
    graph: fx.Graph, source: fx.GraphModule, node: fx.Node, made: dict[str, nn.Module]
) -> None:
    """Replace a call by a call of the module that does the same and owns the parameters."""
    layer: nn.Module
    if node.target == aten.dropout.default:
        name, layer = f"dropout_{node.name}", nn.Dropout(float(_arguments(node)[1]))
    else:
        found = _layer_of(source, node)
        if found is None:
            return
        name, layer = found
    if name not in made:
        made[name] = layer
        source.add_submodule(name, layer)
    with graph.inserting_before(node):
        call = graph.call_module(name, (node.args[0],))
    call.meta = node.meta
    node.replace_all_uses_with(call)
    graph.erase_node(node)


def _layer_of(source: fx.GraphModule, node: fx.Node) -> tuple[str, nn.Module] | None:
    names = [a.target if _is_attribute(a) else None for a in _arguments(node)[1:5]]
    weight_name = names[0] if names else None
    if weight_name is None or not str(weight_name).endswith(".weight"):
        return None
    values = [_attribute(source, name) for name in names]
    weight, name = values[0], str(weight_name).removesuffix(".weight")
    bias = values[1] if len(values) > 1 else None
    if node.target == aten.linear.default:
        layer: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    elif node.target in _CONVOLUTIONS:
        layer = _convolution(node, weight, has_bias=bias is not None)
    elif node.target == aten.batch_norm.default and None not in values:
        layer = _batch_norm(node, weight)
        layer.running_mean, layer.running_var = values[2], values[3]
    else:
        return None
    layer.weight = weight
    if bias is not None:
        layer.bias = bias
    return name, layer


def _arguments(node: fx.Node) -> list[Any]:
    return list(node.args)


def _is_attribute(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and argument.op == "get_attr"


def _attribute(source: fx.GraphModule, name: Any) -> Any:
    if name is None:
        return None
    owner, _, attribute = str(name).rpartition(".")
    return getattr(source.get_submodule(owner), attribute)


def _convolution(node: fx.Node, weight: Tensor, *, has_bias: bool) -> nn.Module:
    spatial = weight.dim() - 2
    defaults = ([1] * spatial, [0] * spatial, [1] * spatial, 1)
    given = _arguments(node)[3:]
    settings: list[Any] = [*given, *defaults[len(given) :]]
    stride, padding, dilation, groups = settings
    return _CONVOLUTIONS[node.target](
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        stride=tuple(stride),
        padding=tuple(padding),
        dilation=tuple(dilation),
        groups=groups,
        bias=has_bias,
    )


def _batch_norm(node: fx.Node, weight: Tensor) -> nn.Module:
    arguments = _arguments(node)
    momentum, epsilon = float(arguments[6]), float(arguments[7])
    dimensions = arguments[0].meta["val"].dim()
    return _NORMS[dimensions](weight.shape[0], eps=epsilon, momentum=momentum)
