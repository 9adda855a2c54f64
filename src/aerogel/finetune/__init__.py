"""Fine-tuning for sparse systems: what learns on a pretrained model beside its own weights."""

from aerogel.finetune.attention_gate import (
    calibrate_gates,
    distill_gates,
    fit_gates,
    gate_loss,
    load_gates,
    make_gates,
    save_gates,
)
from aerogel.finetune.published_gates import gates_from_published

__all__ = [
    "calibrate_gates",
    "distill_gates",
    "fit_gates",
    "gate_loss",
    "gates_from_published",
    "load_gates",
    "make_gates",
    "save_gates",
]
