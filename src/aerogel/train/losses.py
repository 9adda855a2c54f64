"""Losses: cross-entropy, and learning from a dense teacher."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aerogel.sparsity.distillation import soft_loss as logit_loss
from aerogel.train.config import TrainConfig

__all__ = ["embedding_loss", "logit_loss", "training_loss"]


def training_loss(
    output: Tensor, target: Tensor | None, teacher_output: Tensor | None, config: TrainConfig
) -> Tensor:
    """Mean loss of a batch.

    With a target: cross-entropy, mixed with the teacher's share. Without: the teacher's alone.

    Args:
        output: (B, classes) logits or (B, C) embeddings.
        target: (B,) class numbers, (B, classes) probabilities, or None.
        teacher_output: of the shape of output, or None.
        config: smoothing, teacher's share, temperature.

    Raises:
        ValueError: neither a target nor a teacher.
    """
    if target is None:
        if teacher_output is None:
            raise ValueError("this data set has no targets: give a teacher to learn from")
        return embedding_loss(output, teacher_output)
    loss = F.cross_entropy(output, target, label_smoothing=config.label_smoothing)
    if teacher_output is None:
        return loss
    return torch.lerp(
        loss, logit_loss(output, teacher_output, config.temperature), config.distill_alpha
    )


def embedding_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cosine, which for unit vectors is half the squared distance."""
    return (1.0 - F.cosine_similarity(student, teacher, dim=-1)).mean()
