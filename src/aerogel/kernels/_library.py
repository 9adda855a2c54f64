"""Loading the native library, and which instruction set of it runs."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

# torch first: its libgomp is then the one that the native library binds to, and both share one pool
# of threads.
import torch  # noqa: F401

_NATIVE_NAME = "aerogel.kernels._native"


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """The native module or None, and why it could not be loaded."""
    path = os.environ.get("AEROGEL_NATIVE")
    try:
        if not path:
            return importlib.import_module(_NATIVE_NAME), ""
        spec = importlib.util.spec_from_file_location(_NATIVE_NAME, path)
        if spec is None or spec.loader is None:
            return None, f"AEROGEL_NATIVE={path!r} is not a Python extension module"
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[_NATIVE_NAME] = module
        return module, ""
    except ImportError as error:
        return None, str(error)


def native() -> Any:
    """The native extension module.

    Raises:
        RuntimeError: it is not built, or was built for another Python or system.
    """
    module, reason = _load()
    if module is None:
        raise RuntimeError(
            f"aerogel's native kernels could not be loaded ({reason}); install with "
            "`pip install .` to build them, or set AEROGEL_KERNELS=reference to run on torch alone"
        )
    return module


def native_available() -> bool:
    """Whether the native kernels are built and loadable."""
    return _load()[0] is not None


def reference_mode() -> bool:
    """Whether everything runs on the pure torch references (`AEROGEL_KERNELS=reference`).

    Raises:
        ValueError: AEROGEL_KERNELS is neither empty, "native" nor "reference".
    """
    module = _load()[0]
    # Asked in every call: `os.environ` takes four functions and two exceptions to find nothing.
    if module is not None and not module.in_environment("AEROGEL_KERNELS"):
        return False
    mode = os.environ.get("AEROGEL_KERNELS", "")
    if mode not in ("", "native", "reference"):
        raise ValueError(f"AEROGEL_KERNELS={mode!r}: expected 'native' or 'reference'")
    return mode == "reference"


def native_in_use() -> Any | None:
    """The native module, or None where the references run instead; one call on hot paths.

    Raises:
        ValueError: as `reference_mode`.
    """
    module = _load()[0]
    if module is None or module.in_environment("AEROGEL_KERNELS"):
        return None if reference_mode() else module
    return module


def isa() -> str:
    """Name of the instruction set in use: "avx512", "avx2", "neon" or "generic"."""
    return native().isa()


def isa_in_use() -> str:
    """`isa`, or "reference" where the references run instead.

    Raises:
        ValueError: as `reference_mode`.
    """
    module = native_in_use()
    return "reference" if module is None else module.isa()


def available_isas() -> list[str]:
    """Instruction sets that are compiled in and that this CPU can run, best first."""
    return native().available_isas()


def set_isa(name: str) -> None:
    """Use another instruction set from now on (tests, comparisons).

    Args:
        name: one of `available_isas()`; the environment variable AEROGEL_ISA sets the first one.

    Raises:
        ValueError: `name` is not available here.
    """
    native().set_isa(name)
