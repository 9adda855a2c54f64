"""Learning a teacher's hidden features, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from aerogel.sparsity.distillation import FeatureTap

_ARGUMENT = "distill_features"


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
        self._student = FeatureTap(student, globs, _ARGUMENT)
        self.names = self._student.names
        known = dict(teacher.named_modules())
        missing = [name for name in self.names if name not in known]
        if missing:
            self._student.remove()
            raise ValueError(f"{_ARGUMENT}: the teacher has no module {missing[0]!r}")
        self._teacher = FeatureTap(teacher, self.names, _ARGUMENT)

    def loss(self) -> Tensor:
        """Mean over the layers of |student - teacher|^2 / |teacher|^2 in the latest forwards."""
        ours, theirs = self._student.take(), self._teacher.take()
        layers = [_relative_error(ours[name], theirs[name]) for name in self.names]
        return sum(layers[1:], layers[0]) / len(layers)

    def remove(self) -> None:
        """Take the hooks off both networks."""
        self._student.remove()
        self._teacher.remove()


def _relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(student, teacher) / teacher.square().mean().clamp_min(1e-12)
