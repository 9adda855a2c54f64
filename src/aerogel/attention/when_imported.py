"""A call that waits until somebody imports a module, because importing it takes seconds."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def when_imported(name: str, call: Callable[[], object]) -> None:
    """Call once a module has been imported: now if it is there already.

    Args:
        name: of the module, with its packages'.
        call: what to do; it may import the module.
    """
    if sys.modules.get(name) is not None:
        call()
    else:
        sys.meta_path.insert(0, _Waiting(name, call))


class _Waiting(MetaPathFinder):
    """Lets the other finders find the module, and adds a call to what runs it."""

    def __init__(self, name: str, call: Callable[[], object]) -> None:
        self._name, self._call, self._looking = name, call, False

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self._name or self._looking:
            return None
        self._looking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._looking = False
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_call(module: ModuleType) -> None:
            run(module)
            sys.meta_path.remove(self)
            self._call()

        spec.loader.exec_module = run_and_call  # type: ignore[method-assign]
        return spec
