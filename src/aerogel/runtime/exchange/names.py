"""Names from a file, made into paths that modules and parameters can have."""

from __future__ import annotations

import keyword
import re

from torch import fx, nn

_MAX_PART, _MAX_PARTS = 80, 24
_QUOTED = re.compile(r"'([^']*)'")
# Attributes that a module has already; a part with such a name would hide them.
_RESERVED = {*dir(nn.Module()), *dir(fx.GraphModule(nn.Module(), fx.Graph()))}


def identifier(name: str) -> str:
    """A name with nothing but ASCII letters, digits and underscores, starting with no digit."""
    found = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_")[:_MAX_PART] or "value"
    found = f"_{found}" if found[0].isdigit() else found
    return f"{found}_" if keyword.iskeyword(found) or found in _RESERVED else found


def module_path(name: str) -> str:
    """A dotted path: "/layers.0/fc/MatMul" becomes "layers.0.fc.MatMul"."""
    parts = [part for part in re.split(r"[./\\]+|::", name) if part.strip()]
    return ".".join(_part(part) for part in parts[-_MAX_PARTS:]) or "value"


def _part(part: str) -> str:
    return part if part.isascii() and part.isdigit() else identifier(part)


def scope_of(node_name: str, metadata: dict[str, str]) -> str | None:
    """The module that a node came from, as far as the exporter has said.

    PyTorch's newer exporter notes it as a list of scopes, innermost last; its older one names
    nodes like "/encoder/layer.0/query/MatMul".
    """
    scopes = _QUOTED.findall(metadata.get("pkg.torch.onnx.name_scopes", ""))
    if len(scopes) > 1:
        return scopes[-2] or None
    owner, slash, _ = node_name.rpartition("/")
    return (owner.strip("/") or None) if slash else None


class Places:
    """Paths that are taken in the module under construction."""

    def __init__(self) -> None:
        self._leaves: set[str] = set()
        self._folders: set[str] = set()

    def take(self, path: str) -> str:
        """The path itself, or where it cannot be had one that tells of it."""
        found, count = path, 0
        while not self._free(found):
            count += 1
            found = f"{path.replace('.', '_')}_{count}"
        self._leaves.add(found)
        self._folders.update(_parents(found))
        return found

    def _free(self, path: str) -> bool:
        if path in self._leaves or path in self._folders:
            return False
        return not any(parent in self._leaves for parent in _parents(path))


def _parents(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]
