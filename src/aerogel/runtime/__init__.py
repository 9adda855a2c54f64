"""Floor 2: `compile` makes a model fast on the zeros it has; checkpoints store zeros as bits."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aerogel.runtime.checkpoint import CheckpointInfo, inspect, load, load_packed, save
    from aerogel.runtime.clusters import XNNPACK_THRESHOLD, Cluster, sparsify_convs
    from aerogel.runtime.compiled import CompiledModule
    from aerogel.runtime.compiler import compile
    from aerogel.runtime.detect import Zeros, detect_zeros
    from aerogel.runtime.exchange.onnx_export import OnnxExport, export_onnx
    from aerogel.runtime.exchange.onnx_file import OnnxError
    from aerogel.runtime.exchange.onnx_import import from_onnx
    from aerogel.runtime.explain import Explanation, LayerRow

# Resolved on first use: checkpoints need no kernels, and kernels no checkpoints.
_PUBLIC = {
    "XNNPACK_THRESHOLD": "clusters",
    "CheckpointInfo": "checkpoint",
    "Cluster": "clusters",
    "CompiledModule": "compiled",
    "Explanation": "explain",
    "LayerRow": "explain",
    "OnnxError": "exchange.onnx_file",
    "OnnxExport": "exchange.onnx_export",
    "Zeros": "detect",
    "compile": "compiler",
    "detect_zeros": "detect",
    "export_onnx": "exchange.onnx_export",
    "from_onnx": "exchange.onnx_import",
    "inspect": "checkpoint",
    "load": "checkpoint",
    "load_packed": "checkpoint",
    "save": "checkpoint",
    "sparsify_convs": "clusters",
}

__all__ = [
    "XNNPACK_THRESHOLD",
    "CheckpointInfo",
    "Cluster",
    "CompiledModule",
    "Explanation",
    "LayerRow",
    "OnnxError",
    "OnnxExport",
    "Zeros",
    "compile",
    "detect_zeros",
    "export_onnx",
    "from_onnx",
    "inspect",
    "load",
    "load_packed",
    "save",
    "sparsify_convs",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
