"""Learning a teacher's hidden features, layer by layer."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class FeatureMatch:
    """Compares the outputs of like-named modules of a student and its teacher.

    Each layer's squared error is divided by the teacher's own mean square, so that all layers
    weigh alike whatever their scale (SquareHead).

    Args:
        student, teacher: networks that name the modules alike.
        globs: patterns of module names, e.g. "encoder.layer.?"; their outputs are compared. Of a
            tuple, the first tensor is.

    Raises:
        ValueError: a pattern matches no module of the student, or the teacher lacks one of them.

    Reference:
        Kurtic et al., "Sparse Fine-tuning for Inference Acceleration of Large Language Models",
        arXiv 2310.06927.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, globs: Sequence[str]) -> None:
        self.names = _matching(student, globs)
        modules = dict(student.named_modules()), dict(teacher.named_modules())
        missing = [name for name in self.names if name not in modules[1]]
        if missing:
            raise ValueError(f"distill_features: the teacher has no module {missing[0]!r}")
        self._student: dict[str, Tensor] = {}
        self._teacher: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        for named, outputs in zip(modules, (self._student, self._teacher), strict=True):
            self._handles += [_record(named[name], name, outputs) for name in self.names]

    def loss(self) -> Tensor:
        """Mean over the layers of |student - teacher|^2 / |teacher|^2 in the latest forwards."""
        layers = [_relative_error(self._student[name], self._teacher[name]) for name in self.names]
        self._student.clear()
        self._teacher.clear()
        return sum(layers[1:], layers[0]) / len(layers)

    def remove(self) -> None:
        """Take the hooks off both networks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _matching(model: nn.Module, globs: Sequence[str]) -> list[str]:
    names = [name for name, _ in model.named_modules() if name]
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            near = ", ".join(difflib.get_close_matches(glob, names, n=3, cutoff=0.0))
            raise ValueError(f"distill_features: no module matches {glob!r}; nearest: {near}")
    return [name for name in names if any(fnmatchcase(name, glob) for glob in globs)]


def _record(module: nn.Module, name: str, outputs: dict[str, Tensor]) -> RemovableHandle:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        outputs[name] = output if isinstance(output, Tensor) else output[0]

    return module.register_forward_hook(hook)


def _relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(student, teacher) / teacher.square().mean().clamp_min(1e-12)
