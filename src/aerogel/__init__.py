"""aerogel: sparse deep learning in PyTorch. Make zeros, keep zeros, and collect on them.

What most people need stands here; everything else is one room further in
(`aerogel.sparsity`, `aerogel.pruning`, `aerogel.runtime`, `aerogel.kernels`, ...).

    pruner = aerogel.pruning.GradualPruner(model, optimizer, 0.9, begin_step=0, end_step=1000)
    model = aerogel.sparse_training(model)          # steps cost what the non-zeros cost
    fast = aerogel.compile(model, (example,))       # never slower than what it was given
    aerogel.save(model, "model.safetensors")        # zeros as bits, not as floats
    aerogel.load("model.safetensors", model)
    model = aerogel.from_onnx("model.onnx")         # and aerogel.export_onnx writes one
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from aerogel.version import __version__

if TYPE_CHECKING:
    from aerogel.runtime import (
        CompiledModule,
        compile,
        export_onnx,
        from_onnx,
        inspect,
        load,
        save,
    )
    from aerogel.train import sparse_training

# Resolved on first use, so that `import aerogel` and `aerogel --help` stay quick.
_PUBLIC = dict.fromkeys(
    ("compile", "CompiledModule", "export_onnx", "from_onnx", "inspect", "load", "save"),
    "aerogel.runtime",
)
_PUBLIC["sparse_training"] = "aerogel.train"
_ROOMS = (
    *("kernels", "sparsity", "runtime", "pruning", "attention", "nn"),
    *("models", "data", "train", "bench", "report"),
)

__all__ = [
    "CompiledModule",
    "__version__",
    "compile",
    "export_onnx",
    "from_onnx",
    "inspect",
    "load",
    "save",
    "sparse_training",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
    elif name in _ROOMS:
        value = importlib.import_module(f"aerogel.{name}")
    else:
        raise AttributeError(f"module 'aerogel' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC, *_ROOMS])
